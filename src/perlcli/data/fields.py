"""The fields of a row as its format wants them: found, checked, and an error that says what was expected."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import isfinite, isnan
from typing import Any

from perlcli.data.nesting import HALVES, flaw
from perlcli.data.rows import Content, Message, Raw
from perlcli.text import clip, shorten

CONTENT = "text or a list of messages"


class BadField(Exception):
    """A field of a row that is not what its format says."""


class SetAside(Exception):
    """A row that is as its format says, and that isn't wanted: the text is the reason that the report counts it by."""


def need(raw: Raw, name: str, expected: str) -> Any:
    """The value of a field that must be there."""
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
    """The value of a field that is text where it isn't left out; else an empty text."""
    return "" if raw.get(name) is None else text(raw, name)


def number(raw: Raw, name: str) -> float:
    """The value of a field that must be a number, or a text that spells one."""
    value = need(raw, name, "a number")
    try:
        if isinstance(value, int | float | str) and not isinstance(value, bool) and isfinite(float(value)):
            return float(value)
    except (ValueError, OverflowError):
        pass  # said below
    raise BadField(f"{name} must be a number, not {shorten(value)}")


def content(raw: Raw, name: str) -> Content:
    """The value of a field that is text or a conversation."""
    value = need(raw, name, CONTENT)
    return value if isinstance(value, str) else messages(value, name)


def messages(value: Any, name: str) -> list[Message]:
    """A conversation as TRL writes it: messages with a role and a content."""
    if not isinstance(value, list) or not value:
        raise BadField(f"{name} must be {CONTENT}, not {shorten(value)}")
    for message in value:
        if not (isinstance(message, Mapping) and isinstance(message.get("role"), str)):
            raise BadField(f"{name} holds {shorten(message)}, which is not a message with role and content")
        if not isinstance(message.get("content"), str):
            raise BadField(f"{name} has a message whose content is not text: {shorten(message.get('content'))}")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def is_missing(value: Any) -> bool:
    """Whether a field holds nothing: null, an empty text, or the NaN that pandas writes for either."""
    return value is None or value == "" or (isinstance(value, float) and isnan(value))


def label(raw: Raw, name: str = "label") -> bool | None:
    """Thumbs up or down, in any of its spellings; None where nobody judged the row.

    Another value is an error and not left out: it would say that the column is on another scale, on which 1 may be bad.
    """
    value = raw.get(name)
    if is_missing(value):
        return None
    expected = "0, 1, true or false"
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.lower() in ("true", "false", "0", "1", "0.0", "1.0"):
        return value.lower() in ("true", "1", "1.0")
    raise BadField(f"{name} must be {expected}, not {shorten(value)}")


def listed(raw: Raw, name: str, of: str) -> list[Any]:
    """The value of a field that must be a list with something in it."""
    value = need(raw, name, f"a list of {of}")
    if not isinstance(value, list) or not value:
        raise BadField(f"{name} must be a list of {of}, not {shorten(value)}")
    return value


def optional_list(raw: Raw, name: str, of: str) -> list[Any]:
    """The value of a field that is a list where it isn't left out; else an empty list."""
    return listed(raw, name, of) if raw.get(name) else []


def mapping(raw: Raw, name: str, holds: str) -> Mapping[str, Any]:
    """The value of a field that must be an object."""
    value = need(raw, name, f"an object with {holds}")
    if not isinstance(value, Mapping):
        raise BadField(f"{name} must be an object with {holds}, not {shorten(value)}")
    return value


def parsed(raw: Raw, name: str) -> Any:
    """The value of a field that is JSON in a text, or what such a text holds."""
    value = need(raw, name, "JSON")
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except json.JSONDecodeError as error:
        raise BadField(f"{name} is not valid JSON ({error.msg} at character {error.pos})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets by the thousand
        raise BadField(f"{name} is no JSON that can be read: {error}") from error
    if what := flaw(found, HALVES.search(value)):
        raise BadField(f"{name} is no JSON that can be read: {what}")
    return found


def same_kind(*contents: Content) -> None:
    """Raise BadField where some of a row's contents are text and others conversations."""
    if len({isinstance(content, str) for content in contents}) > 1:
        raise BadField("text and messages are mixed in one row")
