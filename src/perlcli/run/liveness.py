"""Which process a run is of, and whether it still lives: so that a run that was killed isn't taken for one at work."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

PROC = Path("/proc")
ENDED = ("Z", "X")  # a process that is gone and still listed: a zombie, whose parent hasn't asked for it

Life = Literal["alive", "gone", "unknown"]


def mark() -> dict[str, Any]:
    """What tells this process from all others: its number, when it started, and a digest of its machine's name."""
    return {"pid": os.getpid(), "started": start_of(os.getpid()), "host": host()}


def life(process: Mapping[str, Any]) -> Life:
    """Whether the process of a mark lives; `unknown` for one of another machine, or that the system doesn't show."""
    pid, started = process.get("pid"), process.get("started")
    if not isinstance(pid, int) or isinstance(pid, bool) or pid <= 0 or process.get("host") != host():
        return "unknown"
    found = start_of(pid)
    if found is None:
        return "unknown" if is_hidden(pid) else "gone"
    return "alive" if found == started else "gone"  # its number was given to another


def host() -> str:
    """A digest of this machine's name, to compare with; a name can hold that of its user, so it isn't kept itself."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:12]


def start_of(pid: int) -> str | None:
    """When a process started, as an opaque text that no other process of its number has; None where there is none."""
    return _from_proc(pid) if (PROC / "self" / "stat").exists() else _from_ps(pid)


def is_hidden(pid: int) -> bool:
    """Whether there is a process of this number that belongs to someone else: some systems show only one's own."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _from_proc(pid: int) -> str | None:
    """By Linux: clock ticks since the boot, with that boot's id, so that a clock that is set changes nothing."""
    try:
        text = (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
        boot = (PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before may hold blanks and brackets
    return None if fields[0] in ENDED else f"{boot[:8]}-{fields[19]}"


def _from_ps(pid: int) -> str | None:
    """By `ps`, which macOS and the BSDs have."""
    try:
        found = subprocess.run(
            ["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, timeout=5, check=False,
            env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    state, _, started = found.stdout.strip().partition(" ")
    return None if not started or state.startswith(ENDED) else " ".join(started.split())
