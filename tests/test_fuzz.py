"""Any file content and any word on the command line either works or gives one clear error, within seconds.

The examples are the same in every run. `PERLCLI_FUZZ=100 pytest -n0 tests/test_fuzz.py` tries a hundred times as many,
and different ones each time.
"""

import csv
import dataclasses
import gzip
import io
import json
import os
import shutil
import signal
import sys
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given
from hypothesis import settings as profile
from hypothesis import strategies as st
from typer.testing import CliRunner

from perlcli import coffee, data, recipes, settings
from perlcli.cli import binding
from perlcli.cli.app import app
from perlcli.commands import data_convert
from perlcli.data.examples import EXAMPLES
from perlcli.data.formats import NAMES
from perlcli.errors import PerlError
from perlcli.model import sources, tokenizers, weights
from perlcli.run.record import RunRecord
from perlcli.settings import DataSettings
from perlcli.settings.yaml import read_config

DEPTH = int(os.environ.get("PERLCLI_FUZZ", "1"))
SECONDS = 20.0  # of CPU time for one example, which normally takes milliseconds
LONGEST = 30_000  # characters of an error: a few lines, with shortened values

Value = Any
Strategy = st.SearchStrategy[Any]


def examples(count: int) -> Any:
    """A profile with this many examples, the same each time."""
    checks = list(HealthCheck)
    same = DEPTH == 1
    return profile(
        max_examples=count * DEPTH, derandomize=same, database=None, deadline=None, suppress_health_check=checks
    )


@contextmanager
def in_time() -> Iterator[None]:
    def ring(*_: object) -> None:
        pytest.fail(f"took longer than {SECONDS:g} s")

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def works_or_gives_an_error(action: Callable[[], object]) -> None:
    """Run something that must succeed or raise a PerlError of reasonable length."""
    with in_time():
        try:
            action()
        except PerlError as error:
            assert error.problem.strip()
            assert len(str(error)) < LONGEST


def exits_cleanly(*words: object, stdin: bytes | None = None) -> None:
    """Call the command line, which must end with a known exit code and without a traceback."""
    with in_time():
        result = CliRunner().invoke(app, [str(word) for word in words], input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code in (0, 1, 2)
    assert "Traceback" not in result.output
    assert "please report it" not in result.output, result.output


def json_values(text: Strategy) -> Strategy:
    """Any value that JSON can express."""
    plain = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from([10**400, 2**63, -(10**400)]), text
    )

    def nested(inner: Strategy) -> Strategy:
        return st.one_of(st.lists(inner, max_size=3), st.dictionaries(text, inner, max_size=3))

    return st.recursive(plain, nested, max_leaves=6)


