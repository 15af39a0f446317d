"""Whether a value read from YAML fits a type annotation, and the words for it."""

from __future__ import annotations

import types
import typing
from typing import Any

LARGEST = 2**63


def fits(value: Any, kind: Any) -> bool:
    """Whether a YAML value is of an annotated type: an int passes for a float, a bool for nothing but bool."""
    origin = typing.get_origin(kind) or kind
    if origin is typing.Literal:
        return value in typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, part) for part in typing.get_args(kind))
    if origin in (tuple, list, dict):
        return _fits_many(value, origin, kind)
    if isinstance(value, bool):
        return origin in (bool, Any)
    if origin is float:
        return isinstance(value, int | float | str) and _is_float(value)
    return isinstance(value, origin) if isinstance(origin, type) and origin is not Any else True


def _fits_many(value: Any, origin: Any, kind: Any) -> bool:
    """Whether a list or mapping fits `tuple[X, ...]`, `tuple[X, Y]`, `list[X]` or `dict[X, Y]` to its last item."""
    kinds = typing.get_args(kind)
    if origin is tuple:
        values = [value] if _is_list_of_one_kind(kind) and not isinstance(value, list) else value
        return isinstance(values, list) and _fit_each(values, kinds)
    if not isinstance(value, origin) or not kinds:
        return isinstance(value, origin)
    if origin is list:
        return all(fits(item, kinds[0]) for item in value)
    return all(fits(key, kinds[0]) and fits(item, kinds[1]) for key, item in value.items())


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


def is_plain(value: Any) -> bool:
    """Whether a value of JSON holds no number beyond 64 bits and no half of a character, at any depth."""
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            left += [*item, *item.values()]
        elif isinstance(item, list):
            left += item
        elif (isinstance(item, int) and abs(item) >= LARGEST) or (isinstance(item, str) and not _is_text(item)):
            return False
    return True


def _is_text(value: str) -> bool:
    try:
        return value.encode() is not None
    except UnicodeEncodeError:
        return False
