"""The commands: what their help says, how fast it comes, and what a wrong option gets."""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

import perlcli
from perlcli import coffee, device, entry, settings
from perlcli.cli.app import app
from perlcli.cli.binding import shown_name
from perlcli.settings import COMMANDS, RUNLESS_COMMANDS, dashed

STAGES = COMMANDS | RUNLESS_COMMANDS
HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "matplotlib", "numpy")
PAIR = {"prompt": "a coffee", "chosen": "here", "rejected": "no"}
EXAMPLE = re.compile(r"perl ([\w-]+)((?: --[\w-]+ \S+)*)")


def perl(*words: object) -> Result:
    return CliRunner().invoke(app, list(map(str, words)), env={"TERMINAL_WIDTH": "160", "COLUMNS": "160"})


def plain(text: str) -> str:
    """Text without colours, boxes and line breaks."""
    return " ".join(re.sub(r"\x1b\[[\d;]*m", "", text).replace("│", " ").split())


def parameters_of(command: str) -> list[Any]:
    """The options of a command, which are made when a command line names it."""
    group: Any = typer.main.get_command(app)
    _, found, _ = group.resolve_command(typer.Context(group), [command])
    return found.params


def start(*words: str) -> list[str]:
    """The command line that runs the console script `perl` and tells which heavy libraries it loaded."""
    code = (
        "import atexit, sys\n"
        "from perlcli.entry import perl\n"
        f"loaded = lambda: print('loaded', *[name for name in {HEAVY} if name in sys.modules], file=sys.stderr)\n"
        "atexit.register(loaded)\n"
        "sys.argv[0] = 'perl'\n"
        "sys.exit(perl())"
    )
    return [sys.executable, "-c", code, *words]


def cpu_seconds(words: list[str], cache: Path) -> float:
    """The CPU time of a process, which other processes on the machine lengthen less than its wall time, with bytecode
    cached as it is after an installation."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(cache)}
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize(
    "words",
    [["--help"], ["rl", "--help"], ["quickstart", "--help"], ["--version"], ["sft", "--nonsense"]],
    ids=" ".join,
)
def test_help_and_usage_load_no_heavy_library(words: list[str]) -> None:
    found = subprocess.run(start(*words), capture_output=True, text=True, check=False)
    assert found.stderr.splitlines()[-1] == "loaded"
    assert found.returncode == (2 if "--nonsense" in words else 0)


PLAIN_APP = """
import typer
app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
@app.command()
def rl(text: str = ""): "One."
@app.command()
def other(text: str = ""): "Two."
app()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("words", "limit"), [(["--help"], 2.75), (["rl", "--help"], 2.0)], ids=["perl", "perl rl"])
def test_help_comes_at_once(words: list[str], limit: float, tmp_path: Path) -> None:
    """As a multiple of what a Typer app with two options takes in the same moment, since machines differ in speed."""
    ours, plain_app = start(*words), [sys.executable, "-c", PLAIN_APP, *words]
    ratios = [cpu_seconds(ours, tmp_path) / cpu_seconds(plain_app, tmp_path) for _ in range(10)]
    assert statistics.median(ratios[1:]) <= limit  # the first one compiles the bytecode


def test_the_script_knows_the_commands_of_the_app() -> None:
    names = [command.name for command in app.registered_commands]
    groups = [group.name for group in app.registered_groups]
    assert tuple(names) == tuple(STAGES)
    assert (*names, *groups) == entry.COMMANDS


def test_the_help_of_all_names_each_command_with_what_it_does() -> None:
    found = plain(perl("--help").output)
    for command in app.registered_commands:
        assert command.callback is not None and command.callback.__doc__
        first = " ".join(command.callback.__doc__.split("\n\n")[0].split())
        assert f"{command.name} {first}" in found


