"""`perl data check`, `perl data show` and `perl data convert`."""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from perlcli import data, settings, terminal
from perlcli.cli.app import app
from perlcli.commands import data_check, data_file, data_show
from perlcli.data import Demonstration, Preference, Prompt, Renderer
from perlcli.data.render import of_demonstration, of_preference
from perlcli.data.rows import SourceRow
from perlcli.model import sources, tokenizers

PAIR = {"prompt": "a latte", "chosen": "b", "rejected": "c"}
HH = {"chosen": "\n\nHuman: hi\n\nAssistant: good", "rejected": "\n\nHuman: hi\n\nAssistant: bad"}
TASK = {
    "context": json.dumps([{"role": "user", "text": "a latte"}]),
    "generation": json.dumps({"role": "agent", "text": "yes"}),
    "reward": 1.0,
}
CHAT = [{"role": "user", "content": "a latte"}, {"role": "assistant", "content": "yes"}]


def answers(text: str) -> dict[str, str]:
    """What `perl data check` says about each command: yes or no."""
    lines = [line.split() for line in text.splitlines() if line.startswith("perl ")]
    return {words[1]: words[2] for words in lines}


@pytest.mark.parametrize(
    ("row", "usable"),
    [
        (PAIR, "sft reward rl eval"),
        (HH, "sft reward rl eval"),
        (TASK, "sft reward rl eval"),
        ({"prompt": "a", "completion": "b"}, "sft rl eval"),
        ({"messages": CHAT}, "sft rl eval"),
        ({"text": "a"}, "sft"),
        ({"prompt": "a"}, "rl eval"),
    ],
    ids=["pairs", "hh", "taskmaster", "demonstrations", "messages", "text", "prompts"],
)
def test_check_says_which_commands_can_use_a_file(
    row: Any, usable: str, perl: Any, llama: Path, tmp_path: Path, write: Any
) -> None:
    found = perl("data", "check", write(tmp_path / "a.jsonl", [row]), "--model", llama).stdout
    assert [name for name, can in answers(found).items() if can == "yes"] == usable.split()
    assert set(answers(found)) == {"sft", "reward", "rl", "eval"}
    assert "tokens per row:" in found


def test_check_reports_what_would_be_dropped(perl: Any, llama: Path, tmp_path: Path, write: Any) -> None:
    rows = [PAIR, PAIR, {**PAIR, "chosen": "c"}, {**PAIR, "chosen": " "}, {**PAIR, "prompt": "latte " * 90}]
    path = write(tmp_path / "a.jsonl", rows)
    found = perl("data", "check", path, "-m", llama, "--max-length", 64, "--max-completion-length", 8).stdout
    reward = found[found.index("perl reward") : found.index("perl rl")]
    assert "pairs, 5 rows read, 2 kept; dropped 1 with equal answers (row 3)" in reward
    assert "1 with an empty completion (row 4)" in reward
    assert "1 longer than 64 tokens (row 5)" in reward
    assert "1 duplicate row kept (row 2)" in reward
    assert "longer than 56 tokens" in found[found.index("perl rl") :]
    assert not list(tmp_path.glob("runs*"))


def test_check_names_the_columns_that_nothing_reads(perl: Any, llama: Path, tmp_path: Path, write: Any) -> None:
    found = perl("data", "check", write(tmp_path / "a.jsonl", [{**PAIR, "id": 1, "url": "x"}]), "-m", llama).stdout
    assert found.count("columns not used: id, url") == 2
    assert found.count("columns passed to reward functions: id, url") == 1


def test_check_names_the_keys_of_messages_that_the_template_does_not_read(
    perl: Any, llama: Path, tmp_path: Path, write: Any
) -> None:
    rows = [{"messages": [{**CHAT[0], "name": "Ann", "id": 1}, CHAT[1]]}]
    found = perl("data", "check", write(tmp_path / "a.jsonl", rows), "-m", llama).stdout
    assert found.count("message keys not used: id, name") == 2


def test_check_says_why_a_stage_has_no_columns(perl: Any, llama: Path, tmp_path: Path, write: Any) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "response_a": "b", "response_b": "c"}])
    found = perl("data", "check", path, "--model", llama).stdout
    assert answers(found) == {"sft": "no", "reward": "no", "rl": "yes", "eval": "yes"}
    assert found.count("Hint: response_a and response_b may both be answers: write them as chosen and") == 2


