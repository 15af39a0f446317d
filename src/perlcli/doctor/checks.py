"""The checks of `perl doctor` that need no torch: versions, processors, memory, disk, hub, the Perl interpreter."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from perlcli import interpreter as entry
from perlcli.errors import PerlError, reason
from perlcli.redaction import hidden
from perlcli.text import counted, one_line

Status = Literal["ok", "warn", "FAIL"]
GB = 1e9
LOW_DISK, LOW_MEMORY = 5 * GB, 2 * GB
PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
PYPROJECT = Path(__file__).parents[3] / "pyproject.toml"  # of a checkout that isn't installed
QUANTISED = "bitsandbytes"
OPTIONAL = {
    "tensorboard": "--report-to tensorboard",
    "wandb": "--report-to wandb",
    "sentencepiece": "models whose folder has a tokenizer.model and no tokenizer.json",
}


@dataclass(frozen=True)
class Finding:
    """What a check found, in a line, and what to do about it."""

    name: str
    status: Status
    text: str
    hint: str = ""


def examine(name: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """What a check finds; where it can't be made at all, that is the finding. No line holds a secret or a home."""
    found: list[Finding] = []
    try:
        found.extend(check())
    except PerlError as error:
        found.append(Finding(name, "FAIL", error.problem, error.hint))
    except (Exception, SystemExit) as error:
        text = reason(error) if isinstance(error, Exception) else f"it ended Python with {error.code}"
        found.append(Finding(name, "FAIL", text))
    return [Finding(item.name, item.status, clean(item.text), clean(item.hint)) for item in found]


def clean(text: str) -> str:
    """Text in one line, with `~` for the user's home and stars for the values of variables that hold secrets."""
    return one_line(hidden(text))


def python() -> Iterator[Finding]:
    """Python against what perlcli asks for."""
    from packaging.specifiers import SpecifierSet

    version, asked = platform.python_version(), demands()[0]
    is_right = SpecifierSet(asked).contains(version, prereleases=True)
    yield (
        Finding("python", "ok", version)
        if is_right
        else Finding(
            "python", "FAIL", f"{version}, where perlcli needs {asked}", "make an environment with such a Python"
        )
    )


def demands() -> tuple[str, list[str]]:
    """What perlcli asks of Python, and of other packages: as installed, or as the checkout says that it runs from."""
    try:
        found = importlib.metadata.distribution("perlcli")
    except importlib.metadata.PackageNotFoundError:
        try:
            project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
        except OSError:
            problem = "perlcli isn't installed as a package, so what it needs can't be told"
            raise PerlError(problem, "pip install perlcli") from None
        return project["requires-python"], project["dependencies"]
    return found.metadata["Requires-Python"] or "", list(found.requires or [])


def packages() -> Iterator[Finding]:
    """Each package that perlcli needs: one line for all that are right, one for each that isn't."""
    from packaging.requirements import Requirement

    right = []
    for requirement in map(Requirement, demands()[1]):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue  # for development, or for another system
        version, asked = version_of(requirement.name), f"{requirement.name}{requirement.specifier}"
        if version is not None and requirement.specifier.contains(version, prereleases=True):
            right.append(f"{requirement.name} {version}")
            continue
        told = "is not installed" if version is None else f"{version} is installed, where perlcli needs {asked}"
        yield Finding("packages", *lack_of(requirement.name, told), f"pip install '{asked}'")
    if right:
        yield Finding("packages", "ok", ", ".join(right))


def version_of(name: str) -> str | None:
    """A package's version, None where it isn't installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def lack_of(name: str, told: str) -> tuple[Status, str]:
    """How grave it is that a package isn't as it should be: without bitsandbytes, all but two options work."""
    if name == QUANTISED:
        return "warn", f"{name} {told}: --load-in-8bit and --load-in-4bit need it"
    return "FAIL", f"{name} {told}"


def optional() -> Iterator[Finding]:
    """Packages that some options need, and how to get them."""
    for name, use in OPTIONAL.items():
        version = version_of(name)
        told = f"{name} is not installed; for {use}: pip install {name}" if version is None else f"{name} {version}"
        yield Finding("optional", "ok", told)


