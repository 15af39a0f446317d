"""`perl doctor`: what this machine has, what works on it, and what to do about the rest; one line per check."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator, Iterator

from perlcli import settings
from perlcli.doctor import checks, torch_checks
from perlcli.doctor.checks import Finding, clean, examine
from perlcli.errors import RunFailed

# With -P, a file in the current folder can't be imported in place of a library.
CHILD = [sys.executable, "-P", "-m", "perlcli.doctor.torch_checks"]
TIMEOUT_SECONDS = 120.0  # for all checks of one process: a driver can hang
WIDTH = max(map(len, (*checks.CHECKS, *torch_checks.CHECKS)))


def run(given: settings.Doctor) -> None:
    """Print each finding as soon as it is known. Raises RunFailed if a check failed."""
    made = []
    for finding in findings():
        made.append(finding)
        if not given.doctor.json:
            print(line(finding), flush=True)
    failed = list(dict.fromkeys(finding.name for finding in made if finding.status == "FAIL"))
    if given.doctor.json:
        print(json.dumps({"ok": not failed, "checks": [dataclasses.asdict(finding) for finding in made]}, indent=2))
    if failed:
        raise RunFailed(f"Some checks failed: {', '.join(failed)}", "the lines marked FAIL say what to do")


def line(finding: Finding) -> str:
    """A finding as a line, with its hint below."""
    text = f"{finding.status:<4}  {finding.name:<{WIDTH}}  {finding.text}"
    return f"{text}\n{'':<{WIDTH + 8}}{finding.hint}" if finding.hint else text


def findings() -> Iterator[Finding]:
    """The findings of all checks, in order."""
    for name, check in checks.CHECKS.items():
        yield from examine(name, check)
    names = list(torch_checks.CHECKS)
    while names:
        before = len(names)
        yield from apart(names)
        if len(names) == before:
            return  # the process could not run even one check, and another would do no better


def apart(names: list[str]) -> Iterator[Finding]:
    """The findings of these checks, run in another process; removes those that ran from the list. If the process dies,
    the check that it was running has failed, and those after it stay on the list."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        words, empty, pipe = [*CHILD, *names], subprocess.DEVNULL, subprocess.PIPE
        with subprocess.Popen(words, stdin=empty, stdout=pipe, stderr=log, encoding="utf-8") as process:
            timeout = threading.Timer(TIMEOUT_SECONDS, process.kill)
            timeout.start()
            try:
                current = yield from read_findings(process, names)
            except BaseException:  # Ctrl-C, or the caller stops iterating
                process.kill()
                raise
            finally:
                is_late = not timeout.is_alive()
                timeout.cancel()
        log.seek(0)
        last = log.read().strip().splitlines()[-1:]
    if current or names:
        how = f"took more than {TIMEOUT_SECONDS:g} s" if is_late else ending(process.returncode)
        yield Finding(current or names[0], "FAIL", clean(": ".join([f"its process {how}", *last])))
    if current:
        names.remove(current)


def read_findings(process: subprocess.Popen[str], names: list[str]) -> Generator[Finding, None, str]:
    """The findings that a process writes; returns the name of the check that it started but did not finish, if any."""
    current = ""
    for text in process.stdout or ():
        try:
            message = json.loads(text)
        except ValueError:
            continue  # printed while Python starts, by a sitecustomize for example
        if "begin" in message:
            current = message["begin"]
        elif "end" in message:
            names.remove(current)
            current = ""
        else:
            yield Finding(**message)
    return current


def ending(code: int) -> str:
    """How a process ended."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