@pytest.mark.parametrize("command", STAGES)
def test_every_option_is_in_the_help_under_its_panel(command: str) -> None:
    parameters = {p.name: p for p in parameters_of(command)}
    found = perl(command, "--help").output
    for item in settings.options(STAGES[command]):
        parameter = parameters[item.name]
        assert parameter.opts[0] == (item.name if item.argument else f"--{dashed(item.name)}")
        assert parameter.rich_help_panel == item.panel
        assert parameter.help.startswith(item.help)
        assert f"\n{item.panel}:\n" in found
        assert re.search(rf"(?<![\w-]){shown_name(item)}(?![\w-])", found), item.name
    assert all(parameter.help for name, parameter in parameters.items() if name != "help")
    assert {"config", "debug"} < set(parameters)
    assert all(name in found for name in ("--config", "--debug", "--help"))


@pytest.mark.parametrize(
    ("command", "name", "shown"),
    [
        ("sft", "model", "(default: the embedded coffee base)"),
        ("sft", "seed", "(default: 0)"),
        ("sft", "save_steps", "(default: 500)"),
        ("reward", "pos_weight", "(default: auto)"),
        ("rl", "beta", "(default: 0.05, as in the paper)"),
        ("rl", "reward", None),
        ("sft", "full", None),
        ("sft", "set", None),
    ],
)
def test_the_help_ends_with_the_default(command: str, name: str, shown: str | None) -> None:
    (parameter,) = [p for p in parameters_of(command) if p.name == name]
    assert parameter.help.endswith(shown) if shown else "(default" not in parameter.help


def test_a_flag_can_be_taken_back_but_for_those_that_steer_one_call() -> None:
    negated = {p.name for p in parameters_of("sft") if p.secondary_opts}
    assert negated == {
        "load_in_4bit",
        "load_in_8bit",
        "trust_remote_code",
        "strict",
        "drop_duplicates",
        "chat",
        "full",
        "use_dora",
        "auto_batch",
    }


@pytest.mark.parametrize("command", STAGES)
def test_every_command_has_an_example_with_options_that_exist(command: str) -> None:
    text = next(item.callback.__doc__ for item in app.registered_commands if item.name == command)
    examples = EXAMPLE.findall(text[text.index("Example") :])
    assert examples
    known = {dashed(item.name) for item in settings.options(STAGES[command])}
    for name, words in examples:
        assert name == command
        assert set(re.findall(r"--([\w-]+)", words)) <= known


@pytest.mark.parametrize(("command", "short"), [(c, s) for c in COMMANDS for s in ("-m", "-d", "-o", "-c")])
def test_short_forms(command: str, short: str) -> None:
    names = {"-m": "model", "-d": "data", "-o": "output", "-c": "config"}
    found = {p.name for p in parameters_of(command) if short in p.opts}
    few = command in ("merge", "quickstart")
    assert found == ({names[short]} if not few or short in ("-o", "-c") else set())


def test_version() -> None:
    found = perl("--version")
    assert (found.exit_code, found.output) == (0, f"perlcli {perlcli.__version__}\n")


def test_without_a_command_the_help_is_shown() -> None:
    assert "quickstart" in perl().output


def test_an_unknown_command_is_told() -> None:
    found = perl("sfx")
    assert found.exit_code == 2
    assert "No such command" in plain(found.output)


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a run would write; the current folder is empty too, and importing from it is undone."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path / "out"


@pytest.fixture
def refused(out: Path) -> Callable[..., str]:
    """Runs a command line that must be refused with exit code 2 and two lines, before anything is written."""

    def run(*words: object) -> str:
        found = perl(*words, "--output", out)
        assert found.exit_code == 2, found.output
        assert found.stderr.startswith("Error: ")
        assert "Traceback" not in found.output
        assert not out.exists()
        assert not list(Path().iterdir())
        return found.stderr

    return run


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(PAIR) + "\n")
    return path