def places(value: Value, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all items inside a value."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield (*at, key)
        yield from places(value[key], (*at, key))


def put(value: Value, at: tuple[Any, ...], new: Value) -> Value:
    """The value with another one at a path."""
    if not at:
        return new
    changed = dict(value) if isinstance(value, dict) else list(value)
    changed[at[0]] = put(changed[at[0]], at[1:], new)
    return changed


@st.composite
def damaged(draw: Any, value: Value, other: Strategy) -> Value:
    """A value with one or two items replaced by others."""
    for _ in range(draw(st.integers(1, 2))):
        inside = list(places(value))
        value = put(value, draw(st.sampled_from(inside)) if inside else (), draw(other))
    return value


def corrupted(content: bytes) -> Strategy:
    """The bytes with some removed or replaced."""

    def cut(start: int, count: int, new: bytes) -> bytes:
        return content[:start] + new + content[start + count :]

    return st.builds(cut, st.integers(0, len(content)), st.integers(0, 5), st.binary(max_size=5))


DEEP = "[" * 5000
NAME_WORDS = ("", "a", "\0", "\ud800", "~nobody-has-this-name/x", "x" * 300, "x/" * 3000, "../..", "\x1b[31m")
VALUE_WORDS = ("nan", "inf", "1e400", "1_0", "auto", "none", "=", "a=b", "1,2", "{}", DEEP)
WORDS = [*NAME_WORDS, *VALUE_WORDS]

# --- settings

TEXTS = st.one_of(st.text(max_size=12), st.sampled_from(WORDS))
STAGES = st.sampled_from(list(settings.ALL_COMMANDS.values()))
ANY_YAML = st.one_of(json_values(TEXTS), st.dates(), st.datetimes(), st.binary(max_size=5))
ANCHORS = ("a: &a [*a]\n", "a: &a {b: *a}\n", "&a ", "*a", "<<: [1]", "<<: {a: 1}")
TAGS = (
    "!!python/object:os.system {}",
    "!!int _",
    "!!float ''",
    "!!timestamp x",
    "!!binary x",
    "!!set {a}",
    "!!omap [a]",
)
SCALARS = ("1:99:1", '"\\UFFFFFFFF"', '"\\ud800"', "2024-13-45", "2001-12-14t25:59:43-99:99", "0x" + "f" * 5000)
NESTED = ("{" * 3000, DEEP, "- " * 3000, "? [a]\n: b", "--- 1\n--- 2", "%YAML 9.9\n")
KEYS = ("seed", "seed: ", "lora-r: 1\nlora_r: 2\n", "sft:\n  ", "model: ")
MARKS = ("{", "}", "[", "]", ",", "\n", "\t", "'", '"', "|", ">", "#", "\ufeff", "\x85", "\u2028")
PIECES = [*ANCHORS, *TAGS, *SCALARS, *NESTED, *KEYS, *MARKS]
ANY_TEXT = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(PIECES), max_size=6).map("".join))
NUMBERS = [0, -1, 1, 2**31, 2**64, 10**400, 1e308, "1e-4", "nan", "-inf"]


def of_type(kind: Any) -> Strategy:
    """Values of an annotated type, including strange ones."""
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return st.sampled_from(inside)
    if origin in (types.UnionType, typing.Union):
        return st.one_of(*map(of_type, inside))
    if origin in (tuple, list):
        return st.lists(of_type(inside[0]), max_size=3)
    numbers = st.one_of(st.integers(1, 64), st.sampled_from(NUMBERS))
    known = {
        int: numbers,
        float: st.one_of(st.floats(), numbers),
        bool: st.booleans(),
        str: TEXTS,
        type(None): st.none(),
    }
    return known.get(kind, ANY_YAML)


@st.composite
def near_settings(draw: Any, stage: Any) -> dict[Any, Any]:
    """Names of a stage's options, some misspelt, most with values of the option's type."""
    values = {}
    for item in draw(st.lists(st.sampled_from(list(settings.options(stage))), max_size=4)):
        name = draw(st.sampled_from([item.name] * 5 + [item.name.replace("_", "-"), item.name + "x"]))
        values[name] = draw(of_type(item.type) if draw(st.integers(0, 3)) else ANY_YAML)
    return values | draw(st.one_of(st.just({}), st.just({}), st.dictionaries(st.one_of(TEXTS, st.dates()), ANY_YAML)))


def resolve(stage: Any, path: Path) -> None:
    """What each command does first with its settings."""
    given_values = settings.build(stage, recipes.fill(stage, read_config(stage, path)))
    resolved = settings.resolve(given_values, {})
    settings.check(resolved)
    settings.flat(resolved)


@pytest.mark.slow
@examples(150)
@given(STAGES, st.data())
def test_any_value_of_any_option(stage: Any, drawn: st.DataObject) -> None:
    content = yaml.safe_dump(drawn.draw(near_settings(stage)), allow_unicode=True)
    Path("run.yaml").write_bytes(content.encode("utf-8", "surrogatepass"))
    works_or_gives_an_error(lambda: resolve(stage, Path("run.yaml")))


