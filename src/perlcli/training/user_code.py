"""Runs the user's code, which can raise anything, exit and change the process: each becomes an error in our words."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from perlcli.errors import PerlError
from perlcli.text import clip, one_line, shorten


@contextmanager
def as_fault(fault: Callable[[BaseException], PerlError]) -> Iterator[None]:
    """Runs the user's code, which can raise anything and exit: all of it becomes a fault, but errors of ours and what
    stops a run."""
    try:
        yield
    except (PerlError, KeyboardInterrupt, asyncio.CancelledError):
        raise
    except BaseException as error:
        raise fault(error) from error


@contextmanager
def unchanged(fault: Callable[[str], PerlError]) -> Iterator[None]:
    """Raises a fault if the user's code changes what the run depends on in this process, and changes it back."""
    before = _process()
    yield
    after = _process()
    if after == before:
        return
    os.chdir(before["the working directory"])
    torch.set_default_dtype(before["torch's default dtype"])
    torch.set_grad_enabled(before["whether torch takes gradients"])
    what = next(what for what in before if after[what] != before[what])
    raise fault(f"changed {what}, on which the run depends: from {before[what]} to {after[what]}")


def _process() -> dict[str, Any]:
    try:
        folder = os.getcwd()
    except OSError:
        folder = "a deleted folder"
    return {
        "the working directory": folder,
        "torch's default dtype": torch.get_default_dtype(),
        "whether torch takes gradients": torch.is_grad_enabled(),
    }


def words(error: BaseException) -> str:
    """An error of the user's code with its type, in one line."""
    try:
        text = clip(one_line(str(error)), 300)
    except Exception:  # its __str__ is the user's code too
        text = ""
    kind = type(error).__name__
    return f"{kind}: {text}" if text else kind


def shown(value: object) -> str:
    try:
        return shorten(value)
    except Exception:  # its __repr__ is the user's code too
        return f"a {type(value).__name__}"
