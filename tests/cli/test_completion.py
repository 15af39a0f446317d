"""What a shell offers for the values of options."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from perlcli import recipes, settings
from perlcli.cli.completion import offer
from perlcli.settings.types import choices


def write_run(folder: Path, command: str) -> None:
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(json.dumps({"command": command}))


@pytest.fixture(autouse=True)
def runs(tmp_path: Path) -> None:
    for name, command in (("sft", "sft"), ("judge", "reward"), ("study/rl", "rl"), ("eval-sft", "eval")):
        write_run(tmp_path / "runs" / name, command)
    write_run(tmp_path / "elsewhere" / "sft", "sft")
    (tmp_path / "runs" / "notes").mkdir()
    (tmp_path / "runs" / "damaged").mkdir()
    (tmp_path / "runs" / "damaged" / "record.json").write_text("{")
    (tmp_path / "loha.json").write_text("{}")


def offered(command: str, name: str, typed: str = "") -> list[str]:
    (item,) = (item for item in settings.options(settings.ALL_COMMANDS[command]) if item.name == name)
    function = offer(item)
    assert function is not None
    return function(typed)


@pytest.mark.parametrize(
    ("command", "name", "typed", "values"),
    [
        ("sft", "recipe", "", recipes.names()),
        ("sft", "recipe", "no-such", []),
        ("sft", "dtype", "b", ["bfloat16"]),
        ("reward", "data_format", "thu", ["thumbs"]),
        ("rl", "reward", "", ["runs/judge"]),
        ("rl", "model", "runs/s", ["runs/sft", "runs/study/rl"]),
        ("rl", "model", "elsewhere/", ["elsewhere/sft"]),
        ("merge", "adapter", "", ["runs/judge", "runs/sft", "runs/study/rl"]),
        ("report", "run", "runs/e", ["runs/eval-sft"]),
        ("sft", "peft", "", ["loha.json"]),
        ("compare-full", "stage", "r", ["reward", "rl"]),
    ],
)
def test_an_option_offers_its_values(command: str, name: str, typed: str, values: list[str]) -> None:
    assert offered(command, name, typed) == values


def test_other_values_are_left_to_the_shell() -> None:
    for item in settings.options(settings.Sft):
        assert offer(item) is None or choices(item.type) or item.name in (
            "recipe", "model", "peft", "output",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("line", "values"),
    [("perl sft --recipe tl", ["tldr"]), ("perl rl --reward ", ["runs/judge"]), ("perl merge runs/sf", ["runs/sft"])],
)
def test_a_shell_gets_them(line: str, values: list[str]) -> None:
    words = line.split(" ")
    asked = {"_PERL_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    code = "import sys; sys.argv[0] = 'perl'; from perlcli.entry import perl; sys.exit(perl())"
    found = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True, check=False
    )
    assert found.stdout.split() == values, found.stderr
