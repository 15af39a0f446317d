"""What a name of another tool, such as `model_name_or_path` of trl, becomes here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["one", "flag", "many"]  # on the command line: a value, none or true or false, one or more values
PASSED = "set"  # the option that passes a field on to TRL's config
YES, NO = ("true", "yes", "t", "y", "1"), ("false", "no", "f", "n", "0")


@dataclass(frozen=True)
class Name:
    """A name of another tool: the option that it becomes, or why there is none."""

    option: str = ""  # the option that it becomes; `set` passes it on
    field: str = ""  # with `set`: the field of TRL's config, if it has another name there
    read: Callable[[Any], Mapping[str, Any]] | None = None  # its value as values of options; raises ValueError
    kind: Kind = "one"
    why: str = ""  # it is refused: the reason, and what to use instead
    note: str = ""  # it has no effect: what happens here
    fine: tuple[object, ...] = ()  # values that need nothing, since perlcli does the same

    @property
    def is_decided(self) -> bool:
        """Whether perlcli decides this itself."""
        return not self.option and self.read is None

    def is_fine(self, value: object) -> bool:
        """Whether a value needs nothing: it is unset, or what perlcli does anyway."""
        return value is None or plain(value) in ("none", "null", *map(plain, self.fine))


def plain(value: object) -> str:
    """A value as text, in which a value of the command line equals that of a YAML file."""
    if isinstance(value, list | tuple):
        return ",".join(map(plain, value))
    text = str(value).strip()
    try:
        return repr(float(text))
    except ValueError:
        return text.lower() if text.lower() in (*YES, *NO, "none", "null", "auto") else text


def switch(value: object) -> bool:
    """A flag's value: true or false, or a word for it. Raises ValueError for any other value."""
    text = str(value).lower()
    if text not in (*YES, *NO):
        raise ValueError(f"must be true or false, not {value!r}")
    return text in YES


def listed(value: object) -> list[str]:
    """The items of a list, or of a text with commas between them."""
    if isinstance(value, list | tuple):
        return [str(item) for item in value]
    return [part.strip() for part in str(value).split(",")]