@pytest.fixture
def adapter(tmp_path: Path) -> Callable[..., Path]:
    """Writes an adapter's config, without weights: enough for what is checked before they are read."""

    def write(name: str = "adapter", **values: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(coffee.BASE),
            "r": 8,
            "lora_alpha": 16,
            "lora_dropout": 0.0,
            "target_modules": ["q_proj"],
            **values,
        }
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    return write


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--set", "lr_schedule_type=cosine"], "RewardConfig has no such field. Did you mean lr_scheduler_type?"),
        (["--set", "learning_rate=1"], "--set learning_rate: use the option --learning-rate"),
        (["--set", "learning-rate=1"], "--set learning_rate: use the option --learning-rate"),
        (["--set", "output_dir=x"], "--set output_dir: use the option --output"),
        (["--set", "max_grad_norm=much"], "--set max_grad_norm: must be a number, not 'much'"),
        (["--set", "dataloader_drop_last=1"], "--set dataloader_drop_last: must be true or false, not 1"),
        (["--set", "warmup_steps"], "--set warmup_steps: expected NAME=VALUE"),
        (["--set", "lr_scheduler_type=zigzag"], "TRL's RewardConfig rejects these settings"),
        (["--lora-target-modules", "q_prj"], "the model has no module 'q_prj'\nHint: its linear modules: down_proj,"),
        (["--lora-target-modules", "q_proj,nope"], "the model has no module 'nope'"),
        (["--lora-target-modules", ","], "the model has no module ','"),
        (["--lora-r", "0"], "--lora-r must be above 0, not 0"),
        (["--pos-weight", "lots"], "--pos-weight must be auto, none or a number above 0, not lots"),
        (["--dtype", "float16"], "--dtype float16 needs a GPU"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_option_is_refused(refused: Any, pairs: Path, words: list[str], told: str) -> None:
    if "float16" in words and device.kind() == "cuda":
        pytest.skip("float16 is fine on a GPU")
    assert told in refused("reward", "--data", pairs, *words)


def test_all_wrong_set_items_are_told_at_once(refused: Any, pairs: Path) -> None:
    found = refused("reward", "--data", pairs, "--set", "a=1", "--set", "seed=x", "--set", "warmup_steps=abc")
    assert [line.split(":")[-2].strip() for line in found.splitlines()[:3]] == [
        "--set a",
        "--set seed",
        "--set warmup_steps",
    ]


@pytest.mark.parametrize("value", ["2024-13-45", "a: b: c", "[1"])
def test_a_set_value_that_is_no_yaml_is_text(pairs: Path, out: Path, value: str) -> None:
    found = perl("reward", "--data", pairs, "--output", out, "--dry-run", "--set", f"run_name={value}")
    assert found.exit_code == 0, found.output


@pytest.mark.parametrize("command", ["sft", "reward", "rl", "eval"])
def test_another_model_without_data_is_refused(refused: Any, command: str, tmp_path: Path) -> None:
    shutil.copytree(coffee.BASE, tmp_path / "base")
    found = refused(command, "--model", tmp_path / "base")
    assert found.startswith("Error: --data is missing")
    assert str(tmp_path / "base") in found


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c"])
def test_a_model_that_is_not_there_is_refused(refused: Any, pairs: Path, name: str) -> None:
    assert f"--model {name} does not exist" in refused("reward", "--data", pairs, "--model", name)


def test_a_file_is_no_model(refused: Any, pairs: Path) -> None:
    assert f"--model {pairs} is a file\nHint: name the folder" in refused("reward", "--data", pairs, "--model", pairs)


def test_a_folder_without_a_model_is_refused(refused: Any, pairs: Path) -> None:
    found = refused("reward", "--data", pairs, "--model", pairs.parent)
    assert f"--model {pairs.parent} can't be read as a model" in found


def test_a_folder_of_adapters_names_them(refused: Any, pairs: Path, adapter: Any, tmp_path: Path) -> None:
    """A run of trl that was cut off leaves checkpoints alone, and peft a folder for each adapter with a name."""
    (tmp_path / "run").mkdir()
    folder = adapter("run/checkpoint-2")
    assert f"Hint: it contains adapters; name one: {folder}" in refused("sft", "-d", pairs, "-m", tmp_path / "run")


def test_an_adapter_whose_base_is_not_there_is_refused(refused: Any, pairs: Path, adapter: Any) -> None:
    folder = adapter(base_model_name_or_path="/gone/base")
    found = refused("sft", "--data", pairs, "--model", folder)
    assert f"The adapter {folder} belongs to the base /gone/base, which was not found" in found
    assert f"Hint: put it back, or correct base_model_name_or_path in {folder}/adapter_config.json" in found


def test_an_adapter_that_names_no_base_is_refused(refused: Any, pairs: Path, adapter: Any) -> None:
    folder = adapter(base_model_name_or_path=None)
    assert "does not say which base it belongs to" in refused("sft", "--data", pairs, "--model", folder)


def test_an_adapter_with_a_broken_config_is_refused(refused: Any, pairs: Path, adapter: Any) -> None:
    folder = adapter()
    (folder / "adapter_config.json").write_text("{")
    assert "adapter_config.json can't be read" in refused("sft", "--data", pairs, "--model", folder)


def test_rl_from_an_adapter_with_biases_is_refused(refused: Any, pairs: Path, adapter: Any) -> None:
    folder = adapter(bias="lora_only")
    told = refused("rl", "--data", pairs, "--model", folder, "--reward", "perlcli.coffee:reward")
    assert f"The adapter {folder} changes the biases of its base" in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--full"], "--full can't start from the adapter"),
        (["--full"], "Hint: perl merge "),
        (["--lora-r", "4"], "is already an adapter: --lora-r 4, but the adapter has 8"),
        (["--lora-alpha", "4", "--lora-dropout", "0.5"], "--lora-alpha 4, but the adapter has 16; --lora-dropout 0.5"),
    ],
)
def test_an_adapters_settings_are_its_own(refused: Any, pairs: Path, adapter: Any, words: list[str], told: str) -> None:
    assert told in refused("sft", "--data", pairs, "--model", adapter(), *words)


