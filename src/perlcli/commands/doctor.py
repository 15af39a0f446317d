"""`perl doctor`: what this machine has and what works on it, a line a check, and what to do about what doesn't."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator, Iterator
from pathlib import Path

from perlcli import settings
from perlcli.doctor import checks, torch_checks
from perlcli.doctor.checks import Finding, clean, examine
from perlcli.errors import RunFailed

# A place of its own behind all others: what lies in the current folder must not stand in for a library.
CODE = (
    "import sys; sys.path.append(sys.argv[1]); from perlcli.doctor import torch_checks; torch_checks.main(sys.argv[2:])"
)
CHILD = [sys.executable, "-P", "-c", CODE, str(Path(__file__).parents[2])]
PATIENCE_SECONDS = 120.0  # for all checks of one process: a driver can hang
WIDTH = max(map(len, (*checks.CHECKS, *torch_checks.CHECKS)))


def run(given: settings.Doctor) -> None:
    """Print what each check found, as it is found; raises RunFailed where something doesn't work."""
    found = []
    for item in findings():
        found.append(item)
        if not given.doctor.json:
            print(line(item), flush=True)
    failed = list(dict.fromkeys(item.name for item in found if item.status == "FAIL"))
    if given.doctor.json:
        print(json.dumps({"ok": not failed, "checks": [dataclasses.asdict(item) for item in found]}, indent=2))
    if failed:
        raise RunFailed(f"Not everything works: {', '.join(failed)}", "the lines marked FAIL say what to do")


def line(found: Finding) -> str:
    """A finding as a line, with what to do about it beneath."""
    text = f"{found.status:<4}  {found.name:<{WIDTH}}  {found.text}"
    return f"{text}\n{'':<{WIDTH + 8}}{found.hint}" if found.hint else text


def findings() -> Iterator[Finding]:
    """All that the checks find, in their order."""
    for name, check in checks.CHECKS.items():
        yield from examine(name, check)
    names = list(torch_checks.CHECKS)
    while names:
        before = len(names)
        yield from apart(names)
        if len(names) == before:
            return  # not even one could be made, and the next process would be no better


def apart(names: list[str]) -> Iterator[Finding]:
    """What the checks of these names find in a process of their own; those that were made are taken off the list.

    Where the process dies, the check that it died in failed; the others are left on the list.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        with subprocess.Popen(
            [*CHILD, *names], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said, encoding="utf-8",
        ) as process:  # fmt: skip
            patience = threading.Timer(PATIENCE_SECONDS, process.kill)
            patience.start()
            try:
                current = yield from heard(process, names)
            except BaseException:  # Ctrl-C, or nobody wants to hear the rest
                process.kill()
                raise
            finally:
                is_late = not patience.is_alive()
                patience.cancel()
        said.seek(0)
        last = said.read().strip().splitlines()[-1:]
    if current or names:
        how = f"took more than {PATIENCE_SECONDS:g} s" if is_late else ending(process.returncode)
        yield Finding(current or names[0], "FAIL", clean(": ".join([f"its process {how}", *last])))
    if current:
        names.remove(current)


def heard(process: subprocess.Popen[str], names: list[str]) -> Generator[Finding, None, str]:
    """The findings that a process tells; gives the name of the check that it began and did not end, if any."""
    current = ""
    for text in process.stdout or ():
        try:
            told = json.loads(text)
        except ValueError:
            continue  # what Python's own start-up prints, where someone made it print
        if "begin" in told:
            current = told["begin"]
        elif "end" in told:
            names.remove(current)
            current = ""
        else:
            yield Finding(**told)
    return current


def ending(code: int) -> str:
    """How a process ended."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
