"""Where errors become lines on standard error and an exit code."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable

import typer

from perlcli.errors import PerlError, reason
from perlcli.run import disk
from perlcli.terminal import say

LESS_MEMORY = "a smaller --per-device-train-batch-size or --max-length, or --load-in-4bit, takes less memory"


def with_boundary(action: Callable[[], None], *, debug: bool) -> None:
    """Run the action; errors become lines on standard error and an exit code, with a traceback only under --debug."""
    try:
        action()
    except PerlError as error:
        if debug:
            _tell(traceback.format_exc())
        _tell("Error: " + str(error))
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        _tell("Stopped.")
        raise typer.Exit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(141) from None
    except Exception as error:
        if debug:
            raise
        _tell("Error: " + _in_words(error))
        raise typer.Exit(1) from None


def _in_words(error: Exception) -> str:
    """What a library or the system couldn't do, in two lines."""
    code = disk.code_of(error)
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which isn't imported here
        return f"{reason(error)}\nHint: {LESS_MEMORY}"
    if code in disk.ROOM:
        way_on = "free disk space, then the same command with --resume (merge, eval: --overwrite)"
        return f"{os.strerror(code or 0)}: the run could not be saved\nHint: {way_on}"
    if code == errno.EROFS:
        return f"{reason(error)}\nHint: name a place that can be written to"
    return f"{reason(error)}\nHint: run it again with --debug to see where; please report it if it is ours"


def _tell(text: str) -> None:
    say(text, file=sys.stderr)
