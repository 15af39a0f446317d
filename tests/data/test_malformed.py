"""Malformed data on the command line: exit code 2, one clear message, no traceback, nothing written."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from row_samples import PAIR, THUMB, Raw, lines
from typer.testing import CliRunner

from perlcli import coffee
from perlcli.cli.app import app
from perlcli.data import files
from perlcli.errors import PerlError

Refused = Callable[..., str]


def said(role: str, content: Any) -> Raw:
    return {"role": role, "content": content}


def listed(*rows: Any) -> bytes:
    """Rows as one JSON list."""
    return json.dumps(rows).encode()


def half_flipped(content: bytes) -> bytes:
    """A gzip file with a damaged byte in the middle."""
    packed = bytearray(gzip.compress(content))
    packed[len(packed) // 2] ^= 0xFF
    return bytes(packed)


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Runs a command on bad data and checks that it ends with exit code 2 and one clear error, and writes nothing."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(command: str, source: object, *words: str, stdin: bytes | None = None) -> str:
        out = tmp_path / "out"
        line = [command, "--data", str(source), "--output", str(out), "--dry-run", *words]
        found = CliRunner().invoke(app, line, input=stdin)
        assert found.exit_code == 2, found.output
        assert not isinstance(found.exception, PerlError)
        assert found.stderr.startswith("Error: ")
        assert found.stderr.count("Error: ") == 1
        assert found.stderr.count("Hint: ") <= 1
        assert "Traceback" not in found.output
        assert not out.exists()
        assert not list(Path().iterdir())
        return found.stderr

    return run


HH = {"chosen": "\n\nHuman: hi\n\nAssistant: good", "rejected": "\n\nHuman: hi\n\nAssistant: bad"}
TASK = {
    "context": json.dumps([{"role": "user", "text": "a latte"}]),
    "generation": json.dumps({"role": "agent", "api": {"add": {"id": "latte"}}}),
    "reward": 1.0,
}
MESSAGES: Raw = {
    "prompt": [said("user", "a")],
    "chosen": [said("assistant", "b")],
    "rejected": [said("assistant", "c")],
}
SHP: Raw = {"post_id": "p", "history": "a", "human_ref_A": "b", "human_ref_B": "c", "labels": 1, "score_ratio": 2.0}
INFO: Raw = {"post": "p", "title": "t", "subreddit": "s"}
COMPARISON: Raw = {"info": INFO, "summaries": [{"text": "b"}, {"text": "c"}], "choice": 0}
ANDROID: Raw = {"goal": "a", "history": [], "action": {"action_type": "wait"}, "label": 1}
NEEDED = "`perl reward` needs chosen and rejected (prompt optional), or prompt, completion and label"
UTF8 = "not UTF-8 text: found"


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        # empty files
        ("a.jsonl", b"", "a.jsonl has no rows"),
        ("a.jsonl", b"\n \n", "a.jsonl has no rows"),
        ("a.json", b"[]", "a.json has no rows"),
        ("a.json", b" [\n ]\n", "a.json has no rows"),
        ("a.jsonl", b"\xef\xbb\xbf", "a.jsonl has no rows"),
        ("a.jsonl.gz", gzip.compress(b""), "a.jsonl.gz has no rows"),
        ("a.csv", b"", "a.csv has no rows"),
        ("a.csv", b"prompt,chosen,rejected\n", "a.csv has no rows"),
        # invalid JSON
        ("a.jsonl", lines(PAIR) + b'{"prompt": ', "a.jsonl, line 2, column 11: not valid JSON (Expecting value)"),
        ("a.jsonl", lines(PAIR) + b"\n\nprompt: a", "a.jsonl, line 4, column 1: not valid JSON"),
        ("a.jsonl", b"{'prompt': 'a'}", "line 1, column 2: not valid JSON (Expecting property name"),
        ("a.jsonl", b"{'prompt': 'a'}", "at \"{'prompt': 'a'}\""),
        ("a.jsonl", lines(PAIR).replace(b"\n", b",\n"), "a.jsonl, line 1, column 48: not valid JSON (Extra data)"),
        ("a.jsonl", b'{"prompt": "a', "line 1, column 12: not valid JSON (Unterminated string starting at)"),
        ("a.jsonl", b'{"prompt": "\\x"}', "not valid JSON (Invalid \\escape) at "),
        ("a.jsonl", b'{"prompt": "a\tb"}', "not valid JSON (Invalid control character at) at "),
        ("a.jsonl", b'{"prompt": undefined}', "line 1, column 12: not valid JSON (Expecting value) at "),
        ("a.json", b"[\n" + json.dumps(PAIR).encode() + b",\n{]", "a.json, line 3, column 2: not valid JSON"),
        ("a.json", b"[\n", "a.json, line 2, column 1: not valid JSON (Expecting value)"),
        ("a.json", b"[" + lines(PAIR) + b"]]", "a.json, line 2, column 2: not valid JSON (Extra data) at "),
        ("a.json", b"[" + lines(PAIR) + lines(PAIR) + b"]", "line 2, column 1: not valid JSON (Expecting ',')"),
        ("a.json", b"[" + lines(PAIR) + b",]", "a.json, line 2, column 2: not valid JSON (Expecting value)"),
        ("a.json", listed(PAIR)[:-1], "a.json, line 1, column 49: not valid JSON (Expecting ',')"),
        ("a.json", json.dumps(PAIR, indent=1).encode(), "a.json, line 1: a JSON object over several lines"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1: nested too deeply"),
        ("a.jsonl", b'{"a": ' * 100_000, "a.jsonl, line 1: nested too deeply"),
        ("a.jsonl", b'{"prompt": ' + b"9" * 5000 + b"}", "a.jsonl, line 1: a number of thousands of digits"),
        ("a.json", b'[{"prompt": ' + b"9" * 5000 + b"}]", "a.json, line 1: a number of thousands of digits"),
        # invalid text
        ("a.jsonl", '{"prompt": "é"}'.encode("latin-1"), f"a.jsonl, line 1, byte 12: {UTF8} 0xe9"),
        ("a.jsonl", lines(PAIR) + b'{"a": "\xff"}', f"a.jsonl, line 2, byte 55: {UTF8} 0xff"),
        ("a.json", b"[" + lines(PAIR) + b',{"a": "\xff"}]', f"a.json, line 2, byte 57: {UTF8} 0xff"),
        ("a.json", b'[{"a": "\xc3', f"a.json, line 1, byte 8: {UTF8} 0xc3"),
        ("a.jsonl", "{}".encode("utf-16"), "has the columns none; " + NEEDED),
        ("a.jsonl", b"\xff\xfe\x00\xd8{\x00", "Can't read {path}: not UTF-16 text: "),
        ("a.csv", b"prompt,chosen,rejected\na,b,\xe9\n", f"a.csv, line 2, byte 27: {UTF8} 0xe9"),
        ("a.jsonl", gzip.compress(lines(PAIR)), "(it looks like gzip: its name must end in .gz)"),
        ("a.jsonl", lines(PAIR) + b'{"prompt": "\\ud83d"}', "a.jsonl, row 2: \\ud83d is half of a surrogate pair"),
        ("a.jsonl", b'{"\\udc00": 1}', "a.jsonl, row 1: \\udc00 is half of a surrogate pair"),
        # not a row
        ("a.jsonl", b"1\n", "a.jsonl, row 1: expected an object with named columns, found 1"),
        ("a.jsonl", lines(PAIR) + b'"text"', "a.jsonl, row 2: expected an object with named columns, found 'text'"),
        ("a.jsonl", b"null", "a.jsonl, row 1: expected an object with named columns, found null"),
        ("a.json", b'[["a", "b"]]', "a.json, row 1: expected an object with named columns, found ['a', 'b']"),
        ("a.jsonl", b'{"prompt": "a", "prompt": "b"}', "a.jsonl, row 1: duplicate key: 'prompt'"),
        ("a.jsonl", b'{"prompt": [{"role": "user", "role": "x"}]}', "row 1: duplicate key: 'role'"),
        ("a.json", b'[{"chosen": 1, "chosen": 2}]', "a.json, row 1: duplicate key: 'chosen'"),
        # unknown or damaged files
        ("a.txt", b"text", "a.txt: unknown file type\nHint: supported endings: .jsonl, .json, .jsonl.gz"),
        ("a", b"text", "a: unknown file type"),
        ("a.jsonl.gz", b"no gzip", "Can't read {path}: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(lines(PAIR))[:-9], "Can't read {path}: Compressed file ended"),
        ("a.jsonl.gz", half_flipped(lines(*[PAIR] * 9)), "Can't read {path}: "),
        ("a.jsonl.gz", b"\x1f\x8b\x08" + b"\0" * 7 + b"\xff" * 9, "Can't read {path}: Error -3 while decompressing"),
        ("a.parquet", b"no parquet", "Can't read {path}: Parquet"),
        ("a.parquet", b"", "Can't read {path}: "),
        ("a.parquet", b"PAR1" * 9, "Can't read {path}: "),
        # CSV
        ("a.csv", b"prompt,chosen,rejected\na,b,c\na,b,c,d\n", "a.csv, line 3: expected 3 fields (prompt, chosen"),
        ("a.csv", b"prompt,chosen,rejected\na,b,c,d\n", "a.csv, line 2: expected 3 fields (prompt, chosen, rejected)"),
        ("a.csv", b"prompt,chosen,rejected\na,b\n", "rejected), found 2"),
        ("a.csv", b"prompt,chosen,chosen\na,b,c\n", "a.csv, line 1: duplicate column in the header: 'chosen'"),
        ("a.csv", b"prompt,chosen,\na,b,c\n", "a.csv, line 1: the header has a column without a name"),
        ("a.csv", b'prompt,chosen,rejected\na,b,"c\n', "a.csv, line 2: not valid CSV (unexpected end of data)"),
        ("a.csv", b'prompt,chosen,rejected\na,b,"c"d\n', "a.csv, line 2: not valid CSV (',' expected after '\"')"),
        ("a.csv", b"ask/good/bad\na/b/c\n", "has the columns ask/good/bad; " + NEEDED),
        ("a.tsv", b"prompt\tchosen\trejected\na\tb\n", "a.tsv, line 2: expected 3 fields (prompt, chosen, rejected)"),
        ("a.csv", b"prompt,chosen,rejected\na,,c\n", "1 row read, 0 kept; dropped 1 with an empty completion (row 1)"),
        ("a.csv.gz", gzip.compress(b"prompt,completion,label\na,b,2\n"), "row 1: label must be 0, 1, true or false"),
        # other columns
        ("a.jsonl", lines({"question": "a", "answer": "b"}), "a.jsonl has the columns question, answer; " + NEEDED),
        ("a.jsonl", lines({"text": "a"}), "has the columns text; " + NEEDED),
        ("a.jsonl", lines({"prompt": "a", "completion": "b"}), "has the columns prompt, completion; " + NEEDED),
        ("a.json", b'{"data": []}', "a.json has no rows"),
        ("a.json", json.dumps({"data": [PAIR], "x": [PAIR]}).encode(), "line 1: several lists of rows: data, x"),
        ("a.json", b'{"data": [' + lines(PAIR) + b",1]}", "a.json, row 2: expected an object with named columns"),
        ("a.jsonl", b"{}", "has the columns none; " + NEEDED),
        ("a.jsonl", b'{"a": ' + b"[" * 60 + b"]" * 60 + b"}", "a.jsonl, row 1: nested too deeply"),
        ("a.jsonl", b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}", "a.jsonl, row 1: nested too deeply"),
        ("a.csv", ",".join(f"column{n}" for n in range(30_000)).encode() + b"\na\n", "expected 30,000 fields (column0"),
        # fields of TRL's formats
        (
            "a.jsonl",
            lines(PAIR, {**PAIR, "prompt": 5}),
            "a.jsonl, row 2: prompt must be text or a list of messages, not 5",
        ),
        ("a.jsonl", lines(PAIR) + b"\n" + lines({**PAIR, "chosen": 5}), "a.jsonl, row 2 (line 3): chosen must be"),
        ("a.jsonl", lines(PAIR, {"prompt": "a", "chosen": "b"}), "row 2: rejected is missing: the row has prompt, cho"),
        ("a.jsonl", lines(PAIR, THUMB), "row 2: chosen is missing: the row has prompt, completion, label"),
        ("a.jsonl", lines(PAIR, {}), "row 2: chosen is missing: the row has no columns"),
        ("a.jsonl", lines({**PAIR, "chosen": 5}), "row 1: chosen must be text or a list of messages, not 5"),
        ("a.jsonl", lines({**PAIR, "chosen": []}), "row 1: chosen must be text or a list of messages, not []"),
        ("a.jsonl", lines({**PAIR, "chosen": {"a": 1}}), "chosen must be text or a list of messages, not {'a': 1}"),
        ("a.jsonl", lines({**PAIR, "chosen": ["b"]}), "row 1: chosen contains 'b', which is not a message"),
        ("a.jsonl", lines({**PAIR, "chosen": [[said("user", "a")]]}), "which is not a message with role and content"),
        ("a.jsonl", lines({**MESSAGES, "prompt": None, "chosen": "b"}), "row 1: text and messages in the same row"),
        ("a.jsonl", lines({**MESSAGES, "chosen": [{"content": "b"}]}), "which is not a message with role and content"),
        ("a.jsonl", lines({**MESSAGES, "chosen": [said("assistant", None)]}), "content is not text: None"),
        ("a.jsonl", lines({**MESSAGES, "chosen": [said("assistant", ["b"])]}), "content is not text: ['b']"),
        ("a.jsonl", lines(THUMB, {**THUMB, "label": 2}), "row 2: label must be 0, 1, true or false, not 2"),
        ("a.jsonl", lines({**THUMB, "label": "fine"}), "row 1: label must be 0, 1, true or false, not 'fine'"),
        (
            "a.jsonl",
            lines({**THUMB, "label": "fine"}),
            "Hint: say what 'fine' means with --label-map fine=N, where N is 1",
        ),
        ("a.jsonl", lines({**THUMB, "label": -1}, {**THUMB, "label": 0}), "row 2: label has both 0 and -1"),
        ("a.jsonl", lines({**THUMB, "label": 0.5}), "row 1: label must be 0, 1, true or false, not 0.5"),
        ("a.jsonl", lines({**THUMB, "label": [1]}), "row 1: label must be 0, 1, true or false, not [1]"),
        ("a.jsonl", lines({**THUMB, "label": float("nan")}), "1 row read, 0 kept; dropped 1 without a label"),
        ("a.jsonl", lines({**THUMB, "label": None}), "1 row read, 0 kept; dropped 1 without a label"),
        ("a.jsonl", lines(THUMB, THUMB), "All 2 rows are thumbs up: a reward model needs both labels"),
        ("a.jsonl", lines({**THUMB, "label": 0}), "All 1 rows are thumbs down"),
        (
            "a.jsonl",
            lines({**PAIR, "chosen": "c"}),
            "No rows left to use: {path}: pairs, 1 row read, 0 kept; dropped 1",
        ),
        ("a.jsonl", lines({**PAIR, "chosen": "x " * 2000}), "every row is longer than 512 tokens"),
        # Anthropic HH
        ("a.jsonl", lines({**HH, "rejected": "c"}), "row 1: rejected is not a `\\n\\nHuman: … \\n\\nAssistant: …`"),
        ("a.jsonl", lines({**HH, "rejected": 5}), "row 1: rejected is not a `\\n\\nHuman: … \\n\\nAssistant: …`"),
        (
            "a.jsonl",
            lines({**HH, "rejected": "\n\nHuman: b\n\nAssistant: c"}),
            "row 1: chosen and rejected do not start with the same turn",
        ),
        # Taskmaster
        ("a.jsonl", lines({**TASK, "context": "[{"}), "row 1: context is not valid JSON (Expecting property name"),
        ("a.jsonl", lines({**TASK, "context": "[" * 9999}), "row 1: context can't be read as JSON: "),
        ("a.jsonl", lines({**TASK, "context": "[" * 60 + "]" * 60}), "context can't be read as JSON: nested"),
        ("a.jsonl", lines({**TASK, "context": '["\\ud83d"]'}), "context can't be read as JSON: \\ud83d is"),
        ("a.jsonl", lines({**TASK, "context": "{}"}), "row 1: context must be a list of turns, not {}"),
        ("a.jsonl", lines({**TASK, "context": "[1]"}), "row 1: context contains 1, which is not a turn with a role"),
        ("a.jsonl", lines({**TASK, "generation": '{"role": "agent"}'}), "turn without text, api or response"),
        ("a.jsonl", lines({**TASK, "generation": None}), "row 1: generation is null: expected JSON"),
        ("a.jsonl", lines({**TASK, "reward": 3}), "row 1: reward must be 0, 1, true or false, not 3"),
        # Stanford SHP
        ("a.jsonl", lines({**SHP, "labels": 2}), "row 1: labels must be 0, 1, true or false, not 2"),
        ("a.jsonl", lines({**SHP, "history": None}), "row 1: history is null: expected text"),
        ("a.jsonl", lines({**SHP, "human_ref_A": 1}), "row 1: human_ref_A must be text, not 1"),
        # OpenAI's comparisons
        ("a.jsonl", lines({**COMPARISON, "choice": 2}), "row 1: choice must be 0 or 1, not 2"),
        ("a.jsonl", lines({**COMPARISON, "choice": True}), "row 1: choice must be 0 or 1, not True"),
        ("a.jsonl", lines({**COMPARISON, "choice": [0]}), "row 1: choice must be 0 or 1, not [0]"),
        ("a.jsonl", lines({**COMPARISON, "info": "x"}), "info must be an object with post, title and subreddit, not"),
        ("a.jsonl", lines({**COMPARISON, "info": {**INFO, "title": None}}), "row 1: info: title is null"),
        ("a.jsonl", lines({**COMPARISON, "summaries": []}), "row 1: summaries must be a list of two summaries, not []"),
        (
            "a.jsonl",
            lines({**COMPARISON, "summaries": [{"text": "b"}]}),
            "row 1: summaries must be a list of two summaries, not of 1",
        ),
        ("a.jsonl", lines({**COMPARISON, "summaries": [{"text": "b"}, "c"]}), "contains 'c', which is not a summary"),
        # AndroidControl
        ("a.jsonl", lines({**ANDROID, "goal": None}), "row 1: goal and instruction are both missing or empty"),
        ("a.jsonl", lines({**ANDROID, "goal": 5}), "row 1: goal must be text, not 5"),
        ("a.jsonl", lines({**ANDROID, "action": []}), "row 1: action must be text or an object, not []"),
        ("a.jsonl", lines({**ANDROID, "action": {}}), "row 1: action must be text or an object, not {}"),
        ("a.jsonl", lines({"goal": "a", "action": "b"}), "dropped 1 without a label (row 1)"),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else "",
)
def test_malformed_data_gets_one_clear_error(
    name: str, content: bytes, told: str, tmp_path: Path, refused: Refused
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert told.replace("{path}", str(path)) in refused("reward", path)


@pytest.mark.parametrize(
    ("command", "content", "told"),
    [
        ("sft", {"prompt": "a"}, "has the columns prompt; `perl sft` needs prompt and completion, messages, or text"),
        ("sft", {"text": 5}, "row 1: text must be text, not 5"),
        ("sft", {"messages": "a"}, "row 1: messages must be text or a list of messages, not 'a'"),
        ("sft", {"messages": None}, "row 1: messages is null: expected a list of messages"),
        (
            "sft",
            {"messages": [said("user", "a"), {"role": "assistant"}]},
            "row 1: messages has a message whose content",
        ),
        ("sft", {"messages": [said(5, "a")]}, "which is not a message with role and content"),
        (
            "sft",
            {**THUMB, "label": 0},
            "No rows left to use: {path}: thumbs, 1 row read, 0 kept; dropped 1 with a thumbs down",
        ),
        ("sft", {"instruction": "a", "output": None}, "0 kept; dropped 1 with an empty completion (row 1)"),
        ("sft", {"instruction": ["a"], "output": "b"}, "row 1: instruction must be text, not ['a']"),
        ("sft", {"instruction": "a", "input": 5, "output": "b"}, "row 1: input must be text, not 5"),
        ("sft", {"conversations": []}, "row 1: conversations must be a list of turns with from and value, not []"),
        ("sft", {"conversations": ["a"]}, "row 1: conversations contains 'a', which is not a turn with from and value"),
        (
            "sft",
            {"conversations": [{"from": "cat", "value": "b"}]},
            "has a turn from 'cat': expected one of human, user, prompter",
        ),
        (
            "sft",
            {"conversations": [{"from": 1, "value": "b"}]},
            "has a turn from 1: expected one of human, user, prompter",
        ),
        ("sft", {"conversations": [{"from": "gpt", "value": 1}]}, "has a turn whose value is not text: 1"),
        ("sft", {"conversations": [{"role": "user"}]}, "conversations has a message whose content is not text: None"),
        ("sft", {"utterances": None}, "row 1: utterances is null: expected a list of turns"),
        ("sft", {"utterances": "a"}, "row 1: utterances must be a list of turns, not 'a'"),
        ("sft", {"utterances": [{"speaker": "cat", "text": "a"}]}, "is not a turn with speaker user or assistant"),
        ("sft", {"utterances": [{"speaker": "user", "text": None}]}, "row 1: utterances: text is null: expected text"),
        ("sft", {"utterances": [{"speaker": "user", "text": "a"}]}, "utterances contains no turn of the assistant"),
        (
            "sft",
            {"utterances": [{"speaker": "user", "text": "a", "annotations": ["b"]}]},
            "annotations contains 'b', which",
        ),
        ("sft", {"utterances": [{"speaker": "user", "text": "a", "annotations": 5}]}, "annotations must be a list"),
        ("sft", {"utterances": [{"speaker": "user", "text": "a", "apis": 5}]}, "apis must be a list of calls"),
        (
            "sft",
            {"utterances": [{"speaker": "user", "text": "a", "apis": [{}]}]},
            "apis contains {}, which has no name",
        ),
        ("sft", {"subreddit": "a", "title": "b", "post": "c"}, "row 1: summary is missing or null"),
        ("sft", {"subreddit": "a", "title": "b", "post": None, "summary": "d"}, "row 1: post is null: expected text"),
        ("rl", {"text": "a"}, "has the columns text; `perl rl` needs prompt (or any format that has one"),
        ("rl", {"chosen": "a", "rejected": "b"}, "row 1: no prompt to answer"),
        ("rl", {"prompt": ""}, "1 row read, 0 kept; dropped 1 with an empty prompt (row 1)"),
        ("rl", {"prompt": None}, "row 1: prompt is null: expected text or a list of messages"),
        ("rl", {"messages": [said("assistant", "a")]}, "row 1: no prompt to answer"),
        (
            "rl",
            {"prompt": "x " * 2000},
            "every row is longer than 384 tokens (--max-length 512 less 128 for the completion)",
        ),
    ],
)
def test_each_command_says_what_it_needs(
    command: str, content: Raw, told: str, tmp_path: Path, refused: Refused
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(content))
    words = ["--reward", "perlcli.coffee:reward"] if command == "rl" else []
    assert told.replace("{path}", str(path)) in refused(command, path, *words)


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"prompt": ["a", "a"], "chosen": [None, ""], "rejected": ["c", "c"]}, "dropped 2 with an empty completion"),
        ({"chosen": [1], "rejected": [2]}, "row 1: chosen must be text or a list of messages, not 1"),
        ({"chosen": [b"b"], "rejected": [b"c"]}, "row 1: chosen must be text or a list of messages, not b'b'"),
        ({"chosen": [["b"]], "rejected": [["c"]]}, "row 1: chosen contains 'b', which is not a message"),
        (
            {"chosen": [[{"role": "user"}]], "rejected": [[{"role": "user"}]]},
            "a message whose content is not text: None",
        ),
        ({"text": ["a"]}, "a.parquet has the columns text; " + NEEDED),
        ({"chosen": [], "rejected": []}, "a.parquet has no rows"),
    ],
)
def test_a_table_is_checked_like_a_file(columns: Raw, told: str, tmp_path: Path, refused: Refused) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert told in refused("reward", tmp_path / "a.parquet")


def test_all_faults_are_reported_at_once_in_the_order_of_the_rows(tmp_path: Path, refused: Refused) -> None:
    """Rows that can't be parsed and rows in another format are in one list: ten, then a count."""
    path = tmp_path / "a.jsonl"
    bad = [b"{\n", b"\xff\n", lines({**THUMB, "label": 3}), b"7\n"]
    path.write_bytes(lines(THUMB) + b"".join(bad * 253))
    told = refused("reward", path).splitlines()
    assert [line.partition("a.jsonl, ")[2].partition(":")[0] for line in told[:4]] == [
        "line 2, column 2",
        "line 3, byte 49",
        "row 4",
        "row 5",
    ]
    assert told[10:] == [
        "… and 1,002 more rows",
        "Hint: on a scale, --label-threshold 3 makes 3 and above a thumbs up, what is below a thumbs down",
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize("first", [b"{", b"x"])
def test_a_line_of_a_gigabyte_is_refused_unread(name: str, first: bytes, tmp_path: Path, refused: Refused) -> None:
    with (tmp_path / name).open("wb") as file:
        file.write(first)
        file.truncate(2**30)  # a sparse file takes no space on the disk
    told = refused("reward", tmp_path / name)
    assert f"{name}, line 1: longer than 64 MiB, the limit for one row" in told


def test_a_row_of_a_list_may_be_no_longer_than_a_line(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "LONGEST", 1000)
    monkeypatch.setattr(files, "CHUNK", 100)
    (tmp_path / "a.json").write_bytes(b"[\n" + lines(PAIR) + b",\n" + lines({**PAIR, "chosen": "x" * 2000}) + b"]")
    assert "a.json, line 4: longer than" in refused("reward", tmp_path / "a.json")


@pytest.mark.parametrize("name", ["nowhere.jsonl", "no/where/at/all", "nowhere/a.json"])
def test_a_missing_source_is_an_error(name: str, tmp_path: Path, refused: Refused) -> None:
    assert f"--data {tmp_path / name} does not exist" in refused("reward", tmp_path / name)


def test_an_empty_name_is_an_error(refused: Refused) -> None:
    assert "--data is empty" in refused("reward", "")


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ([], "contains no train.* (.jsonl, .json, .jsonl.gz, .json.gz, .csv, .tsv, .csv.gz, .tsv.gz, .xlsx, .parquet)"),
        (["notes.txt", "rows.jsonl"], "found notes.txt, rows.jsonl\nHint: give the file itself"),
        (["test.jsonl"], "contains no train.*"),
        (["state.json"], "as a saved dataset: "),
        (["dataset_dict.json"], "as a saved dataset: "),
    ],
)
def test_a_folder_without_the_data_says_what_it_holds(
    files: list[str], told: str, tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "rows").mkdir()
    for name in files:
        (tmp_path / "rows" / name).write_text("{}")
    found = refused("reward", tmp_path / "rows")
    assert str(tmp_path / "rows") in found
    assert told in found


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "standard input has no rows"),
        (
            b"\n prompt,chosen,rejected\na,b,c\n",
            "standard input must be JSON lines, not 'prompt,chosen,rejected'\nHint: give",
        ),
        (b"{]", "standard input, line 1, column 2: not valid JSON"),
        (lines(PAIR, {**PAIR, "chosen": 5}), "standard input, row 2: chosen must be text or a list of messages, not 5"),
    ],
)
def test_standard_input_is_checked_like_a_file(content: bytes, told: str, refused: Refused) -> None:
    assert told in refused("reward", "-", stdin=content)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--data-format", "par"], "prompts, text, not 'par'\nHint: Did you mean pairs?"),
        (["--data-format", "xyz"], "--data-format must be one of hh, openai-preferences, "),
        (
            ["--data-format", "thumbs"],
            "--data-format thumbs needs the columns prompt, completion, label; {path} has pro",
        ),
        (["--data-format", "thumbs"], "Hint: it looks like pairs; leave out --data-format"),
        (["--data-format", "hh"], "row 1: chosen is not a `\\n\\nHuman: … \\n\\nAssistant: …` text: 'b'"),
        (
            ["--data-format", "text"],
            "--data-format text does not work with `perl reward`, which needs chosen and rejected",
        ),
        (["--subset", "x"], "--subset only works with Hub datasets; {path} is not one"),
        (["--split", "dev"], "--split works with folders and Hub datasets; {path} is a single file"),
        (
            ["--shp-score-ratio", "2"],
            "--shp-score-ratio and --shp-per-post only apply to the format shp, but {path} is in the format pairs",
        ),
        (["--shp-per-post", "0"], "--shp-per-post must be above 0, not 0"),
        (["--eval-data", "{bad}"], "bad.jsonl has the columns prompt"),
    ],
)
def test_an_option_that_does_not_fit_the_data_is_an_error(
    words: list[str], told: str, tmp_path: Path, refused: Refused
) -> None:
    path, bad = tmp_path / "a.jsonl", tmp_path / "bad.jsonl"
    path.write_bytes(lines(PAIR))
    bad.write_bytes(lines({"prompt": "a"}))
    found = refused("reward", path, *(word.replace("{bad}", str(bad)) for word in words))
    assert told.replace("{path}", str(path)) in found


