"""Where errors become lines on standard error and exit codes."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn, cast

import typer
from typer.core import TyperGroup

from perlcli.errors import Interrupted, PerlError, nearest, reason
from perlcli.run import claim, disk, out_of_memory
from perlcli.terminal import say

if TYPE_CHECKING:
    from typer._click import Context

# click's, or in newer versions of Typer that of its own copy of click.
UsageError = cast(type[Exception], typer.BadParameter.__mro__[1])


def with_boundary(action: Callable[[], None], *, debug: bool) -> None:
    """Runs the action and gives up the folders that it claimed. Errors become lines on standard error and an exit code;
    --debug adds the traceback. Raises typer.Exit, and with --debug any error that is not a PerlError."""
    try:
        action()
    except PerlError as error:
        if debug:
            _print(traceback.format_exc())
        refuse(out_of_memory.failure(error) or error)
    except KeyboardInterrupt:
        _print("Stopped.")
        raise typer.Exit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(141) from None
    except Exception as error:
        if debug:
            raise
        lost = out_of_memory.failure(error)
        if lost is not None:
            refuse(lost)
        _print("Error: " + _in_words(error))
        raise typer.Exit(1) from None
    finally:
        claim.release_all()


@contextmanager
def usage_errors(context: Context) -> Iterator[None]:
    """Reports what click finds wrong with a command line in our own words. Raises typer.Exit."""
    try:
        yield
    except UsageError as error:
        refuse(_usage(error, context))


def _usage(error: Exception, context: Context) -> PerlError:
    """An error of click with a hint: the nearest option if the name of one is unknown."""
    message = getattr(error, "message", "") or error.format_message()  # type: ignore[attr-defined]
    problem, _, suggestion = message.rstrip(".").partition(". Did you mean")
    if suggestion:  # Typer's own, for commands
        return PerlError(problem, "Did you mean" + suggestion.replace("'", ""))
    if hasattr(error, "possibilities"):  # an unknown option
        known = [name for parameter in context.command.get_params(context) for name in parameter.opts]
        return PerlError(problem, nearest(problem.rpartition(" ")[2], known) or _overview(context))
    return PerlError(problem, _overview(context))


def _overview(context: Context) -> str:
    listed = "commands" if isinstance(context.command, TyperGroup) else "options"
    return f"{context.command_path} --help lists the {listed}"


def refuse(error: PerlError) -> NoReturn:
    """Prints the error, or that the user stopped the run. Raises typer.Exit with its exit code."""
    _print(str(error) if isinstance(error, Interrupted) else f"Error: {error}")
    raise typer.Exit(error.exit_code) from None


def _in_words(error: Exception) -> str:
    """An error of a library or the system in two lines."""
    code = disk.code_of(error)
    if code in disk.ROOM:
        hint = "free some space, then run the same command with --resume (merge, eval: --overwrite)"
        return f"{os.strerror(code or 0)}: the run could not be saved\nHint: {hint}"
    if code == errno.EROFS:
        return f"{reason(error)}\nHint: choose a folder that you can write to"
    if isinstance(error, OSError) and error.strerror and error.filename:  # of a path: a folder in place of a file, …
        return f"{reason(error)}\nHint: check this path; --debug shows what it was used for"
    return f"{reason(error)}\nHint: --debug shows the traceback; please report it if the fault is in perlcli"


def _print(text: str) -> None:
    say(text, file=sys.stderr)
