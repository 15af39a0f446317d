"""The console scripts `perl` and `perlcli`: run our commands and hand every other call to the Perl interpreter.

An activated environment puts our `perl` before the system's, so scripts, one-liners and `#!/usr/bin/env perl` files
reach us too. A call is ours when its first argument is exactly one of COMMANDS or OPTIONS, or when a shell asks for
completions. Any other call replaces this process with the next Perl interpreter on PATH: same process, arguments,
standard streams, environment and signals. That includes a bare `perl` (the program is standard input), `perl -h` and
`perl -v`. `perlcli` and `python -m perlcli` are always ours.

Where standard input is a terminal, a person types: a bare `perl`, `perl -h` and `perl help` are ours then, too, and a
word that is neither a command nor a file is answered by us, with the command that was probably meant.

If a file is named like a command, the command wins: `perl sft` is ours, `perl ./sft` and `perl -- sft` run the file.

This module runs before each Perl program, so it imports only `os` and `sys`, and anything else where it is needed.
"""

import os
import sys

STAGES = ("sft", "reward", "rl", "eval", "merge", "quickstart", "compare-full")
COMMANDS = (*STAGES, "runs", "report", "estimate", "doctor", "serve", "data", "recipes")
OPTIONS = ("--help", "--version", "--install-completion", "--show-completion")
# What people look for under another name. Other words get the command that is spelled alike.
MEANT = {
    **dict.fromkeys(("chat", "generate", "sample", "evaluate", "test", "predict", "infer"), "eval"),
    **dict.fromkeys(("train", "finetune", "fine-tune"), "sft"),
    **dict.fromkeys(("rlhf", "ppo", "grpo", "rloo", "reinforce"), "rl"),
    **dict.fromkeys(("dpo", "rm", "reward-model", "preference"), "reward"),
    **dict.fromkeys(("start", "init", "demo", "example", "tutorial"), "quickstart"),
    **dict.fromkeys(("list", "ls", "status", "watch"), "runs"),
    **dict.fromkeys(("convert", "check", "show"), "data"),
    **dict.fromkeys(("memory", "vram"), "estimate"),
    **dict.fromkeys(("env", "info"), "doctor"),
    "compare": "compare-full",
    "version": "--version",
}
HELP = "help"
COMPLETION_VARIABLE = "_PERL_COMPLETE"  # set by the completion script of the shell, name as Typer builds it

EXIT_UNKNOWN, EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND = 2, 126, 127  # as Perl and shells report them


def perl() -> int:
    """Runs the console script `perl`: one of our commands, or the Perl interpreter in place of this process."""
    arguments = sys.argv[1:]
    if is_ours(arguments):
        return perlcli()
    if not is_typed():
        return hand_over(arguments)
    if asks_for_help(arguments):
        return perlcli()
    return refuse(arguments[0]) if is_unknown_word(arguments) else hand_over(arguments)


def perlcli() -> int:
    """Runs the console script `perlcli`, which is always ours. Prints the version without loading the commands. Without
    arguments it is `--help`, and `help COMMAND` is `COMMAND --help`."""
    if asks_for_help(sys.argv[1:]) and not os.environ.get(COMPLETION_VARIABLE):
        sys.argv[1:] = [*sys.argv[2:], "--help"]
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


def is_typed() -> bool:
    """Whether a person may be typing: standard input is a terminal, not a program or what another program writes."""
    try:
        return os.isatty(0)
    except OSError:  # closed
        return False


def asks_for_help(arguments: list[str]) -> bool:
    """Whether a call asks for help in another way than by `--help`: without any arguments, by `help` or by `-h`."""
    if arguments[:1] == [HELP]:
        return not os.path.exists(HELP)
    return arguments in ([], ["-h"])


def is_unknown_word(arguments: list[str]) -> bool:
    """Whether a call starts with a word, rather than an option or the name of a script, and there is no such file."""
    first = arguments[0] if arguments else ""
    is_word = first[:1].isalpha() and first.replace("-", "").replace("_", "").isalnum()
    return is_word and not os.path.exists(first)


def refuse(word: str) -> int:
    """Says that there is no such command, and which was probably meant; returns the exit code that Perl would have."""
    command = nearest(word)
    hint = f"did you mean 'perl {command}'?" if command else "'perl --help' lists the commands"
    _warn(f"perlcli: there is no command '{word}' and no file of that name; {hint}")
    return EXIT_UNKNOWN


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
    if command := similar(arguments[0]):
        _warn(f"perlcli: did you mean 'perl {command}'?")


def nearest(word: str) -> str:
    """The command that a word was probably meant for, by its meaning or spelling; empty if there is none."""
    return MEANT.get(word.lower()) or similar(word)


def similar(word: str) -> str:
    """The command that is spelled like a word; empty if there is none."""
    from difflib import get_close_matches

    return next(iter(get_close_matches(word.lower(), COMMANDS, n=1)), "")


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