@pytest.mark.slow
@examples(120)
@given(STAGES, st.one_of(st.binary(max_size=60), ANY_TEXT.map(lambda text: text.encode("utf-8", "surrogatepass"))))
@example(settings.Sft, "".join(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9 if n else 1}]\n" for n in range(20)).encode())
@example(
    settings.Sft,
    "".join(f"a{n}: &a{n} {{<<: [{f'*a{n - 1}, ' * 9 if n else ''}], k{n}: 1}}\n" for n in range(20)).encode(),
)
@example(settings.Sft, ("seed: 1" + ":1" * 20_000).encode())
@example(settings.Sft, b"".join(b"k%d: 1\n" % number for number in range(3000)))
@example(settings.Sft, b"a" * 10**6)
def test_any_bytes_as_a_settings_file_or_recipe(stage: Any, content: bytes) -> None:
    Path("run.yaml").write_bytes(content)
    works_or_gives_an_error(lambda: resolve(stage, Path("run.yaml")))
    works_or_gives_an_error(lambda: recipes.read("run.yaml"))
    works_or_gives_an_error(lambda: recipes.text("run.yaml"))


@pytest.fixture(scope="module")
def configs() -> dict[Any, Any]:
    """The TRL config of each stage."""
    from trl import RewardConfig, RLOOConfig, SFTConfig

    return {settings.Sft: SFTConfig, settings.Reward: RewardConfig, settings.Rl: RLOOConfig}


@examples(60)
@given(drawn=st.data())
def test_any_value_of_any_field_of_a_trl_config(configs: dict[Any, Any], drawn: st.DataObject) -> None:
    from perlcli.training.trl_config import overrides, trl_config

    stage = drawn.draw(st.sampled_from(list(configs)))
    kinds = typing.get_type_hints(configs[stage])
    names = st.sampled_from([item.name for item in dataclasses.fields(configs[stage])])
    items = []
    for name in drawn.draw(st.lists(names, max_size=3)):
        value = drawn.draw(of_type(kinds[name]) if drawn.draw(st.booleans()) else ANY_YAML)
        items.append(f"{name}={yaml.safe_dump(value, default_flow_style=True)}")
    items += drawn.draw(st.lists(st.one_of(ANY_TEXT, ANY_TEXT.map("run_name={}".format)), max_size=2))
    works_or_gives_an_error(lambda: overrides(tuple(items), configs[stage], set()))
    # deepspeed and fsdp would set up processes
    given_items = tuple(item for item in items if "deepspeed" not in item and "fsdp" not in item)
    built = settings.resolve(settings.Sft() if stage is settings.Sft else stage(), {})
    built = dataclasses.replace(built, train=dataclasses.replace(built.train, set=given_items))
    works_or_gives_an_error(lambda: trl_config(configs[stage], built, {}))


IN_WORDS = [
    (stage, item)
    for stage in settings.ALL_COMMANDS.values()
    for item in settings.options(stage)
    if item.type in (str, str | None) or typing.get_origin(item.type) is tuple
]
LISTS = ["--5", "²", "1,²", "٣", "9" * 5000, "1," * 50, "-", "1,,2", "1e5", "-1,1_0"]


@examples(150)
@given(st.sampled_from(IN_WORDS), st.one_of(TEXTS, st.sampled_from(LISTS)))
def test_any_word_as_the_value_of_a_command_line_option(option: tuple[Any, Any], text: str) -> None:
    stage, item = option
    value = [text] if item.type == tuple[str, ...] else text
    works_or_gives_an_error(lambda: binding._settings(stage, None, {item.name: value}, None))


@pytest.mark.parametrize(
    "words", ["--lora-r 1,²", "--gpu 999999999999999999999999999", "--gpu " + "9" * 400, "--arms ²"]
)
def test_lists_and_sizes_of_an_estimate(words: str) -> None:
    exits_cleanly("estimate", "sft", *words.split())


# --- data

