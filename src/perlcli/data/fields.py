"""Reads the fields of a row as its format expects them; errors name the field and what was expected."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import isfinite, isnan

from perlcli.data.files import fault_of, why_undecoded
from perlcli.data.rows import Content, Message, Raw, Thumb, Unjudged
from perlcli.text import clip, shorten

CONTENT = "text or a list of messages"
UNLABELLED = "without a label"  # the reason in the report


class BadField(Exception):
    """A field of a row that is not what its format requires."""


class SetAside(Exception):
    """A valid row that is not used; the message is the reason under which the report counts it."""


def need(raw: Raw, name: str, expected: str) -> object:
    """The value of a required field. Raises BadField, as all functions of this module do for a value that won't do."""
    if name not in raw:
        raise BadField(f"{name} is missing: the row has {clip(', '.join(map(str, raw)), 300) or 'no columns'}")
    if raw[name] is None:
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
    return "" if raw.get(name) is None else text(raw, name)


def number(raw: Raw, name: str) -> float:
    """The value of a field that must be a finite number, or text that can be read as one."""
    value = need(raw, name, "a number")
    try:
        if isinstance(value, int | float | str) and not isinstance(value, bool) and isfinite(float(value)):
            return float(value)
    except (ValueError, OverflowError):
        pass  # reported below
    raise BadField(f"{name} must be a number, not {shorten(value)}")


def content(raw: Raw, name: str) -> Content:
    """The value of a field that is text or a conversation."""
    value = need(raw, name, CONTENT)
    return value if isinstance(value, str) else messages(value, name)


def messages(value: object, name: str) -> list[Message]:
    """A conversation in TRL's form: a list of messages with role and content."""
    if not isinstance(value, list) or not value:
        raise BadField(f"{name} must be {CONTENT}, not {shorten(value)}")
    for message in value:
        if not (isinstance(message, Mapping) and isinstance(message.get("role"), str)):
            raise BadField(f"{name} contains {shorten(message)}, which is not a message with role and content")
        if not isinstance(message.get("content"), str):
            raise BadField(f"{name} has a message whose content is not text: {shorten(message.get('content'))}")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def is_missing(value: object) -> bool:
    """Whether a field is null, empty text, or the NaN that pandas writes for either."""
    return value is None or value == "" or (isinstance(value, float) and isnan(value))


def label(raw: Raw, name: str = "label") -> bool | None:
    """Thumbs up or down, in any of its spellings; None if the row has no label. Any other value is an error, and not
    only a dropped row: the column may be on a scale on which 1 is bad."""
    value = raw.get(name)
    if is_missing(value):
        return None
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.lower() in ("true", "false", "0", "1", "0.0", "1.0"):
        return value.lower() in ("true", "1", "1.0")
    raise BadField(f"{name} must be 0, 1, true or false, not {shorten(value)}")


def thumb(prompt: Content, completion: Content, raw: Raw, name: str = "label") -> Thumb | Unjudged:
    """A completion with the row's label; if it has none, only the prompt is of use."""
    up = label(raw, name)
    return Unjudged(prompt, UNLABELLED) if up is None else Thumb(prompt, completion, up)


def listed(raw: Raw, name: str, of: str) -> list[object]:
    """The value of a field that must be a list with at least one item; `of` names the items in the error."""
    value = need(raw, name, f"a list of {of}")
    if not isinstance(value, list) or not value:
        raise BadField(f"{name} must be a list of {of}, not {shorten(value)}")
    return value


def optional_list(raw: Raw, name: str, of: str) -> list[object]:
    """The value of an optional list field; empty if the row doesn't have it."""
    return listed(raw, name, of) if raw.get(name) else []


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


def same_kind(*contents: Content) -> None:
    """Raises BadField if some of the contents are text and others are conversations."""
    if len({isinstance(content, str) for content in contents}) > 1:
        raise BadField("text and messages in the same row")


def shared(one: list[Message], other: list[Message]) -> int:
    """The number of messages that two conversations start with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))
