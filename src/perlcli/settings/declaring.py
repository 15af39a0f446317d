"""How an option is declared, as a field of a frozen group, and read back with all that is told about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, get_type_hints


def option(
    default: Any, text: str, *, short: str = "", unset: str = "", argument: bool = False, metavar: str = ""
) -> Any:
    """Declare an option; `unset` says in the help what None means, `argument` that it is given by its place alone,
    `metavar` what stands for its value where not its type's word."""
    words = {"help": text, "short": short, "unset": unset, "argument": argument, "metavar": metavar}
    return field(default=default, metadata=words)


def option_of(group: type[Any], name: str) -> Any:
    """Declare an option as another group has it, so that its text stands once."""
    found = next(item for item in dataclasses.fields(group) if item.name == name)
    return field(default=found.default, metadata=found.metadata)


@dataclass(frozen=True)
class Option:
    """One option of a command: where it lives and what the user is told about it."""

    name: str
    group: str
    panel: str
    type: Any
    default: Any
    help: str
    short: str
    unset: str
    argument: bool
    metavar: str


def options(stage: type[Any]) -> Iterator[Option]:
    """Every option of a stage, in the order of its groups."""
    groups = get_type_hints(stage)
    for group in dataclasses.fields(stage):
        kind = groups[group.name]
        types = get_type_hints(kind)
        for item in dataclasses.fields(kind):
            yield Option(item.name, group.name, kind.__doc__, types[item.name], item.default, **item.metadata)


def names(stage: type[Any]) -> list[str]:
    """The names of a stage's options."""
    return [item.name for item in options(stage)]


def dashed(name: str) -> str:
    """The option's name as it is typed: lora_r -> lora-r, and for_ -> for, which Python keeps for itself."""
    return name.rstrip("_").replace("_", "-")
