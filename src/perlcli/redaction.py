"""What no record, log or report holds: the user's home, tokens and passwords. The one place that takes them out."""

from __future__ import annotations

import dataclasses
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

STARS = "***"
# In the name of a variable; TOKENIZER is a model's name, and hidden it would be lost from settings.yaml.
SECRET = re.compile(r"TOKEN(?!IZ)|KEY(?!BOARD)|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
LEAST = 8  # letters of a secret: shorter values are words like `false`, which stand in many a text
KNOWN = (
    (r"(?<=://)[^\s/@]+@", f"{STARS}@"),  # the login in https://user:password@host
    (r"\b(hf_[A-Za-z0-9]{16,}|sk-(proj-|ant-)?\w{20,}|(gh[a-z]|github_pat)_\w{20,}|A[KS]IA[A-Z0-9]{16})\b", STARS),
    (r"(?i)([?&][\w-]*(token|key|secret|password|signature)[\w-]*=)[^&\s\"']+", rf"\1{STARS}"),
)
Change = tuple[re.Pattern[str], str]


def hidden(text: str) -> str:
    """Text with `~` for the user's home, and stars for tokens, logins in addresses and the values of variables of the
    environment whose names say that they are secret."""
    return _changed(text, _changes())


def hidden_in(value: Any) -> Any:
    """The same for every text in a value: in dictionaries (their keys too), lists, tuples, data classes and paths."""
    return _walked(value, _changes())


def homes() -> set[str]:
    """The user's home by all its names; none for a user whom the system doesn't know, as containers have them."""
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
        found = [_walked(item, changes) for item in value]
        return found if isinstance(value, list) else tuple(found)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = {item.name: _walked(getattr(value, item.name), changes) for item in dataclasses.fields(value)}
        return dataclasses.replace(value, **items)
    return value


def _changed(text: str, changes: tuple[Change, ...]) -> str:
    for pattern, instead in changes:
        text = pattern.sub(instead, text)
    return text


def _changes() -> tuple[Change, ...]:
    values = [value for name, value in os.environ.items() if SECRET.search(name) and len(value) >= LEAST]
    secrets = [value for value in values if not value.startswith(("/", "~"))]  # a path to a key is none
    return _compiled(tuple(sorted(secrets, key=len, reverse=True)), tuple(sorted(homes(), key=len, reverse=True)))


@lru_cache(maxsize=8)
def _compiled(secrets: tuple[str, ...], homes: tuple[str, ...]) -> tuple[Change, ...]:
    found = [(re.escape(secret), STARS) for secret in secrets] + list(KNOWN)
    for home in homes:  # not /home/u in /data/home/u or /home/u2, but in ../../home/u, as seen from another place;
        # ../data is no home in /data: a home of one name tells nobody's, and folders have that name elsewhere
        seen = rf"(?:\.\./)+{re.escape(home[1:])}|" if "/" in home[1:] else ""
        found.append((rf"(?:{seen}(?<![\w.-]){re.escape(home)})(?![\w-]|\.\w)", "~"))
    return tuple((re.compile(pattern), instead) for pattern, instead in found)
