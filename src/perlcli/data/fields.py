"""Reads the fields of a row as its format expects them; errors name the field and what was expected."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from math import isfinite, isnan

from perlcli.data.files import fault_of, why_undecoded
from perlcli.data.rows import Message, Raw
from perlcli.text import clip, shorten

COMMA = re.compile(r"\s*[+-]?(?:0*,\d+|\d+,(?!\d{3}\s*$)\d+)\s*")  # a decimal comma, not one of thousands
UNLABELLED = "without a label"  # the reason in the report


class BadField(Exception):
    """A field of a row that is not what its format requires."""


class SetAside(Exception):
    """A valid row that is not used; the message is the reason under which the report counts it."""


def need(raw: Raw, name: str, expected: str) -> object:
    """The value of a required field. Raises BadField, as all functions of this module do for a value that won't do."""
    if name not in raw:
        raise BadField(f"{name} is missing: the row has {clip(', '.join(map(str, raw)), 300) or 'no columns'}")
    if is_null(raw[name]):
        raise BadField(f"{name} is null: expected {expected}")
    return raw[name]


def text(raw: Raw, name: str) -> str:
    """The value of a field that must be text."""
    value = need(raw, name, "text")
    if not isinstance(value, str):
        raise BadField(f"{name} must be text, not {shorten(value)}")
    return value


def optional_text(raw: Raw, name: str) -> str:
    """The value of an optional text field; empty if the row doesn't have it."""
    return "" if is_null(raw.get(name)) else text(raw, name)


def number(raw: Raw, name: str) -> float:
    """The value of a field that must be a finite number, or text that can be read as one."""
    value = need(raw, name, "a number")
    found = number_of(value)
    if found is None:
        raise BadField(f"{name} must be a number, not {shorten(value)}")
    return found


def number_of(value: object) -> float | None:
    """A finite number, also one in text, where it may have a decimal comma; None for anything else. `1,234` is None, as
    it may be a thousand."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and COMMA.fullmatch(value):
        value = value.replace(",", ".")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if isfinite(number) else None


def is_null(value: object) -> bool:
    """Whether a field is null, or the NaN that pandas writes for it."""
    return value is None or (isinstance(value, float) and isnan(value))


def is_missing(value: object) -> bool:
    """Whether a field is null or empty text."""
    return is_null(value) or value == ""


def listed(raw: Raw, name: str, of: str) -> list[object]:
    """The value of a field that must be a list with at least one item; `of` names the items in the error."""
    value = need(raw, name, f"a list of {of}")
    if not isinstance(value, list) or not value:
        raise BadField(f"{name} must be a list of {of}, not {shorten(value)}")
    return value


def optional_list(raw: Raw, name: str, of: str) -> list[object]:
    """The value of an optional list field; empty if the row doesn't have it."""
    return [] if is_null(given := raw.get(name)) or not given else listed(raw, name, of)


def mapping(raw: Raw, name: str, holds: str) -> Raw:
    """The value of a field that must be an object."""
    value = need(raw, name, f"an object with {holds}")
    if not isinstance(value, Mapping):
        raise BadField(f"{name} must be an object with {holds}, not {shorten(value)}")
    return value


def parsed(raw: Raw, name: str) -> object:
    """The value of a field that is JSON as text, or the decoded value itself."""
    value = need(raw, name, "JSON")
    if not isinstance(value, str):
        return value
    try:
        result: object = json.loads(value)
    except json.JSONDecodeError as error:
        raise BadField(f"{name} is not valid JSON ({error.msg} at character {error.pos})") from error
    except (ValueError, RecursionError) as error:
        raise BadField(f"{name} can't be read as JSON: {why_undecoded(error)}") from error
    if fault := fault_of(result, value):
        raise BadField(f"{name} can't be read as JSON: {fault}")
    return result


def shared(one: list[Message], other: list[Message]) -> int:
    """The number of messages that two conversations start with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))