CHAT_TEXTS = ("\n\nHuman: hi\n\nAssistant: good", "user", "assistant", "api_call", "request")
STRANGE_TEXTS = ("", "a", "\ud800", "\0", "x " * 60, "nan", "1", DEEP)
JSON_TEXTS = (
    '[{"role": "user", "text": "\\ud800"}]',
    '[{"role": "user", "api": ' + "[" * 600 + "]" * 600 + "}]",
    '{"role": "agent", "text": ' + "9" * 5000 + "}",
)
ROW_TEXTS = st.one_of(st.text(max_size=12), st.sampled_from([*CHAT_TEXTS, *STRANGE_TEXTS, *JSON_TEXTS]))
ANY_JSON = json_values(ROW_TEXTS)
ASKED, SAID = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
ROWS: list[dict[str, Any]] = [
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"chosen": "\n\nHuman: hi\n\nAssistant: good", "rejected": "\n\nHuman: hi\n\nAssistant: bad"},
    {"prompt": [ASKED], "chosen": [SAID], "rejected": [{**SAID, "content": "c"}]},
    {"chosen": [ASKED, SAID], "rejected": [ASKED, {**SAID, "content": "c"}]},
    {"prompt": "a", "completion": "b", "label": 1},
    {"prompt": [ASKED], "completion": [SAID]},
    {"prompt": "a", "order": {"item": "latte"}},
    {"text": "a"},
    {"messages": [ASKED, SAID]},
    {"context": '[{"role": "user", "text": "x"}]', "generation": '{"role": "agent", "api": {"a": {}}}', "reward": 1},
    {"context": [{"role": "user", "text": "x"}], "generation": {"role": "agent", "text": "b"}, "reward": "0.0"},
    {"post_id": "p", "history": "a", "human_ref_A": "b", "human_ref_B": "c", "labels": 1, "score_A": 4, "score_B": 2},
    {"info": {"post": "p", "title": "t", "subreddit": "s"}, "summaries": [{"text": "b"}, {"text": "c"}], "choice": 0},
    {"goal": "a", "history": ["x", {"y": 1}], "screen": "s", "action": {"action_type": "wait"}, "label": 1},
    {"instruction": "a", "input": "i", "output": "b"},
    {"subreddit": "a", "title": "b", "post": "c", "summary": "d"},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {
        "utterances": [
            {
                "speaker": "user",
                "text": "a",
                "annotations": [{"name": "api_call", "value": "f"}, {"name": "request", "value": "{}"}],
            },
            {"speaker": "ASSISTANT", "text": "b", "apis": [{"name": "n", "args": {"a": 1}, "response": {"b": 2}}]},
        ]
    },
]
ROWS += [row for rows in EXAMPLES.values() for row in rows]
NEAR_ROWS = st.sampled_from(ROWS).flatmap(lambda row: damaged(row, ANY_JSON))
USES = st.sampled_from(["sft", "reward", "rl"])


@pytest.fixture(scope="module")
def render() -> data.Renderer:
    """The renderer of the embedded base."""
    source = sources.locate(None)
    return tokenizers.renderer(source, tokenizers.load_tokenizer(source))


def use(source: str, stage: Any, render: data.Renderer, how: DataSettings, *, chat: bool) -> None:
    """What the commands do with data: load, convert, summarise and fit as tokens."""
    from perlcli.commands.data_file import fitting

    loaded = data.load(source, stage, chat=chat, options=how)
    for row in loaded.rows:
        json.dumps(data_convert.as_trl(row), ensure_ascii=False, default=str).encode()
    json.dumps(loaded.report.summary())
    data.prompts(loaded)
    made = fitting(loaded.report, stage, render, settings.LengthSettings(40, how.on_long, 8))
    for _ in made.take(list(zip(loaded.numbers, loaded.rows, strict=True))):
        pass
    made.end()
    "\n".join(loaded.report.lines()).encode()


