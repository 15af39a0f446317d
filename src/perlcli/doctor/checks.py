"""The checks of `perl doctor` that do not need torch: versions, processors, memory, disk, Hub, Perl interpreter."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from perlcli import interpreter as entry
from perlcli.errors import PerlError, reason
from perlcli.redaction import hidden
from perlcli.run import out_of_memory
from perlcli.run.record import version_of
from perlcli.text import counted, one_line, size

Status = Literal["ok", "warn", "FAIL"]
LOW_DISK, LOW_MEMORY = 5e9, 2e9  # bytes
CGROUP = Path("/sys/fs/cgroup")
PYPROJECT = Path(__file__).parents[3] / "pyproject.toml"  # of a checkout that isn't installed
QUANTISED = "bitsandbytes"
OPTIONAL = {
    "tensorboard": "--report-to tensorboard",
    "wandb": "--report-to wandb",
    "sentencepiece": "models that have a tokenizer.model but no tokenizer.json",
}


@dataclass(frozen=True)
class Finding:
    """The result of a check in one line, and what to do about it."""

    name: str
    status: Status
    text: str
    hint: str = ""


Check = Callable[[], Iterable[Finding]]


def examine(name: str, check: Check) -> list[Finding]:
    """The findings of a check, or its failure as a finding. No line contains a secret or the user's home folder."""
    findings: list[Finding] = []
    try:
        findings.extend(check())
    except (Exception, SystemExit) as error:
        known = out_of_memory.failure(error) or error
        if isinstance(known, PerlError):
            findings.append(Finding(name, "FAIL", known.problem, known.hint))
        else:
            text = reason(known) if isinstance(known, Exception) else f"it exited with {known.code}"
            findings.append(Finding(name, "FAIL", text))
    return [Finding(item.name, item.status, clean(item.text), clean(item.hint)) for item in findings]


def clean(text: str) -> str:
    """Text in one line, with `~` for the user's home and stars for secrets."""
    return one_line(hidden(text))


def python() -> Iterator[Finding]:
    """Whether this version of Python is supported."""
    from packaging.specifiers import SpecifierSet

    version, asked = platform.python_version(), requirements()[0]
    if SpecifierSet(asked).contains(version, prereleases=True):
        yield Finding("python", "ok", version)
    else:
        problem = f"{version}, but perlcli needs {asked}"
        yield Finding("python", "FAIL", problem, "create an environment with such a Python")


def requirements() -> tuple[str, list[str]]:
    """The Python version and packages that perlcli requires: as installed, or by the checkout's pyproject.toml."""
    with suppress(importlib.metadata.PackageNotFoundError):
        installed = importlib.metadata.distribution("perlcli")
        return installed.metadata["Requires-Python"] or "", list(installed.requires or [])
    try:
        project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    except OSError:
        problem = "perlcli is not installed as a package, so its requirements are unknown"
        raise PerlError(problem, "pip install perlcli") from None
    return project["requires-python"], project["dependencies"]


def packages() -> Iterator[Finding]:
    """The packages that perlcli needs: one line for all that are fine, and one for each problem."""
    from packaging.requirements import Requirement

    right = []
    for requirement in map(Requirement, requirements()[1]):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue  # an extra, or for another system
        name, asked = requirement.name, f"{requirement.name}{requirement.specifier}"
        version = version_of(name)
        if version is not None and requirement.specifier.contains(version, prereleases=True):
            right.append(f"{name} {version}")
            continue
        problem = f"{version} is installed, but perlcli needs {asked}" if version else "is not installed"
        if name == QUANTISED:
            problem += ": --load-in-8bit and --load-in-4bit need it"
        status: Status = "warn" if name == QUANTISED else "FAIL"
        yield Finding("packages", status, f"{name} {problem}", f"pip install '{asked}'")
    if right:
        yield Finding("packages", "ok", ", ".join(right))


def optional() -> Iterator[Finding]:
    """Packages that only some options need."""
    for name, use in OPTIONAL.items():
        version = version_of(name)
        missing = f"{name} is not installed; for {use}: pip install {name}"
        yield Finding("optional", "ok", missing if version is None else f"{name} {version}")


def processors() -> Iterator[Finding]:
    """The CPU cores that this process may use."""
    total = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else total
    threads = os.environ.get("OMP_NUM_THREADS")
    cores = f"{usable} of {total} cores" if usable < total else counted(total, "core")
    yield Finding("processors", "ok", cores + (f", OMP_NUM_THREADS={threads}" if threads else ""))