@pytest.mark.parametrize("words", [["--subset", "x"], ["--split", "dev"]])
def test_the_embedded_data_has_no_splits_to_choose(words: list[str], refused: Refused) -> None:
    assert "--subset and --split do not work with the embedded coffee data" in refused("reward", "coffee", *words)


def test_standard_input_is_read_once(refused: Refused) -> None:
    assert "can't both be read from standard input" in refused("reward", "-", "--eval-data", "-", stdin=lines(PAIR))


@pytest.mark.parametrize(
    ("change", "words", "told"),
    [
        ({"score_ratio": "x"}, ["--shp-score-ratio", "2"], "row 1: score_ratio must be a number, not 'x'"),
        ({"score_ratio": "nan"}, ["--shp-score-ratio", "2"], "row 1: score_ratio must be a number, not 'nan'"),
        ({"score_ratio": None}, ["--shp-score-ratio", "2"], "row 1: score_A is missing: the row has post_id, "),
        ({"score_ratio": None, "score_A": 5, "score_B": 0}, ["--shp-score-ratio", "2"], "must be above 0 for a ratio"),
        ({"post_id": None}, ["--shp-per-post", "5"], "row 1: post_id is null: expected the id of the post"),
        ({}, ["--shp-score-ratio", "3"], "shp, 1 row read, 0 kept; dropped 1 with a score ratio below 3 (row 1)"),
    ],
)
def test_the_limits_of_shp_need_their_columns(
    change: Raw, words: list[str], told: str, tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines({**SHP, **change}))
    assert told in refused("reward", tmp_path / "a.jsonl", *words)


def test_conversations_need_a_chat_template(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "base").mkdir()
    for path in coffee.BASE.iterdir():
        if path.name != "chat_template.jinja":
            (tmp_path / "base" / path.name).symlink_to(path)
    (tmp_path / "a.jsonl").write_bytes(lines(MESSAGES))
    found = refused("reward", tmp_path / "a.jsonl", "--model", str(tmp_path / "base"))
    assert "has no chat template, but the data contains conversations\nHint: use an instruct model" in found
