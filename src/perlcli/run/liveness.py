"""Which process a run belongs to and whether it still runs, so that a killed run doesn't look like one in progress."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

BOOT = Path("/proc/sys/kernel/random/boot_id")

Life = Literal["alive", "gone", "unknown"]


def mark() -> dict[str, Any]:
    """What identifies this process: its number, when it started, and a digest of the machine's name."""
    return {"pid": os.getpid(), "started": start_of(os.getpid()), "host": host()}


def life(process: Mapping[str, Any]) -> Life:
    """Whether the process with this mark is running; `unknown` on another machine, or if the system hides it."""
    pid, started = process.get("pid"), process.get("started")
    if not isinstance(pid, int) or isinstance(pid, bool) or pid <= 0 or process.get("host") != host():
        return "unknown"
    now = start_of(pid)
    if now is None:
        return "unknown" if is_hidden(pid) else "gone"
    return "alive" if now == started else "gone"  # another process has its number now


def host() -> str:
    """A digest of this machine's name; the name itself may contain the user's."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:12]


def start_of(pid: int) -> str | None:
    """When a process started, as an opaque text; None if there is no such process or it has ended. On Linux it is the
    time since the boot, with that boot's id, so that setting the clock changes nothing."""
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return None
        booted, started = psutil.boot_time(), process.create_time()
    except (psutil.Error, OverflowError):
        return None
    if not BOOT.exists():
        return str(started)
    ticks = round((started - booted) * os.sysconf("SC_CLK_TCK"))  # psutil had added the boot's time to them
    return f"{BOOT.read_text(encoding='ascii')[:8]}-{ticks}"


def is_hidden(pid: int) -> bool:
    """Whether a process of this number belongs to someone else: some systems only show a user's own."""
    try:
        os.kill(pid, 0)
    except (OSError, OverflowError) as error:
        return isinstance(error, PermissionError)
    return False