def processors() -> Iterator[Finding]:
    """The cores that this process may use."""
    all_of = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else all_of
    threads = os.environ.get("OMP_NUM_THREADS")
    told = f"{usable} of {all_of} cores" if usable < all_of else counted(all_of, "core")
    yield Finding("processors", "ok", told + (f", OMP_NUM_THREADS={threads}" if threads else ""))


def memory() -> Iterator[Finding]:
    """Main memory, as far as this process may have it."""
    free, total = memory_sizes()
    told = f"{free / GB:.1f} of {total / GB:.1f} GB free"
    if free < LOW_MEMORY:
        yield Finding("memory", "warn", told, "perl estimate tells what a model takes; end what else is running")
    else:
        yield Finding("memory", "ok", told)


def memory_sizes() -> tuple[float, float]:
    """Bytes of main memory that are free, and in all: of the machine, or of the container where that has less."""
    lines = (PROC / "meminfo").read_text(encoding="ascii").splitlines() if (PROC / "meminfo").exists() else []
    sizes = {line.split(":")[0]: float(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
    total = sizes.get("MemTotal") or float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    free = sizes.get("MemAvailable", total)
    limit, used = (
        _bytes("memory.max", "memory/memory.limit_in_bytes"),
        _bytes("memory.current", "memory/memory.usage_in_bytes"),
    )
    if limit is not None and limit < total:
        return max(0.0, min(free, limit - (used or 0.0))), limit
    return free, total


def _bytes(*names: str) -> float | None:
    """The number in the first of some files of the container's limits; None where there is none."""
    for name in names:
        try:
            return float((CGROUP / name).read_text(encoding="ascii"))
        except (OSError, ValueError):  # no such file, or `max`
            continue
    return None


def disk() -> Iterator[Finding]:
    """Room where runs, models and temporary files go."""
    from huggingface_hub import constants

    try:
        yield room("this folder", Path.cwd(), "cd elsewhere, or give each run an --output with more room")
    except FileNotFoundError:
        yield Finding("disk", "FAIL", "the folder that you are in was deleted", "cd to one that is there")
    yield room("hub cache", Path(constants.HF_HUB_CACHE), "set HF_HOME to a folder with more room")
    yield room("temporary files", Path(tempfile.gettempdir()), "set TMPDIR to a folder with more room")


def room(what: str, folder: Path, hint: str) -> Finding:
    """The room in a folder, or in the one that it will be made in."""
    standing = next(place for place in (folder, *folder.parents) if place.is_dir())
    free = shutil.disk_usage(standing).free
    told = f"{what}, {folder}: {free / GB:.1f} GB free"
    if not os.access(standing, os.W_OK):
        return Finding(
            "disk", "warn", f"{told}, but nothing can be written there", hint.replace("with more room", "of yours")
        )
    return Finding("disk", "warn", told, hint) if free < LOW_DISK else Finding("disk", "ok", told)


def hub() -> Iterator[Finding]:
    """How models come from the hub. Nothing is asked of it; a token is told of, never shown."""
    from huggingface_hub import constants, get_token

    token = "a token is set" if get_token() else "no token is set, as gated models need one (hf auth login)"
    if constants.HF_HUB_OFFLINE:
        yield Finding("hub", "ok", f"HF_HUB_OFFLINE is set: only what lies in the cache is used; {token}")
    else:
        yield Finding("hub", "ok", f"models are downloaded to {constants.HF_HUB_CACHE}; {token}")


def interpreter() -> Iterator[Finding]:
    """The Perl interpreter that calls which aren't ours are handed to, and whether `perl` reaches us at all."""
    path = os.environ.get("PATH", os.defpath)
    found, first = entry.find_interpreter(path), shutil.which("perl", path=path)
    if found is None:
        yield Finding("perl", "warn", "no Perl interpreter on PATH: Perl programs can't be run by the name perl",
                      "install Perl, or add its folder to PATH")  # fmt: skip
    else:
        yield Finding("perl", "ok", f"Perl programs are handed to {found}")
    if first is not None and first == found:
        yield Finding("perl", "warn", f"the name perl leads to {first} and not to perlcli",
                      "type perlcli or python -m perlcli, or activate the environment that has it")  # fmt: skip


CHECKS: dict[str, Callable[[], Iterable[Finding]]] = {
    "python": python, "packages": packages, "optional": optional, "processors": processors, "memory": memory,
    "disk": disk, "hub": hub, "perl": interpreter,
}  # fmt: skip