def memory() -> Iterator[Finding]:
    """The main memory that this process can use."""
    free, total = memory_sizes()
    text = f"{size(free)} of {size(total)} free"
    if free < LOW_MEMORY:
        yield Finding("memory", "warn", text, "stop other programs; perl estimate predicts how much a run needs")
    else:
        yield Finding("memory", "ok", text)


def memory_sizes() -> tuple[float, float]:
    """Free and total bytes of main memory: of the machine, or of the container if its limit is lower."""
    import psutil

    machine = psutil.virtual_memory()
    limit = _bytes("memory.max", "memory/memory.limit_in_bytes")
    used = (_bytes("memory.current", "memory/memory.usage_in_bytes") or 0.0) - _cached()
    if limit is not None and limit < machine.total:
        return max(0.0, min(machine.available, limit - used)), limit
    return machine.available, machine.total


def _cached() -> float:
    """The bytes of files that the container holds in memory, which the system gives up when memory is short."""
    with suppress(OSError, ValueError):
        lines = (CGROUP / "memory.stat").read_text(encoding="ascii").splitlines()
        return sum(float(size) for name, size in map(str.split, lines) if name in ("active_file", "inactive_file"))
    return 0.0


def _bytes(*names: str) -> float | None:
    """The number in the first of these files of the container's limits; None if there is none."""
    for name in names:
        with suppress(OSError, ValueError):  # no such file, or `max`
            return float((CGROUP / name).read_text(encoding="ascii"))
    return None


def disk() -> Iterator[Finding]:
    """Free space for runs, models and temporary files."""
    from huggingface_hub import constants

    try:
        yield space("this folder", Path.cwd(), "use another folder, or set --output to one with more space")
    except FileNotFoundError:
        yield Finding("disk", "FAIL", "the current folder was deleted", "cd to an existing folder")
    yield space("hub cache", Path(constants.HF_HUB_CACHE), "set HF_HOME to a folder with more space")
    yield space("temporary files", Path(tempfile.gettempdir()), "set TMPDIR to a folder with more space")


def space(what: str, folder: Path, hint: str) -> Finding:
    """The free space in a folder, or in the one that it will be created in."""
    existing = next(place for place in (folder, *folder.parents) if place.is_dir())
    free = shutil.disk_usage(existing).free
    text = f"{what}, {folder}: {size(free)} free"
    if not os.access(existing, os.W_OK):
        hint = hint.replace("with more space", "that you can write to")
        return Finding("disk", "warn", f"{text}, but it is not writable", hint)
    return Finding("disk", "warn", text, hint) if free < LOW_DISK else Finding("disk", "ok", text)


def hub() -> Iterator[Finding]:
    """Where models from the Hub are stored and whether a token is set. Makes no request and never shows the token."""
    from huggingface_hub import constants, get_token

    token = "a token is set" if get_token() else "no token is set; gated models need one (hf auth login)"
    offline = "HF_HUB_OFFLINE is set, so only cached models are used"
    models = offline if constants.HF_HUB_OFFLINE else f"models are downloaded to {constants.HF_HUB_CACHE}"
    yield Finding("hub", "ok", f"{models}; {token}")


def interpreter() -> Iterator[Finding]:
    """The Perl interpreter that runs Perl programs, and whether `perl` reaches perlcli at all."""
    path = os.environ.get("PATH", os.defpath)
    program, first = entry.find_interpreter(path), shutil.which("perl", path=path)
    if program is None:
        problem = "no Perl interpreter on PATH, so `perl SCRIPT` can't run Perl programs"
        yield Finding("perl", "warn", problem, "install Perl, or add its folder to PATH")
        return
    yield Finding("perl", "ok", f"Perl programs run with {program}")
    if first == program:
        hint = "use perlcli or python -m perlcli, or activate the environment of perlcli"
        yield Finding("perl", "warn", f"`perl` runs {first}, not perlcli", hint)


SOFTWARE: dict[str, Check] = {"python": python, "packages": packages, "optional": optional}
MACHINE: dict[str, Check] = {"processors": processors, "memory": memory, "disk": disk}
CHECKS = SOFTWARE | MACHINE | {"hub": hub, "perl": interpreter}
