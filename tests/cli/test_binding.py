"""The command line and YAML as settings, and the boundary where errors become lines and exit codes."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from perlcli import settings, upstream
from perlcli.cli.binding import Group, command
from perlcli.errors import Interrupted, PerlError, RunFailed
from perlcli.run.lifecycle import write_settings
from perlcli.settings import ALL_COMMANDS, COMMANDS, build, flat
from perlcli.settings.yaml import read_config

Action = Callable[[Any], None]


def call(action: Action, *words: object, stage: str = "sft") -> Result:
    """Run a command line of an app whose only stage does `action` with the settings."""
    app = typer.Typer(cls=Group, pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    command(app, stage, action)
    return CliRunner().invoke(app, [stage, *map(str, words)])


def given(*words: object, stage: str = "sft") -> dict[str, Any]:
    """What a command line sets: the values that are not their option's default."""
    found: list[Any] = []
    result = call(found.append, *words, stage=stage)
    assert result.exit_code == 0, result.output
    (values,) = map(flat, found)
    defaults = flat(ALL_COMMANDS[stage]())
    return {name: value for name, value in values.items() if value != defaults[name]}


def plain(text: str) -> str:
    """Text without colours, boxes and line breaks."""
    return " ".join(re.sub(r"\x1b\[[\d;]*m", "", text).replace("│", " ").split())


def raising(error: BaseException) -> Action:
    def action(_: Any) -> None:
        raise error

    return action


