"""Checks values from YAML against type annotations, converts them, and describes the types in words."""

from __future__ import annotations

import types
import typing
from functools import cache
from typing import Any

LARGEST = 2**63
SINGULARS: dict[object, str] = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
SINGULARS |= {dict: "a mapping", list: "a list"}
PLURALS: dict[object, str] = {str: "texts", int: "whole numbers", float: "numbers"}


def fits(value: object, kind: object) -> bool:
    """Whether a YAML value has an annotated type. An int is accepted as a float, a bool only as a bool."""
    origin = typing.get_origin(kind) or kind
    if origin is typing.Literal:
        return value in typing.get_args(kind) or _spelled(value) in typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, part) for part in typing.get_args(kind))
    if origin in (tuple, list, dict):
        return _fits_many(value, kind)
    if isinstance(value, bool):
        return origin in (bool, Any)
    if origin is float:
        return isinstance(value, int | float | str) and _is_float(value)
    return isinstance(value, origin) if isinstance(origin, type) and origin is not Any else True


def _spelled(value: object) -> object:
    """A choice as it is typed: YAML reads an unquoted `true` as a bool."""
    return str(value).lower() if isinstance(value, bool) else value


def _fits_many(value: object, kind: object) -> bool:
    """Whether a list or mapping and all its items fit `tuple[X, ...]`, `tuple[X, Y]`, `list[X]` or `dict[X, Y]`."""
    origin, kinds = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin is dict:
        items = value.items() if isinstance(value, dict) and kinds else ()
        return isinstance(value, dict) and all(fits(key, kinds[0]) and fits(item, kinds[1]) for key, item in items)
    values = [value] if _is_list_of_one_kind(kind) and not isinstance(value, list) else value
    if not isinstance(values, list):
        return False
    if origin is list or _is_list_of_one_kind(kind):
        return not kinds or all(fits(item, kinds[0]) for item in values)
    return len(values) == len(kinds) and all(map(fits, values, kinds))


def _is_list_of_one_kind(kind: object) -> bool:
    """Whether a type is `tuple[X, ...]`, for which a single value is accepted as a list of one."""
    return typing.get_origin(kind) is tuple and typing.get_args(kind)[-1] is ...


def _is_float(value: float | str) -> bool:
    """Whether a number fits into a float, or a text spells one: YAML 1.1 reads 1e-4 as text."""
    try:
        float(value)
    except (ValueError, OverflowError):
        return False
    return True


def convert(value: Any, kind: Any) -> Any:
    """A YAML value that fits a type, as that type."""
    if choices(kind):
        return _spelled(value)
    parts = typing.get_args(kind) or (kind,)
    if _is_list_of_one_kind(kind):
        values = value if isinstance(value, list) else [value]
        return tuple(convert(item, parts[0]) for item in values)
    if isinstance(value, list) and any(typing.get_origin(part) is tuple for part in (kind, *parts)):
        return tuple(value)
    if float in parts and not isinstance(value, bool) and int not in parts and value is not None:
        return float(value) if str not in parts else value
    return value


def inner(kind: Any) -> Any:
    """The type inside `X | None`; any other type as it is."""
    parts = [part for part in typing.get_args(kind) if part is not types.NoneType]
    return parts[0] if len(parts) == 1 and types.NoneType in typing.get_args(kind) else kind


@cache
def choices(kind: object) -> tuple[str, ...]:
    """The choices of a `Literal`, also of `Literal | None`; empty for any other type."""
    return typing.get_args(inner(kind)) if typing.get_origin(inner(kind)) is typing.Literal else ()


def describe(kind: object) -> str:
    """A type in words, for an error line."""
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return " or ".join(describe(part) for part in typing.get_args(kind) if part is not types.NoneType)
    if typing.get_origin(kind) is tuple:
        parts = typing.get_args(kind)
        if parts[-1] is ...:
            return f"{describe(parts[0])} or a list of {PLURALS.get(parts[0], 'them')}"
        return f"a list: {', '.join(map(describe, parts))}"
    origin = typing.get_origin(kind) or kind
    return SINGULARS.get(origin, str(getattr(origin, "__name__", origin)))


def is_plain(value: object) -> bool:
    """Whether a JSON value contains no number above 64 bits and no lone surrogate, at any depth."""
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