def test_a_reward_model_is_no_policy(refused: Any, pairs: Path, adapter: Any) -> None:
    folder = adapter(task_type="SEQ_CLS")
    assert "is a reward model, not a policy" in refused("sft", "--data", pairs, "--model", folder)


def test_a_policy_is_no_reward_model(refused: Any, pairs: Path, adapter: Any) -> None:
    assert "is a policy's adapter" in refused("reward", "--data", pairs, "--model", adapter())


def test_rl_without_a_reward_is_refused(refused: Any) -> None:
    assert "--reward is missing: RL learns nothing without a reward\nHint: train one with `perl reward`" in refused(
        "rl"
    )


@pytest.mark.parametrize(
    ("reward", "told"),
    [
        ("no_such_module:score", "--reward no_such_module:score: can't import no_such_module: ModuleNotFoundError"),
        ("json:dumpz", "--reward json:dumpz: json has no function dumpz\nHint: Did you mean dump"),
        ("json:decoder", "--reward json:decoder is not a function: json has decoder = <module"),
        ("./nowhere", "--reward ./nowhere does not exist"),
        (str(coffee.BASE), "is a language model, not a reward model\nHint: train one with `perl reward`"),
    ],
    ids=["module", "function", "not callable", "folder", "language model"],
)
def test_a_reward_that_is_none_is_refused(refused: Any, reward: str, told: str) -> None:
    assert told in refused("rl", "--reward", reward)


