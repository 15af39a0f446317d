"""What a shell offers for the value of an option: its choices, recipes, runs, files of adapters and trackers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from perlcli import recipes
from perlcli.run.files import RECORD
from perlcli.settings import Option
from perlcli.settings.types import choices

MODELS = ("sft", "reward", "rl", "merge", "quickstart")
RUNS = {  # the commands whose runs an option takes; none: those of all
    "model": MODELS,
    "adapter": ("sft", "reward", "rl", "quickstart"),
    "reward": ("reward", "quickstart"),
    "anchor": ("sft", "rl"),
    "run": (),
    "dir": (),
    "output": (),
}
HERE = "runs"  # where runs are by default
Offer = Callable[[str], list[str]]


def offer(item: Option) -> Offer | None:
    """A function from what was typed of an option's value to the values that start so; None leaves it to the shell."""
    if choices(item.type):
        return lambda incomplete: _starting(incomplete, iter(choices(item.type)))
    if item.name == "recipe":
        return lambda incomplete: _starting(incomplete, iter(recipes.names()))
    if item.name == "peft":
        return lambda incomplete: _starting(incomplete, map(str, Path(incomplete).parent.glob("*.json")))
    if item.name in RUNS:
        return lambda incomplete: _starting(incomplete, _runs(incomplete, RUNS[item.name]))
    return None


def _starting(typed: str, values: Iterator[str]) -> list[str]:
    return sorted({value for value in values if value.startswith(typed)})


def _runs(typed: str, commands: tuple[str, ...]) -> Iterator[str]:
    """The folders of runs below `runs`, or below the folder that is typed, down to two levels."""
    top = Path(typed).parent if "/" in typed else Path(HERE)
    for pattern in (f"*/{RECORD}", f"*/*/{RECORD}"):
        for path in top.expanduser().glob(pattern):
            if not commands or _command(path) in commands:
                yield str(path.parent)


def _command(record: Path) -> str:
    try:
        return str(json.loads(record.read_text(encoding="utf-8"))["command"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return ""
