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
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if isinstance(value, bool):
        return origin in (bool, Any)
    if origin is float:
        return isinstance(value, int | float) or _spells_float(value)
    return isinstance(value, origin) if isinstance(origin, type) else True


def _spells_float(value: Any) -> bool:
    """YAML 1.1 reads 1e-4 as text; transformers' users write it so."""
    try:
        return isinstance(value, str) and float(value) is not None
    except ValueError:
        return False


def convert(value: Any, kind: Any) -> Any:
    """A fitting YAML value as its annotated type."""
    parts = typing.get_args(kind) or (kind,)
    if isinstance(value, list) and typing.get_origin(kind) is tuple:
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
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    return names.get(
        kind, "a list of texts" if typing.get_origin(kind) is tuple else str(getattr(kind, "__name__", kind))
    )