def test_check_says_a_fault_once(perl: Any, llama: Path, tmp_path: Path, write: Any) -> None:
    rows = [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": " "}], "kto_tag": 1}]
    found = perl("data", "check", write(tmp_path / "a.jsonl", rows), "-m", llama).stdout
    assert found.count("with an empty completion") == 1
    assert "perl reward  no   as for perl sft" in found
    unknown = perl("data", "check", write(tmp_path / "b.jsonl", [{"Question": "a", "Answer": "b"}]), code=2).stderr
    assert unknown.count("has the columns Question, Answer") == 1
    assert "--columns prompt=Question,completion=Answer" in unknown


def test_all_commands_of_data_take_columns_and_labels(perl: Any, llama: Path, tmp_path: Path, write: Any) -> None:
    path = write(tmp_path / "a.jsonl", [{"data": {"q": "a latte", "a": "yes"}, "stars": stars} for stars in (5, 1)])
    words = ("--columns", "prompt=data.q,completion=data.a,label=stars", "--label-threshold", 4)
    assert "1 thumbs up, 1 thumbs down" in perl("data", "check", path, "-m", llama, *words).stdout
    assert "thumbs up" in perl("data", "show", path, "-m", llama, *words).stdout
    perl("data", "convert", path, "--output", "out.jsonl", *words)
    made = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert made == [{"prompt": "a latte", "completion": "yes", "label": label} for label in (True, False)]
    assert "--columns does not work" in perl("data", "check", "coffee", "--columns", "prompt=q", code=2).stderr


def test_check_of_a_folder_looks_at_both_sides(perl: Any, llama: Path, tmp_path: Path, write: Any) -> None:
    for name in ("train", "test"):
        write(tmp_path / f"{name}.jsonl", [PAIR])
    found = perl("data", "check", tmp_path, "-m", llama).stdout
    assert "eval: Warning: 1 held-out row with a prompt that is also in the training data" in found


@pytest.mark.slow
def test_check_of_the_embedded_data_needs_no_model(perl: Any) -> None:
    assert answers(perl("data", "check", "coffee").stdout)["eval"] == "yes"


def test_check_reads_standard_input_once_for_all_stages(perl: Any, llama: Path) -> None:
    words = ["data", "check", "-", "--model", str(llama)]
    found = CliRunner().invoke(app, words, input=b"".join(json.dumps(PAIR).encode() + b"\n" for _ in range(3)))
    assert found.exit_code == 0, found.output
    assert found.stdout.startswith("standard input, with the tokenizer of")
    assert found.stdout.count("pairs, 3 rows read, 3 kept") == 3
    assert set(answers(found.stdout).values()) == {"yes"}


@pytest.mark.slow
def test_check_keeps_no_rows(perl: Any, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory must not grow with the file."""
    alive: list[int] = []

    def rows(*_: Any) -> Any:
        for number in range(2000):
            if number % 500 == 499:
                kinds = [type(item) for item in gc.get_objects()]
                alive.append(sum(map(kinds.count, (Preference, Demonstration, Prompt))))
            yield SourceRow(f"row {number}", {**PAIR, "prompt": f"a latte {number}"})

    monkeypatch.setattr(data, "read", rows)
    (Path() / "a.jsonl").touch()
    assert "2,000 rows read, 2,000 kept" in perl("data", "check", "a.jsonl", "--model", llama).stdout
    assert len(alive) == 4
    assert max(alive) <= 4 * data_check.BATCH


def test_check_finds_duplicates_however_far_apart(perl: Any, llama: Path, tmp_path: Path, write: Any) -> None:
    rows = [{**PAIR, "prompt": f"latte {place % 300}"} for place in range(400)]
    found = perl("data", "check", write(tmp_path / "a.jsonl", rows), "--model", llama).stdout
    assert found.count("100 duplicate rows kept (rows 301, 302, 303…)") == 3


def test_a_late_fault_of_one_stage_does_not_stop_the_others(perl: Any, llama: Path, tmp_path: Path, write: Any) -> None:
    rows = [{"chosen": f"latte {place}", "rejected": f"latte {place} large"} for place in range(200)]
    path = write(tmp_path / "a.jsonl", [*rows, {"chosen": "x", "rejected": "y"}])
    found = perl("data", "check", path, "--model", llama).stdout
    assert answers(found) == {"sft": "yes", "reward": "yes", "rl": "no", "eval": "yes"}
    assert "row 201: no prompt to answer" in found


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"a": 1}\n', "No command can use"),
        ("{]", "line 1, column 2: not valid JSON"),
        ("", "has no rows"),
        ('{"chosen": "a", "rejected": 5, "prompt": "p"}\n', "rejected must be text"),
    ],
)
def test_a_file_that_no_command_can_use_ends_with_2(content: str, told: str, perl: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    found = perl("data", "check", tmp_path / "a.jsonl", code=2)
    assert found.stderr.startswith("Error: ") and told in found.stderr
    assert found.stdout == ""


@pytest.mark.parametrize(
    ("rows", "hint"),
    [
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": 5}], "read as prompt-completion; use"),
        ([{"prompt": "a", "context": "b", "answer": "c"}], "to leave it out, --columns prompt=prompt"),
    ],
)
def test_the_hint_is_about_the_rows_and_not_about_other_stages(
    rows: Any, hint: str, perl: Any, tmp_path: Path, write: Any
) -> None:
    found = perl("data", "check", write(tmp_path / "a.jsonl", rows), code=2).stderr
    assert hint in found and "chosen=COLUMN" not in found


@pytest.mark.parametrize("command", ["check", "show", "convert"])
def test_a_missing_file_is_an_error(command: str, perl: Any) -> None:
    assert "Error: FILE is missing\nHint: perl data " + command in perl("data", command, code=2).stderr
    assert "nowhere.jsonl does not exist" in perl("data", command, "nowhere.jsonl", code=2).stderr


def test_check_takes_its_file_from_yaml(perl: Any, llama: Path, tmp_path: Path, write: Any) -> None:
    write(tmp_path / "a.jsonl", [PAIR, PAIR])
    (tmp_path / "a.yaml").write_text(f"file: {tmp_path / 'a.jsonl'}\nmodel: {llama}\nfor: sft\nrows: 1\n")
    assert "As perl sft sees it" in perl("data", "show", "--config", tmp_path / "a.yaml").stdout


# --- show


def test_show_prints_what_sft_learns_from(perl: Any, llama: Path, tmp_path: Path, write: Any) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": CHAT[:1], "completion": CHAT[1:]}] * 5)
    found = perl("data", "show", path, "-m", llama, "--rows", 2).stdout
    tokenizer = AutoTokenizer.from_pretrained(llama)
    render = tokenizers.renderer(sources.locate(str(llama)), tokenizer)
    item = of_demonstration(render, data.load(str(path), "sft").rows[0])  # type: ignore[arg-type]
    start = next(i for i, label in enumerate(item["labels"]) if label != -100)
    parts = tokenizer.decode(item["input_ids"][:start]), tokenizer.decode(item["input_ids"][start:-1])  # and a newline
    assert f"── row 1, {len(item['input_ids'])} tokens\n{parts[0]}⟦{parts[1]}⟧\n" in found
    assert "<|im_end|>" in parts[1]
    assert found.count("── row") == 2


def test_show_prints_both_answers_with_the_token_that_is_scored(
    perl: Any, llama: Path, tmp_path: Path, write: Any
) -> None:
    path = write(tmp_path / "a.jsonl", [PAIR])
    found = perl("data", "show", path, "-m", llama).stdout
    tokenizer = AutoTokenizer.from_pretrained(llama)
    item = of_preference(
        tokenizers.renderer(sources.locate(str(llama)), tokenizer), data.load(str(path), "reward").rows[0]
    )  # type: ignore[arg-type]
    for name in ("chosen", "rejected"):
        ids = item[f"{name}_ids"]
        told = f"{tokenizer.decode(ids[:-1])}⟦{tokenizer.decode(ids[-1:])}⟧"
        assert f"── row 1, {name}, {len(ids)} tokens\n{told}\n" in found


def test_show_names_the_columns_and_keys_that_nothing_reads(perl: Any, llama: Path, tmp_path: Path, write: Any) -> None:
    said = [{**turn, "loss": False, "reasoning_content": "x"} for turn in CHAT]
    path = write(tmp_path / "a.jsonl", [{"messages": json.dumps(said), "note": "x", "": 0}])
    found = perl("data", "show", path, "-m", llama).stdout
    assert "columns not used: note, ''\nmessage keys not used: loss, reasoning_content\nAs perl sft sees it" in found
    assert "message keys not used: loss, reasoning_content\n" in perl("data", "check", path, "-m", llama).stdout


def test_show_for_a_given_stage(perl: Any, llama: Path, tmp_path: Path, write: Any) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b", "label": 0}])
    words = ("data", "show", path, "-m", llama)
    assert "thumbs down" in perl(*words).stdout
    assert "⟦" not in perl(*words, "--for", "rl").stdout
    assert "No rows left to use" in perl(*words, "--for", "sft", code=2).stderr


def test_show_marks_rows_that_are_dropped_or_cut(perl: Any, llama: Path, tmp_path: Path, write: Any) -> None:
    path = write(tmp_path / "a.jsonl", [{**PAIR, "prompt": "latte " * 90}, PAIR])
    words = ("data", "show", path, "-m", llama, "--max-length", 40)
    assert "── row 1: dropped, longer than 40 tokens\n" in perl(*words).stdout
    assert "── row 1, chosen, 40 tokens, prompt cut from the left\n" in perl(*words, "--on-long", "truncate").stdout


def test_colours_replace_the_brackets_on_a_terminal(llama: Path) -> None:
    render = Renderer(AutoTokenizer.from_pretrained(llama))
    ids = render.prompt_ids("a latte")
    learned = [False] * (len(ids) - 1) + [True]
    found = data_show.marked(ids, learned, render, coloured=True)
    assert found.endswith("\x1b[0m") and "\x1b[1;32m" in found and "⟦" not in found


def test_control_characters_are_spelled_out() -> None:
    assert terminal.visible("a\x1b[31m\nä\u200b") == "a\\x1b[31m\nä\\u200b"
    assert terminal.visible(plain := "Voilà\u202f! \U0001f469\u200d\U0001f469 \u0645\u06cc\u200c\u062e") == plain


def test_text_that_the_terminal_can_not_encode_is_no_error(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(type(sys.stdout), "encoding", "ascii", raising=False)
    terminal.put("ä⟦")
    assert capsys.readouterr().out in ("\\xe4\\u27e6\n", "ä⟦\n")


# --- convert


@pytest.mark.parametrize(
    ("row", "words", "wanted"),
    [
        (PAIR, [], PAIR),
        (
            HH,
            [],
            {
                "prompt": [{"role": "user", "content": "hi"}],
                "chosen": [{"role": "assistant", "content": "good"}],
                "rejected": [{"role": "assistant", "content": "bad"}],
            },
        ),
        (HH, ["--text"], {"prompt": "\n\nHuman: hi\n\nAssistant:", "chosen": " good", "rejected": " bad"}),
        (HH, ["--for", "rl"], {"prompt": [{"role": "user", "content": "hi"}]}),
        (
            TASK,
            [],
            {
                "prompt": [{"role": "user", "content": "user: a latte\nagent:"}],
                "completion": [{"role": "assistant", "content": "yes"}],
                "label": True,
            },
        ),
        (TASK, ["--for", "rl"], {"prompt": [{"role": "user", "content": "user: a latte\nagent:"}]}),
        (PAIR, ["--for", "sft"], {"prompt": "a latte", "completion": "b"}),
        ({"messages": CHAT}, [], {"messages": CHAT}),
        ({"text": "a"}, [], {"text": "a"}),
        (
            {"chosen": CHAT, "rejected": [CHAT[0], {"role": "assistant", "content": "no"}]},
            [],
            {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": [{"role": "assistant", "content": "no"}]},
        ),
        ({"prompt": "ä", "order": "x"}, [], {"prompt": "ä", "order": "x"}),
        ({**PAIR, "margin": 2}, [], {**PAIR, "margin": 2.0}),
        (
            {"messages": CHAT, "tools": [{"name": "add"}], "chat_template_kwargs": {"x": 1}},
            ["--for", "sft"],
            {"messages": CHAT, "tools": [{"name": "add"}], "chat_template_kwargs": {"x": 1}},
        ),
        (
            {"prompt": "a", "system": "s", "tools": [{"name": "add"}], "order": "x"},
            [],
            {
                "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}],
                "order": "x",
                "tools": [{"name": "add"}],
            },
        ),
    ],
)
def test_convert_writes_what_trl_reads(
    row: Any, words: list[str], wanted: Any, perl: Any, tmp_path: Path, write: Any
) -> None:
    path, out = write(tmp_path / "a.jsonl", [row]), tmp_path / "out.jsonl"
    found = perl("data", "convert", path, "--output", out, *words).stdout
    assert [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] == [wanted]
    assert f"Wrote {out}: 1 row with {', '.join(wanted)}, for perl " in found


@pytest.mark.parametrize("row", [PAIR, HH, TASK, {"messages": CHAT}, {"prompt": "a"}])
def test_converted_data_is_the_same_data(row: Any, perl: Any, tmp_path: Path, write: Any) -> None:
    path, out = write(tmp_path / "a.jsonl", [row]), tmp_path / "out.jsonl"
    perl("data", "convert", path, "--output", out)
    given = [settings.build(settings.DataConvert, {"file": str(file)}) for file in (path, out)]
    (one, first), (other, second) = (data_file.load(each, None, chat=True) for each in given)
    assert (one, first.rows, first.report.fingerprint) == (other, second.rows, second.report.fingerprint)


def test_convert_reports_what_it_dropped(perl: Any, tmp_path: Path, write: Any) -> None:
    path = write(tmp_path / "a.jsonl", [PAIR, {**PAIR, "chosen": "c"}])
    assert "2 rows read, 1 kept; dropped 1 with equal answers (row 2)" in perl("data", "convert", path).stdout
    assert len((tmp_path / "a-trl.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("a.jsonl", "a.jsonl is also the input file"),
        ("there.jsonl", "there.jsonl already exists\nHint: use --overwrite"),
        ("x.csv", "--output must end in .jsonl, not 'x.csv'"),
        ("no/x.jsonl", "the folder no does not exist"),
        ("folder.jsonl", "folder.jsonl is a folder"),
    ],
)
def test_convert_overwrites_nothing(name: str, told: str, perl: Any, tmp_path: Path, write: Any) -> None:
    path = write(tmp_path / "a.jsonl", [PAIR])
    (tmp_path / "there.jsonl").write_text("mine")
    (tmp_path / "folder.jsonl").mkdir()
    assert told in perl("data", "convert", path, "--output", name, code=2).stderr
    assert (tmp_path / "there.jsonl").read_text() == "mine"
    assert {entry.name for entry in tmp_path.iterdir()} == {"a.jsonl", "there.jsonl", "folder.jsonl"}


def test_convert_replaces_a_file_when_asked(perl: Any, tmp_path: Path, write: Any) -> None:
    path = write(tmp_path / "a.jsonl", [PAIR])
    (tmp_path / "there.jsonl").write_text("mine")
    perl("data", "convert", path, "-o", "there.jsonl", "--overwrite")
    assert json.loads((tmp_path / "there.jsonl").read_text()) == PAIR


def test_nothing_is_left_where_writing_fails(perl: Any, tmp_path: Path, write: Any, monkeypatch: Any) -> None:
    path = write(tmp_path / "a.jsonl", [PAIR])
    monkeypatch.setattr("perlcli.run.files.os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space")))
    perl("data", "convert", path, "-o", "out.jsonl", code=1)
    assert {entry.name for entry in tmp_path.iterdir()} == {"a.jsonl"}


def test_the_commands_of_data_are_declared_like_the_others(perl: Any) -> None:
    for name, stage in settings.DATA_COMMANDS.items():
        found = perl(*name.split(), "--help").stdout
        assert f"{name} [OPTIONS] FILE\n" in found
        for item in settings.options(stage):
            assert (item.name.upper() if item.argument else f"--{settings.dashed(item.name)}") in found
            assert item.help.endswith(".") and (item.default is not None or item.unset or item.argument)
    assert "check" in perl("data", "--help").stdout


def test_a_format_and_limits_are_given_as_to_the_stages(perl: Any, tmp_path: Path) -> None:
    rows = [
        {
            "post_id": "p",
            "history": "how?",
            "human_ref_A": "so",
            "human_ref_B": "no",
            "labels": 1,
            "score_A": a,
            "score_B": 2,
            "score_ratio": a / 2,
        }
        for a in (10, 3)
    ]
    path = tmp_path / "shp.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "2 rows read, 1 kept" in perl("data", "check", path, "--shp-score-ratio", "2").stdout
    out = tmp_path / "out.jsonl"
    perl("data", "convert", path, "--output", out, "--shp-score-ratio", "2")
    assert len(out.read_text().splitlines()) == 1
    told = perl("data", "check", path, "--data-format", "hh", code=2).stderr
    assert "Error: " in told and "hh" in told


@pytest.mark.parametrize("command", ["show", "convert"])
def test_standard_input_serves_one_stage(command: str, perl: Any) -> None:
    words = ("--output", "out.jsonl") if command == "convert" else ()
    told = perl("data", command, "-", *words, code=2).stderr
    assert "Error: Standard input can be read only once" in told and "--for" in told