@pytest.mark.slow
@examples(250)
@given(row=NEAR_ROWS, stage=USES, chat=st.booleans(), on_long=st.sampled_from(["drop", "truncate"]))
def test_any_value_in_a_row_of_any_format(
    row: Value, stage: Any, chat: bool, on_long: Any, render: data.Renderer
) -> None:
    Path("rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    works_or_gives_an_error(lambda: use("rows.jsonl", stage, render, DataSettings(on_long=on_long), chat=chat))


def spelled(rows: list[Value], kind: str) -> tuple[str, bytes]:
    """The rows as a file of this kind: its name and content."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    listed = json.dumps(rows, ensure_ascii=False)
    table = io.StringIO()
    for row in rows:
        csv.writer(table).writerow([*row, *map(json.dumps, row.values())] if isinstance(row, dict) else [row])
    return {
        "lines": ("a.jsonl", lines.encode()),
        "list": ("a.json", listed.encode("utf-8", "surrogatepass")),
        "UTF-16": ("a.json", listed.encode("utf-16", "surrogatepass")),
        "mark": ("a.json", b"\xef\xbb\xbf" + json.dumps(rows, indent=1).encode()),
        "returns": ("a.jsonl", lines.replace("\n", "\r\n\r").encode()),
        "gzip": ("a.jsonl.gz", gzip.compress(lines.encode(), mtime=0)),
        "table": ("a.csv", table.getvalue().encode("utf-8", "surrogatepass")),
    }[kind]


KINDS = st.sampled_from(["lines", "list", "UTF-16", "mark", "returns", "gzip", "table"])
VALID_FILES = st.builds(spelled, st.lists(st.one_of(st.sampled_from(ROWS), NEAR_ROWS, ANY_JSON), max_size=4), KINDS)
CORRUPTED_FILES = VALID_FILES.flatmap(lambda file: st.tuples(st.just(file[0]), corrupted(file[1])))
ANY_FILES = st.tuples(st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.csv.gz", "a.parquet"]), st.binary(max_size=60))
LONG_WORDS = {"chosen": "x" * 50_000 + " a", "rejected": "x" * 50_000 + " b"}
FORMATS = st.sampled_from([None] * 8 + sorted(NAMES))


@pytest.mark.slow
@examples(200)
@given(
    file=st.one_of(VALID_FILES, CORRUPTED_FILES, ANY_FILES), stage=USES, name=FORMATS, ratio=st.sampled_from([None, 2])
)
@example(file=("a.csv", ",".join(map(str, range(30_000))).encode()), stage="sft", name=None, ratio=None)
@example(file=("a.jsonl", json.dumps(LONG_WORDS).encode()), stage="rl", name=None, ratio=None)
@example(file=("a.jsonl", b'{"prompt": "a", "x": ' + b"[" * 700 + b"]" * 700 + b"}"), stage="rl", name=None, ratio=None)
@example(file=("a.json.gz", gzip.compress(b"[" + b"9" * 10**8, mtime=0)), stage="rl", name=None, ratio=None)
def test_any_bytes_as_a_data_file(
    file: tuple[str, bytes], stage: Any, name: str | None, ratio: float | None, render: data.Renderer
) -> None:
    Path(file[0]).write_bytes(file[1])
    how = DataSettings(data=file[0], data_format=name, shp_score_ratio=ratio, shp_per_post=1 if ratio else None)
    works_or_gives_an_error(lambda: use(file[0], stage, render, how, chat=True))


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """The files of a Parquet table and of a folder that datasets saved."""
    import datasets

    folder = tmp_path_factory.mktemp("tables")
    rows = datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3)
    rows.save_to_disk(str(folder / "saved"))
    (folder / "parquet").mkdir()
    rows.to_parquet(str(folder / "parquet" / "train.parquet"))
    return {kind.name: {path.name: path.read_bytes() for path in kind.iterdir()} for kind in folder.iterdir()}


@examples(40)
@given(drawn=st.data())
def test_any_damage_to_a_table(
    tables: dict[str, dict[str, bytes]], render: data.Renderer, drawn: st.DataObject
) -> None:
    files = tables[drawn.draw(st.sampled_from(sorted(tables)))]
    shutil.rmtree("table", ignore_errors=True)
    Path("table").mkdir()
    broken = drawn.draw(st.sampled_from(sorted(files)))
    content = files[broken]
    other = (
        damaged(json.loads(content), ANY_JSON).map(json.dumps).map(str.encode)
        if broken.endswith("json")
        else st.nothing()
    )
    for name in files:
        Path("table", name).write_bytes(
            files[name] if name != broken else drawn.draw(st.one_of(corrupted(content), other))
        )
    works_or_gives_an_error(lambda: use("table", "reward", render, DataSettings(), chat=True))


# --- folders of runs, models and adapters


def record_of_a_run() -> dict[str, Any]:
    """The record of a finished run."""
    values = settings.flat(settings.resolve(settings.Reward(), {}))
    record = RunRecord(
        command="reward",
        status="finished",
        started="2026-01-01T00:00:00+00:00",
        elapsed_seconds=3.0,
        settings=values,
        process={"pid": 1, "started": "x", "host": "y"},
        versions={"perlcli": "1"},
        steps=3,
        tokens=30,
        device={"name": "cpu", "type": "cpu", "threads": 1, "precision": "float32"},
        trainable_parameters=4,
        model={"name": "m", "base": "b", "adapter": None, "architecture": "L", "fingerprint": "f", "tokenizer": "t"},
        data={"train": {"source": "x", "format": "pairs", "read": 3, "kept": 3, "fingerprint": "q", "tokens": {}}},
        total_parameters=100,
        memory={"training_mb": 3.0},
        files={"weights": 10, "optimizer": 20},
        notes=["x"],
        metrics={"accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6, "rows": 10, "seconds_learn": 1.0},
    )
    return json.loads(json.dumps(dataclasses.asdict(record)))


RECORD = record_of_a_run()
STEPS = [{"step": n, "loss": 1.0, "seconds/step": 0.5, "seconds/step_cpu": 0.4, "num_tokens": 9 * n} for n in (1, 2, 3)]
AS_BYTES = st.one_of(st.binary(max_size=30), json_values(TEXTS).map(json.dumps).map(str.encode), st.just(DEEP.encode()))
RECORDS = st.one_of(*[damaged(RECORD, json_values(TEXTS)).map(json.dumps).map(str.encode)] * 3, AS_BYTES)


def write_run(folder: Path, record: bytes, rows: Value) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "record.json").write_bytes(record)
    lines = "".join(json.dumps(row) + "\n" for row in rows) if isinstance(rows, list) else str(rows)
    (folder / "metrics.jsonl").write_bytes(lines.encode("utf-8", "surrogatepass"))


@examples(50)
@given(record=RECORDS, rows=st.one_of(st.just(STEPS), damaged(STEPS, json_values(TEXTS))))
def test_any_damage_to_a_run(record: bytes, rows: Value) -> None:
    from perlcli.commands import report, runs

    write_run(Path("runs/intact"), json.dumps(RECORD).encode(), STEPS)
    write_run(Path("runs/broken"), record, rows)
    for words in ({"dir": "runs"}, {"dir": "runs", "json": True}):
        works_or_gives_an_error(lambda words=words: runs.run(settings.build(settings.Runs, words)))
    for folders in (("runs/broken",), ("runs/broken", "runs/intact")):
        works_or_gives_an_error(lambda given=folders: report.run(settings.build(settings.Report, {"run": given})))


SLOW_EXPRESSIONS = (r"(.*)*x", r"(\w+\.?)+!", ".*" * 12 + "x")
EXPRESSIONS = [*SLOW_EXPRESSIONS, "(", "[", "*", r".*q_proj", "(?:", "\\", "all-linear", "q_proj"]
ADAPTER = {
    "peft_type": "LORA",
    "base_model_name_or_path": str(coffee.BASE),
    "r": 4,
    "lora_alpha": 8,
    "task_type": "CAUSAL_LM",
    "target_modules": ["q_proj"],
    "lora_dropout": 0.0,
    "bias": "none",
    "init_lora_weights": True,
    "rank_pattern": {"a": 1},
}
CONFIG_VALUES = st.one_of(json_values(st.one_of(TEXTS, st.sampled_from(EXPRESSIONS))), st.sampled_from(EXPRESSIONS))


@pytest.fixture(scope="module")
def skeleton() -> Any:
    """The embedded base without its weights."""
    return sources.skeleton(sources.locate(None))


@examples(40)
@given(drawn=st.data())
@pytest.mark.filterwarnings("ignore")  # from peft, about values that it accepts anyway
def test_any_content_of_a_peft_file(skeleton: Any, drawn: st.DataObject) -> None:
    from perlcli.model import adapters

    kind = drawn.draw(st.sampled_from([*adapters.KINDS, "ADALORA", "X"]))
    values = (
        {**ADAPTER, "peft_type": kind} if kind == "LORA" else {"peft_type": kind, "r": 4, "target_modules": ["q_proj"]}
    )
    near = damaged(values, CONFIG_VALUES).map(json.dumps).map(str.encode)
    Path("peft.json").write_bytes(drawn.draw(st.one_of(near, near, near, AS_BYTES)))
    lora = settings.LoraSettings(peft="peft.json")
    works_or_gives_an_error(
        lambda: adapters.try_on(lora, skeleton, drawn.draw(st.sampled_from(["CAUSAL_LM", "SEQ_CLS"])))
    )


def look_at_model(folder: str) -> None:
    """What every command reads from a model before its weights."""
    source = sources.locate(folder)
    tokenizer = tokenizers.load_tokenizer(source)
    tokenizers.describe(source, tokenizer)
    tokenizers.score_pad(source)
    tokenizers.renderer(source, tokenizer).prompt_ids("a")


@examples(40)
@given(drawn=st.data())
@pytest.mark.filterwarnings("ignore")  # from transformers, about values that it accepts anyway
def test_any_damage_to_a_model_or_an_adapter(drawn: st.DataObject) -> None:
    files = {path.name: path.read_bytes() for path in coffee.BASE.iterdir() if path.suffix != ".md"}
    broken = drawn.draw(st.sampled_from([*sorted(files), *[weights.ADAPTER_CONFIG] * 3]))
    content = files.get(broken, json.dumps(ADAPTER).encode())
    shutil.rmtree("model", ignore_errors=True)
    Path("model").mkdir()
    for name in files if broken in files else ():
        Path("model", name).symlink_to(coffee.BASE / name)
    near = [corrupted(content[:200]).map(lambda start: start + content[200:])]
    if broken.endswith(".json") and broken != "tokenizer.json":
        near += [damaged(json.loads(content), CONFIG_VALUES).map(json.dumps).map(str.encode)] * 2
    Path("model", broken).unlink(missing_ok=True)
    Path("model", broken).write_bytes(drawn.draw(st.one_of(*near, AS_BYTES)))
    works_or_gives_an_error(lambda: look_at_model("model"))


# --- complete commands


@pytest.mark.slow
@examples(20)
@given(drawn=st.data())
def test_commands_on_any_row_exit_cleanly(drawn: st.DataObject) -> None:
    row = drawn.draw(NEAR_ROWS)
    Path("rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    commands = [
        ["data", "check", "rows.jsonl"],
        ["data", "show", "rows.jsonl"],
        ["data", "convert", "rows.jsonl", "--overwrite"],
        ["data", "show", "-", "--for", "sft"],
        ["reward", "--dry-run", "--data", "rows.jsonl"],
    ]
    words = drawn.draw(st.sampled_from(commands))
    exits_cleanly(*words, stdin=Path("rows.jsonl").read_bytes())


@pytest.mark.skipif(sys.platform == "win32", reason="paths of Unix")
@pytest.mark.parametrize("word", ["~nobody-has-this-name/x", "x" * 300, "/dev/null/x", "\udcff"])
@pytest.mark.parametrize("option", ["--data", "--model", "--output", "--config", "--recipe", "--peft"])
def test_a_word_that_cannot_be_a_path(option: str, word: str) -> None:
    exits_cleanly("sft", "--dry-run", option, word)
