"""Peak memory as it is measured: on a GPU of torch's tensors, on a CPU the resident set of the process."""

from __future__ import annotations

import resource
import sys

from perlcli import device


def begin() -> float:
    """Starts to measure a run; gives the process's resident set in MB. The peak on a GPU counts from here on."""
    if "torch" in sys.modules:  # else nothing was allocated yet, and a command without torch stays without
        _forget()
    return resident_mb()


def loaded_mb(before_mb: float) -> float:
    """The peak in MB since `begin`, above `before_mb` on a CPU. On a GPU the peak counts anew from here on; a process
    can't reset that of its resident set."""
    peak = peak_mb() if device.kind() == "cuda" else _above(before_mb)
    _forget()
    return peak


def of_training(before_mb: float) -> dict[str, float]:
    """The peak in MB since `loaded_mb`: on a GPU of the allocated and of the reserved memory, on a CPU of the process
    above `before_mb`, its resident set before the weights were loaded."""
    import torch

    if device.kind() == "cuda":
        return {"training_mb": peak_mb(), "reserved_mb": round(torch.cuda.max_memory_reserved() / 1e6, 1)}
    return {"training_mb": _above(before_mb)}


def peak_mb() -> float:
    """Peak memory so far in MB: allocated on the GPU, or the process's resident set on a CPU."""
    import torch

    if device.kind() == "cuda":
        return round(torch.cuda.max_memory_allocated() / 1e6, 1)
    return _most_resident_mb()


def resident_mb() -> float:
    """The process's resident set now, in MB; its peak on systems that do not report it."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return round(int(file.read().split()[1]) * resource.getpagesize() / 1e6, 1)
    except OSError:  # not Linux
        return _most_resident_mb()


def _above(before_mb: float) -> float:
    """The peak of the resident set above an earlier size; the system may count the two at different moments."""
    return max(0.0, round(peak_mb() - before_mb, 1))


def _forget() -> None:
    """Let torch give back what it has reserved without need, and count its peak from now on."""
    import torch

    if device.kind() == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _most_resident_mb() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)
