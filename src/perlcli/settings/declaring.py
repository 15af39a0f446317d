"""How an option is declared, as a field of a frozen group, and read back with its help and limits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypedDict, Unpack, get_type_hints

Values = Mapping[str, Any]  # values by the names of their options


class Facts(TypedDict, total=False):
    """What an option may declare besides its default and help; `Option` says what each means."""

    short: str
    unset: str
    argument: bool
    metavar: str
    gt: float
    ge: float
    le: float
    lt: float
    place: bool
    default: Any


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option of a command: its place in the settings, its help and its limits."""

    name: str
    group: str
    panel: str
    type: Any  # a type annotation
    default: Any
    help: str
    short: str = ""
    unset: str = ""  # what None means, for the help; `{}` is the default of the command (`defaults.words`)
    argument: bool = False  # given by position, not by name
    metavar: str = ""  # stands for the value in the help, instead of the word for its type
    gt: float | None = None  # the value must be above this
    ge: float | None = None  # the value must be at least this
    le: float | None = None  # the value must be at most this
    lt: float | None = None  # the value must be below this
    place: bool = False  # names a file, a folder or something on the Hub

    @property
    def shown(self) -> str:
        """The option as the user types it: `--lora-r`, or an argument's name in capitals."""
        return self.name.upper() if self.argument else f"--{dashed(self.name)}"


def option(text: str, **facts: Unpack[Facts]) -> Any:
    """Declares an option with its help text; None as its default means unset."""
    return field(default=facts.pop("default", None), metadata={"help": text, **facts})


def flag(text: str) -> Any:
    """Declares an option that is off until it is given."""
    return option(text, default=False)


def place(text: str, **facts: Unpack[Facts]) -> Any:
    """Declares an option that names a file, a folder or something on the Hub."""
    facts["place"] = True
    return option(text, **facts)


def option_of(group: type[Any], name: str) -> Any:
    """Declares the same option as another group has."""
    original = next(item for item in dataclasses.fields(group) if item.name == name)
    return field(default=original.default, metadata=original.metadata)


def options(stage: type[Any]) -> Iterator[Option]:
    """Every option of a stage, in the order of its groups."""
    groups = get_type_hints(stage)
    for group in dataclasses.fields(stage):
        yield from _options_of(groups[group.name], group.name)


@cache  # commands share groups, and evaluating the annotations of all of them would slow down the help
def _options_of(kind: type[Any], group: str) -> tuple[Option, ...]:
    types = get_type_hints(kind)
    return tuple(
        Option(
            name=item.name,
            group=group,
            panel=str(kind.__doc__),
            type=types[item.name],
            default=item.default,
            **item.metadata,
        )
        for item in dataclasses.fields(kind)
    )


def flat(settings: object) -> dict[str, Any]:
    """The settings of a command as one flat mapping of option names to values."""
    return {item.name: getattr(getattr(settings, item.group), item.name) for item in options(type(settings))}


def names(stage: type[Any]) -> list[str]:
    """The names of a stage's options."""
    return [item.name for item in options(stage)]


def dashed(name: str) -> str:
    """An option's name as it is typed: lora_r -> lora-r, and for_ -> for, which is a keyword in Python."""
    return name.rstrip("_").replace("_", "-")