@pytest.fixture
def config(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a YAML file."""

    def write(text: str) -> Path:
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
        return tmp_path / "run.yaml"

    return write


def test_nothing_given_sets_nothing() -> None:
    assert given() == {}


@pytest.mark.parametrize("words", [["--lora-r", "8"], ["--lora-r=8"], ["--lora_r", "8"], ["--lora_r=8"]], ids=" ".join)
def test_dashes_and_underscores_both_work(words: list[str]) -> None:
    assert given(*words) == {"lora_r": 8}


def test_underscores_in_a_value_stay() -> None:
    words = ["--set=lr_scheduler_type=cosine", "--set", "warmup_steps=2", "--model=my_model", "--data", "a_b.jsonl"]
    assert given(*words) == {
        "set": ("lr_scheduler_type=cosine", "warmup_steps=2"),
        "model": "my_model",
        "data": "a_b.jsonl",
    }


def test_short_forms(config: Callable[[str], Path]) -> None:
    words = ["-m", "base", "-d", "rows.jsonl", "-o", "runs/x", "-c", config("seed: 4")]
    assert given(*words) == {"model": "base", "data": "rows.jsonl", "output": "runs/x", "seed": 4}


def test_an_argument_stands_anywhere_or_in_a_config(config: Callable[[str], Path]) -> None:
    for words in (["runs/my_rl", "-o", "out"], ["-o", "out", "runs/my_rl"]):
        assert given(*words, stage="merge") == {"adapter": "runs/my_rl", "output": "out"}
    path = config("adapter: runs/rl\noutput: out")
    assert given("--config", path, stage="merge") == {"adapter": "runs/rl", "output": "out"}
    assert given("runs/sft", "--config", path, stage="merge") == {"adapter": "runs/sft", "output": "out"}
    assert given(stage="merge") == {}


def test_a_flag_can_be_taken_back(config: Callable[[str], Path]) -> None:
    assert given("--config", config("full: true"), "--no-full") == {}
    assert given("--full") == {"full": True}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["--lora-r", "many"],
            "Error: --lora-r must be a whole number, not 'many' Hint: perl sft --help lists the options",
        ),
        (
            ["--dtype", "float8"],
            "Error: --dtype must be one of auto, bfloat16, float16, float32, not 'float8' Hint: Did you mean float32?",
        ),
        (["--lora-rr", "8"], "Error: No such option: --lora-rr Hint: Did you mean --lora-r?"),
        (["--seed"], "requires an argument"),
    ],
)
def test_a_wrong_command_line_is_told_with_exit_code_2(words: list[str], told: str) -> None:
    result = call(lambda _: None, *words)
    assert result.exit_code == 2
    assert told in plain(result.output)


@pytest.mark.parametrize("text", ["lora_r: 8\nlearning-rate: 1e-4", "lora-r: 8\nlearning_rate: 0.0001"])
def test_a_config_has_the_names_of_the_options(text: str, config: Callable[[str], Path]) -> None:
    assert given("--config", config(text)) == {"lora_r": 8, "learning_rate": 1e-4}


def test_the_command_line_wins_over_the_config(config: Callable[[str], Path]) -> None:
    path = config("lora_r: 8\nseed: 2\nset: [a=1]")
    assert given("--config", path, "--lora-r", 4, "--set", "b=2") == {"lora_r": 4, "seed": 2, "set": ("a=1", "b=2")}
    assert given("--config", path, "--set", "a=3")["set"] == ("a=3",)


def test_a_config_may_hold_every_kind_of_value(config: Callable[[str], Path]) -> None:
    text = "full: true\ndtype: bfloat16\nnum_train_epochs: 2\nset: [warmup_steps=2]\nmax_steps: null\nmodel: ünï"
    assert given("--config", config(text)) == {
        "full": True,
        "dtype": "bfloat16",
        "num_train_epochs": 2.0,
        "set": ("warmup_steps=2",),
        "model": "ünï",
    }


@pytest.mark.parametrize("weight", ["2.5", "auto", "'2.5'", "3"])
def test_a_config_takes_pos_weight_as_word_or_number(weight: str, config: Callable[[str], Path]) -> None:
    values = read_config(settings.Reward, config(f"pos_weight: {weight}"))
    assert str(values["pos_weight"]) == weight.strip("'")


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "---\n"])
def test_an_empty_config_sets_nothing(text: str, config: Callable[[str], Path]) -> None:
    assert read_config(settings.Sft, config(text)) == {}


def bomb(value: str) -> str:
    """YAML of some lines whose last value holds 9 ** 20 others."""
    lines = [f"a0: &a0 {value.format('')}"]
    lines += [f"a{n}: &a{n} {value.format(', '.join([f'*a{n - 1}'] * 9))}" for n in range(1, 20)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("learning_rat: 1", "unknown key: learning_rat. Did you mean learning_rate?"),
        ("beta: 0.1", "unknown key: beta."),
        ("3: 4", "unknown key: 3."),
        ("config: other.yaml", "unknown key: config."),
        ("lora_r: eight", "lora_r must be a whole number, not 'eight'"),
        ("lora_r: 8.5", "lora_r must be a whole number, not 8.5"),
        ("seed: true", "seed must be a whole number, not True"),
        ("full: 1", "full must be true or false, not 1"),
        ("full: null", "full must be true or false, not None"),
        ("dtype: float8", "dtype must be one of auto, bfloat16, float16, float32, not 'float8'"),
        ("set: 1", "set must be text or a list of texts, not 1"),
        ("learning-rate: [1]", "learning-rate must be a number, not [1]"),
        ("model: 2024-01-01", "model must be text, not datetime.date(2024, 1, 1)"),
        ("- lora_r", "must contain `name: value` lines, not a list"),
        ("lora_r", "must contain `name: value` lines, not a str"),
        ("lora_r: [8", "is not valid YAML: while parsing a flow sequence"),
        ("model: 2024-13-45", "is not valid YAML: month must be in 1..12"),
        ("a: !!python/object:os.system {}", "is not valid YAML: could not determine a constructor"),
        ("\tlora_r: 8", "is not valid YAML"),
        ("lora_r: 8\nlora_r: 4", "is not valid YAML: duplicate key: lora_r in"),
        ("lora_r: 8\nlora-r: 4", "duplicate key: lora-r, with dashes and with underscores"),
        ("a: &a [*a]", "is not valid YAML: it contains itself in"),
        ("[" * 10_000, "is not valid YAML: nested too deeply in"),
        ("{" * 10_000, "is not valid YAML: nested too deeply in"),
        ("- " * 10_000, "is not valid YAML: nested too deeply in"),
        (bomb("[{}]"), "is not valid YAML: its aliases expand to too many values in"),
        (bomb("{{<<: [{}]}}"), "is not valid YAML: its aliases expand to too many values in"),
        ("seed: !!int _", "is not valid YAML: string index out of range in"),
        ("seed: !!timestamp x", "is not valid YAML: 'NoneType' object has no attribute"),
        ('model: "\\UFFFFFFFF"', "is not valid YAML: "),
        ("seed: 0x" + "f" * 5000, "seed must be a finite number of at most 9,007,199,254,740,992, not a number"),
        ("learning_rate: 1" + "0" * 400, "learning_rate must be a number, not 1000"),
        ("learning_rate: .inf", "learning_rate must be a finite number of at most"),
        ('model: "a\\0b"', "model must be text without NUL characters, not 'a\\x00b'"),
        ('model: "\\ud800"', "model must be text in UTF-8, not '\\ud800'"),
        ("data: " + "x" * 300, "data is too long for a file name: 'xxx"),
        ("output: ~nobody-has-this-name/x", "output '~nobody-has-this-name/x': there is no such home folder"),
        ("? 0x" + "f" * 5000 + "\n: 1", "unknown key: a number of thousands of digits."),
        ("#" * 100_001, "larger than 100,000 bytes, too large for settings"),
    ],
)
def test_a_wrong_config_is_told_with_its_file(text: str, told: str, config: Callable[[str], Path]) -> None:
    path = config(text)
    result = call(lambda _: None, "--config", path)
    assert result.exit_code == 2
    assert str(path) in result.stderr
    assert told in result.stderr


def test_a_link_that_leads_to_itself_is_told(tmp_path: Path, config: Callable[[str], Path]) -> None:
    Path("loop").symlink_to("loop")
    result = call(lambda _: None, "--config", config("output: loop"))
    assert (result.exit_code, "output 'loop' is a link that leads to itself" in result.stderr) == (2, True)


def test_all_faults_of_a_config_are_told_at_once(config: Callable[[str], Path]) -> None:
    with pytest.raises(PerlError) as caught:
        read_config(settings.Sft, config("lorar: 8\nseed: x\nfull: 2\nmax-steps: 3"))
    assert len(caught.value.problem.splitlines()) == 3
    assert caught.value.hint == "perl sft --help lists the options"


@pytest.mark.parametrize(("name", "told"), [("none.yaml", "No such file or directory"), (".", "Is a directory")])
def test_a_config_that_can_not_be_read_is_told(name: str, told: str, tmp_path: Path) -> None:
    result = call(lambda _: None, "--config", tmp_path / name)
    assert (result.exit_code, result.stderr.splitlines()[0]) == (
        2,
        f"Error: Can't read --config {tmp_path / name}: {told}: {tmp_path / name}",
    )


def test_an_argument_can_be_several(config: Callable[[str], Path]) -> None:
    for words in (["runs/a", "-o", "out", "runs/b_c"], ["-o", "out", "--", "runs/a", "runs/b_c"]):
        assert given(*words, stage="report") == {"run": ("runs/a", "runs/b_c"), "output": "out"}
    path = config("run: [runs/a, runs/b]")
    assert given("--config", path, stage="report") == {"run": ("runs/a", "runs/b")}
    assert given("runs/c", "--config", path, stage="report") == {"run": ("runs/c",)}
    assert given("--config", config("run: runs/a"), stage="report") == {"run": ("runs/a",)}
    assert given(stage="report") == {}


def test_a_config_that_is_not_utf_8_is_told(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes("model: é".encode("latin-1"))
    with pytest.raises(PerlError, match="Can't read --config"):
        read_config(settings.Sft, tmp_path / "run.yaml")


@pytest.mark.parametrize("stage", COMMANDS)
def test_settings_that_were_written_read_back_the_same(stage: str, tmp_path: Path) -> None:
    kind = COMMANDS[stage]
    given = {"overwrite": False, "output": "runs/ü 1"}
    values = flat(settings.resolve(build(kind, given), {"learning_rate": 1e-05, "adapter": "runs/ä"}))
    write_settings(tmp_path / "settings.yaml", values)
    assert flat(build(kind, read_config(kind, tmp_path / "settings.yaml"))) == values


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (PerlError("bad value", "type this"), 2, ["Error: bad value", "Hint: type this"]),
        (PerlError("bad value"), 2, ["Error: bad value"]),
        (RunFailed("it broke", "try that"), 1, ["Error: it broke", "Hint: try that"]),
        (Interrupted("Stopped", "perl … --resume"), 130, ["Stopped: perl … --resume continues."]),
        (Interrupted("Stopped", "perl …", is_saved=False), 130, ["Stopped: perl … starts again."]),
        (KeyboardInterrupt(), 130, ["Stopped."]),
    ],
    ids=["user", "user without hint", "run", "interrupted", "interrupted before it saved", "Ctrl-C"],
)
def test_an_error_is_two_lines_and_an_exit_code(error: BaseException, code: int, lines: list[str]) -> None:
    result = call(raising(error))
    assert (result.exit_code, result.stderr.splitlines(), result.stdout) == (code, lines, "")


def test_upstream_is_hushed_before_a_stage_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    hushed: list[bool] = []
    monkeypatch.setattr(upstream, "hush", lambda: hushed.append(True))
    call(lambda _: hushed.append(False))
    assert hushed == [True, False]


def test_an_error_of_ours_or_upstream_is_one_line_without_traceback() -> None:
    result = call(raising(ValueError("many\n  lines\nof it")))
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        "Error: ValueError: many lines of it",
        "Hint: --debug shows the traceback; please report it if the fault is in perlcli",
    ]


def test_an_error_of_the_system_names_the_file() -> None:
    result = call(raising(PermissionError(13, "Permission denied", "runs/x/record.json")))
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        "Error: Permission denied: runs/x/record.json",
        "Hint: check this path; --debug shows what it was used for",
    ]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("No space left on device (28)")]
)
def test_a_full_disk_says_how_to_go_on(error: Exception) -> None:
    result = call(raising(error))
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        "Error: No space left on device: the run could not be saved",
        "Hint: free some space, then run the same command with --resume (merge, eval: --overwrite)",
    ]


def test_a_read_only_disk_asks_for_another_place() -> None:
    result = call(raising(OSError(30, "Read-only file system", "there/report")))
    assert result.stderr.splitlines() == [
        "Error: Read-only file system: there/report",
        "Hint: choose a folder that you can write to",
    ]


def test_too_little_memory_says_what_takes_less() -> None:
    class OutOfMemoryError(RuntimeError):  # as torch's is called
        pass

    result = call(raising(OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")))
    assert result.exit_code == 1
    error, hint = result.stderr.splitlines()
    assert error == "Error: The GPU's memory is too small (out of memory): 2.15 GB asked for"
    assert hint.startswith("Hint: CUDA_VISIBLE_DEVICES chooses another GPU")
    wrapped = PerlError("The model can't be loaded")  # not a user's error, whatever replaced it
    wrapped.__cause__ = MemoryError()
    assert call(raising(wrapped)).exit_code == 1


def test_debug_shows_the_traceback_of_a_users_error_too() -> None:
    result = call(raising(PerlError("bad value")), "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1] == "Error: bad value"


def test_debug_lets_any_other_error_through() -> None:
    error = ValueError("deep inside")
    assert call(raising(error), "--debug").exception is error


def test_a_reader_that_went_away_is_no_error() -> None:
    code = (
        "import sys, typer\n"
        "from perlcli.cli.binding import with_boundary\n"
        "def write():\n    for _ in range(100000): print('x' * 100)\n"
        "try: with_boundary(write, debug=False)\n"
        "except typer.Exit as end: sys.exit(end.exit_code)"
    )
    with Popen([sys.executable, "-c", code], stdout=PIPE, stderr=PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(20) == 141


def test_anchors_and_merges_that_stay_small_are_read(config: Callable[[str], Path]) -> None:
    text = "model: &name a\ndata: *name"
    assert given("--config", config(text)) == {"model": "a", "data": "a"}
    assert given("--config", config("<<: {seed: 3, lora_r: 2}\nseed: 4")) == {"seed": 4, "lora_r": 2}


@pytest.mark.parametrize("text", ["--5", "²", "1,,2", "1e5", "9" * 5000])
def test_a_list_of_whole_numbers_holds_nothing_else(text: str) -> None:
    result = call(lambda _: None, f"--lora-r={text}", stage="compare-full")
    assert result.exit_code == 2
    assert "--lora-r must be whole numbers, comma-separated, not " in result.stderr


@pytest.mark.parametrize(
    ("word", "text", "fault"),
    [
        ("--lora-r", "x", "must be a whole number, not 'x'"),
        ("--learning-rate", "x", "must be a number, not 'x'"),
        ("--dtype", "fp16", "must be one of auto, bfloat16, float16, float32, not 'fp16'"),
        ("--on-long", "foo", "must be one of drop, truncate, error, not 'foo'"),
    ],
)
def test_a_wrong_value_reads_alike_on_the_command_line_and_in_a_config(
    word: str, text: str, fault: str, config: Callable[[str], Path]
) -> None:
    name = word.removeprefix("--").replace("-", "_")
    path = config(f"{name}: {text}")
    assert call(lambda _: None, word, text).stderr.splitlines()[0] == f"Error: {word} {fault}"
    assert call(lambda _: None, "--config", path).stderr.splitlines()[0] == f"Error: {path}: {name} {fault}"


def test_all_wrong_values_of_a_command_line_are_reported_at_once() -> None:
    result = call(lambda _: None, "--lora-r", "x", "--dtype", "fp16")
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 3)


def test_a_limit_is_checked_in_a_config_too(config: Callable[[str], Path]) -> None:
    path = config("lora_r: 0\nlora_dropout: 1")
    assert call(lambda _: None, "--config", path).stderr.splitlines()[:2] == [
        f"Error: {path}: lora_r must be above 0, not 0",
        f"{path}: lora_dropout must be at least 0 and below 1, not 1.0",
    ]