def test_a_reward_module_that_fails_is_refused_with_its_error(
    refused: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_reward.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    found = refused("rl", "--reward", "broken_reward:score")
    assert "can't import broken_reward: ZeroDivisionError: division by zero" in found


def test_an_adapter_without_a_head_is_no_reward(refused: Any, adapter: Any) -> None:
    assert "is an adapter without a reward head, not a reward model" in refused("rl", "--reward", adapter())


def test_4_bit_without_bitsandbytes_is_refused(refused: Any, pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    found = refused("reward", "--data", pairs, "--load-in-4bit")
    assert "--load-in-4bit needs bitsandbytes, which isn't installed\nHint: pip install bitsandbytes" in found


def test_an_output_that_is_not_empty_is_left_alone(tmp_path: Path, pairs: Path) -> None:
    found = perl("reward", "--data", pairs, "--output", tmp_path, "--overwrite")
    assert found.exit_code == 2
    assert "is not empty and not a run of perlcli" in found.stderr
    assert list(tmp_path.iterdir()) == [pairs]


@pytest.mark.slow
@pytest.mark.parametrize("words", [["sft"], ["reward"], ["rl", "--reward", "perlcli.coffee:reward"]], ids=" ".join)
def test_a_dry_run_tells_what_would_happen_and_writes_nothing(out: Path, pairs: Path, words: list[str]) -> None:
    found = perl(*words, "--data", pairs, "--output", out, "--dry-run", "--lora-r", 4)
    assert found.exit_code == 0, found.output
    assert "LoRA r=4, alpha=8 on k_proj, o_proj, q_proj, v_proj" in found.stdout
    assert f"{pairs}: pairs, 1 row read, 1 kept" in found.stdout
    assert not out.exists()
    assert not list(Path().iterdir())


def test_a_dry_quickstart_writes_nothing(out: Path) -> None:
    assert perl("quickstart", "--dry-run", "--output", out).exit_code == 0
    assert not out.exists()


@pytest.mark.parametrize("command", STAGES)
def test_help_in_80_columns_cuts_no_options_name(command: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"], terminal_width=80, env={"COLUMNS": "80"}).output
    words = set(shown.split())
    assert set(map(shown_name, settings.options(STAGES[command]))) <= words


def test_help_of_merge_shows_its_argument() -> None:
    found = CliRunner().invoke(app, ["merge", "--help"], terminal_width=120).output
    assert "merge [OPTIONS] ADAPTER\n" in found
    assert re.search(
        r"\n  ADAPTER +Adapter to merge: folder of a run, or folder or Hub id of a LoRA adapter\.\n", found
    )
    assert "[OPTIONS]\n" in CliRunner().invoke(app, ["sft", "--help"]).output


def test_second_argument_is_told() -> None:
    found = perl("merge", "one", "two")
    assert found.exit_code == 2
    assert "unexpected extra argument" in found.stderr


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["sft"], "--dtype [auto|bfloat16|float16|float32]"),
        (["sft"], "--on-long [drop|truncate|error]"),
        (["rl"], "--algorithm [rloo|reinforce]"),
        (["reward"], "--pos-weight [auto|none|X]"),
        (["compare-full"], "STAGE [sft|reward|rl|all]"),
        (["estimate"], "STAGE [sft|reward|rl|all]"),
        (["data", "show"], "--for [sft|reward|rl]"),
        (["sft"], "One of hh, openai-preferences,"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_the_help_shows_the_choices(words: list[str], shown: str) -> None:
    assert shown in plain(perl(*words, "--help").output)


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["sft", "--lor-r", "3"], ["Error: No such option: --lor-r", "Hint: Did you mean --lora-r?"]),
        (["sfx"], ["Error: No such command 'sfx'", "Hint: Did you mean sft?"]),
        (["zzz"], ["Error: No such command 'zzz'", "Hint: perl --help lists the commands"]),
        (["sft", "--zzz"], ["Error: No such option: --zzz", "Hint: perl sft --help lists the options"]),
        (["recipes", "show"], ["Error: Missing argument 'NAME'", "Hint: perl recipes show --help lists the options"]),
    ],
    ids=" ".join,
)
def test_an_unknown_name_is_two_lines_with_the_nearest_one(words: list[str], lines: list[str]) -> None:
    found = perl(*words)
    assert (found.exit_code, found.stderr.splitlines()) == (2, lines)
