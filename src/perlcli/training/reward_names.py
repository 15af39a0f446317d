"""What kind of reward a `--reward` names, by its form, and what can be refused by that."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from perlcli.errors import PerlError

MODULE, FILE = r"[A-Za-z_][\w.]*", r".+\.py"
HALF_NAMED = re.compile(r".+\.py|.*\.py:.*|[^/]*:.*")  # meant as a function, or as a server
NAMED = re.compile(rf"({FILE}|{MODULE}):({MODULE})")


def is_url(name: str) -> bool:
    """Whether a `--reward` is a server."""
    return name.startswith(("http://", "https://"))


def names_function(name: str) -> bool:
    """Whether a `--reward` has the form module:function or file.py:function."""
    return NAMED.fullmatch(name) is not None and not Path(name).exists()


def is_called(name: str) -> bool:
    """Whether a `--reward` is a function or a server, not a model."""
    return is_url(name) or names_function(name)


def check_given(names: Sequence[str]) -> None:
    """Raises PerlError if no reward is given, or one is neither a function nor a place."""
    if not names:
        hint = "train one with `perl reward` and name its folder, or name a function as module:function"
        raise PerlError("--reward is missing: RL learns nothing without a reward", hint)
    for name in names:
        if "://" in name and not is_url(name):
            raise PerlError(f"--reward {name} must begin with http:// or https://", "perl rl asks no other servers")
        if not is_called(name) and HALF_NAMED.fullmatch(name) and not Path(name).is_dir():
            problem = f"--reward {name} must be file.py:function or module:function"
            raise PerlError(problem, f"--reward {name.partition(':')[0] or 'file.py'}:NAME")


def check_file(name: str) -> None:
    """Raises PerlError if the file of a reward function is not there."""
    place = name.rpartition(":")[0]
    if place.endswith(".py") and not Path(place).expanduser().is_file():
        raise PerlError(f"--reward {name}: there is no file {place}")
