"""The console scripts `perl` and `perlcli`: run our commands and hand every other call to the Perl interpreter.

An activated environment puts our `perl` before the system's, so scripts, one-liners and `#!/usr/bin/env perl` files
reach us too. A call is ours when its first argument is exactly one of COMMANDS or OPTIONS, or when a shell asks for
completions. Any other call replaces this process with the next Perl interpreter on PATH: same process, arguments,
standard streams, environment and signals. That includes a bare `perl` (the program is standard input), `perl -h` and
`perl -v`. `perlcli` and `python -m perlcli` are always ours.

If a file is named like a command, the command wins: `perl sft` is ours, `perl ./sft` and `perl -- sft` run the file.

This module runs before each Perl program, so it imports only `os` and `sys`, and anything else where it is needed.
"""

import os
import sys

STAGES = ("sft", "reward", "rl", "eval", "merge", "quickstart", "compare-full")
COMMANDS = (*STAGES, "runs", "report", "estimate", "doctor", "data", "recipes")
OPTIONS = ("--help", "--version", "--install-completion", "--show-completion")
COMPLETION_VARIABLE = "_PERL_COMPLETE"  # set by the completion script of the shell, name as Typer builds it

EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND = 126, 127  # as shells report them


def perl() -> int:
    """Runs the console script `perl`: one of our commands, or the Perl interpreter in place of this process."""
    arguments = sys.argv[1:]
    return perlcli() if is_ours(arguments) else hand_over(arguments)


def perlcli() -> int:
    """Runs the console script `perlcli`, which is always ours. Prints the version without loading the commands."""
    if sys.argv[1:2] == ["--version"]:
        from perlcli import __version__

        print(f"perlcli {__version__}")
        return 0
    from perlcli.cli.app import main

    main()  # ends by SystemExit
    return 0


def is_ours(arguments: list[str]) -> bool:
    """Whether `perl ARGUMENTS` is a call of perlcli, not of the Perl interpreter."""
    return bool(os.environ.get(COMPLETION_VARIABLE)) or (bool(arguments) and arguments[0] in COMMANDS + OPTIONS)


def hand_over(arguments: list[str]) -> int:
    """Replaces this process with the Perl interpreter; returns an exit code only if that is impossible."""
    from perlcli.interpreter import find_interpreter

    suggest_command(arguments)
    interpreter = find_interpreter(os.environ.get("PATH", os.defpath))
    if interpreter is None:
        _warn("perlcli: no Perl interpreter on PATH to hand this call to")
        _warn("Hint: install Perl or add its folder to PATH; 'perl --help' lists the commands of perlcli")
        return EXIT_NOT_FOUND
    restore_signals()
    restore_locale()
    try:
        os.execv(interpreter, [interpreter, *arguments])
    except OSError as error:
        _warn(f"perlcli: the Perl interpreter {interpreter} does not start: {error.strerror}")
        _warn("Hint: repair it, or put the folder of another one before it on PATH")
        return EXIT_NOT_EXECUTABLE


def suggest_command(arguments: list[str]) -> None:
    """Prints the command that was probably meant, if Perl is about to report that there is no such file."""
    if not arguments or arguments[0].startswith("-") or os.path.exists(arguments[0]):
        return
    from difflib import get_close_matches

    for command in get_close_matches(arguments[0].lower(), COMMANDS, n=1):
        _warn(f"perlcli: did you mean 'perl {command}'?")


def restore_signals() -> None:
    """Stops ignoring the signals that Python ignores, so that `perl … | head` ends by SIGPIPE, not with an error."""
    # The module `signal` takes 5 ms, since it imports enum; this is its compiled part, which has no type stub.
    from _signal import SIG_DFL, SIGPIPE, SIGXFSZ, signal  # type: ignore[import-not-found]

    signal(SIGPIPE, SIG_DFL)
    signal(SIGXFSZ, SIG_DFL)


def restore_locale() -> None:
    """Sets LC_CTYPE back to the value that this process inherited: Python changes it in the C locale (PEP 538)."""
    if "LC_CTYPE" not in os.environ:
        return
    try:
        with open("/proc/self/environ", "rb", buffering=0) as file:
            inherited = dict(variable.partition(b"=")[::2] for variable in file.read().split(b"\0"))
    except OSError:  # no such file outside Linux: keep the value
        return
    if b"LC_CTYPE" in inherited:
        os.environb[b"LC_CTYPE"] = inherited[b"LC_CTYPE"]
    else:
        del os.environ["LC_CTYPE"]


def _warn(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
