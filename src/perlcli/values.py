"""Whether a value read from YAML fits a type annotation, and the words for it."""

from __future__ import annotations

import types
import typing
from typing import Any


def fits(value: Any, kind: Any) -> bool:
    """Whether a YAML value is of an annotated type: an int passes for a float, a bool for nothing but bool."""
    if typing.get_origin(kind) is typing.Literal:
        return value in typing.get_args(kind)
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return any(fits(value, part) for part in typing.get_args(kind))
    origin = typing.get_origin(kind) or kind
    if origin is tuple:
        values = [value] if _is_list_of_one_kind(kind) and not isinstance(value, list) else value
        return isinstance(values, list) and _fit_each(values, typing.get_args(kind))
    if isinstance(value, bool):
        return origin in (bool, Any)
    if origin is float:
        return isinstance(value, int | float | str) and _is_float(value)
    return isinstance(value, origin) if isinstance(origin, type) else True


def _is_list_of_one_kind(kind: Any) -> bool:
    """Whether a type is `tuple[X, ...]`: one value then stands for a list of it."""
    return typing.get_origin(kind) is tuple and typing.get_args(kind)[-1] is ...


def _fit_each(values: list[Any], kinds: tuple[Any, ...]) -> bool:
    """Whether a list fits `tuple[X, ...]` or `tuple[X, Y]`."""
    wanted = kinds[:1] * len(values) if kinds[-1] is ... else kinds
    return len(values) == len(wanted) and all(map(fits, values, wanted))


def _is_float(value: float | str) -> bool:
    """Whether a number is none too large, or a text spells one: YAML 1.1 reads 1e-4 as text, and transformers' users
    write it so."""
    try:
        float(value)
    except (ValueError, OverflowError):
        return False
    return True


def convert(value: Any, kind: Any) -> Any:
    """A fitting YAML value as its annotated type."""
    parts = typing.get_args(kind) or (kind,)
    if _is_list_of_one_kind(kind):
        values = value if isinstance(value, list) else [value]
        return tuple(convert(item, parts[0]) for item in values)
    if isinstance(value, list) and any(typing.get_origin(part) is tuple for part in (kind, *parts)):
        return tuple(value)
    if float in parts and not isinstance(value, bool) and int not in parts and value is not None:
        return float(value) if str not in parts else value
    return value


def describe(kind: Any) -> str:
    """A type in words, for an error line."""
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return " or ".join(describe(part) for part in typing.get_args(kind) if part is not types.NoneType)
    if typing.get_origin(kind) is tuple:
        parts = typing.get_args(kind)
        if parts[-1] is ...:
            return f"{describe(parts[0])}, or a list of it"
        return f"a list: {', '.join(map(describe, parts))}"
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    return names.get(kind, str(getattr(kind, "__name__", kind)))
