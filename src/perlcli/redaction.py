"""Removes the user's home folder, tokens and passwords from everything that is saved, logged or printed."""

from __future__ import annotations

import dataclasses
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

STARS = "***"
# Names of secret variables. Not TOKENIZER, which names a model: hidden, it would be lost from settings.yaml.
SECRET = re.compile(r"TOKEN(?!IZ)|KEY(?!BOARD)|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
LEAST = 8  # characters of a secret: shorter values are words like `false`, which occur in many texts
KNOWN = (
    (r"(?<=://)[^\s/@]+@", f"{STARS}@"),  # the login in https://user:password@host
    (r"\b(hf_[A-Za-z0-9]{16,}|sk-(proj-|ant-)?\w{20,}|(gh[a-z]|github_pat)_\w{20,}|A[KS]IA[A-Z0-9]{16})\b", STARS),
    (r"(?i)([?&][\w-]*(token|key|secret|password|signature)[\w-]*=)[^&\s\"']+", rf"\1{STARS}"),
)
Change = tuple[re.Pattern[str], str]


def hidden(text: str) -> str:
    """The text with `~` for the user's home, and with stars for tokens, logins in URLs and the values of environment
    variables whose names say that they are secret."""
    return _changed(text, _changes())


def hidden_in(value: Any) -> Any:
    """The same for every text in a value: in dictionaries (keys too), lists, tuples, dataclasses and paths."""
    return _walked(value, _changes())


def homes() -> set[str]:
    """The user's home by all its names; empty for a user whom the system does not know, as in containers."""
    try:
        return {str(Path.home()), str(Path.home().resolve())} - {"/"}
    except RuntimeError:
        return set()


def _walked(value: Any, changes: tuple[Change, ...]) -> Any:
    if isinstance(value, str | Path):
        return _changed(str(value), changes)
    if isinstance(value, dict):
        return {_walked(key, changes): _walked(item, changes) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_walked(item, changes) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {item.name: _walked(getattr(value, item.name), changes) for item in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def _changed(text: str, changes: tuple[Change, ...]) -> str:
    for pattern, instead in changes:
        text = pattern.sub(instead, text)
    return text


def _changes() -> tuple[Change, ...]:
    values = [value for name, value in os.environ.items() if SECRET.search(name) and len(value) >= LEAST]
    secrets = [value for value in values if not value.startswith(("/", "~"))]  # not a path to a key
    return _compiled(tuple(sorted(secrets, key=len, reverse=True)), tuple(sorted(homes(), key=len, reverse=True)))


@lru_cache(maxsize=8)
def _compiled(secrets: tuple[str, ...], homes: tuple[str, ...]) -> tuple[Change, ...]:
    patterns = [(re.escape(secret), STARS) for secret in secrets] + list(KNOWN)
    for home in homes:  # matches /home/u, also as ../../home/u, but not in /data/home/u or /home/u2
        # A home like /data does not match as ../data: it names nobody, and other folders have that name too.
        relative = rf"(?:\.\./)+{re.escape(home[1:])}|" if "/" in home[1:] else ""
        patterns.append((rf"(?:{relative}(?<![\w.-]){re.escape(home)})(?![\w-]|\.\w)", "~"))
    return tuple((re.compile(pattern), instead) for pattern, instead in patterns)
