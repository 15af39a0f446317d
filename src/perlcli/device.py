"""What this machine can do, and a clear error if it cannot do what the settings ask for."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perlcli import errors
from perlcli.errors import PerlError
from perlcli.settings import ModelSettings
from perlcli.text import megabytes

VISIBLE = "CUDA_VISIBLE_DEVICES"
DRIVER = Path("/proc/driver/nvidia/version")
CUDA_BUILD = "install a CUDA build of torch: pytorch.org/get-started"
DRIVER_HINT = (
    f"{CUDA_BUILD}, for a CUDA version that this driver supports (see nvidia-smi), or update the driver; a container "
    "needs the GPU: docker run --gpus all"
)
SMI_SECONDS = 10  # for nvidia-smi to answer: a driver can hang
LOOKED = 0.2  # seconds for which other processes are watched
FREE, TOTAL = "free_mb", "total_mb"  # of `describe`: the GPU's memory when a run starts
NO_BFLOAT16 = (
    "This GPU has no bfloat16, so --dtype auto loads the base in float32, which takes twice the memory of 16 bits: "
    "--dtype float16 or --load-in-4bit takes less"
)


def kind() -> str:
    """`cuda` if there is a GPU that torch can use, else `cpu`. The only place that asks."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def has_bf16(number: int = 0) -> bool:
    """Whether a GPU computes in bfloat16 itself, as NVIDIA's do from compute capability 8.0 on, and AMD's."""
    import torch

    return torch.version.hip is not None or torch.cuda.get_device_capability(number) >= (8, 0)


def spare_threads() -> None:
    """Limits torch to one CPU thread, for the embedded base: it is too small to gain from a second one, and on a busy
    machine threads that wait for each other (OpenMP spins) make a run many times slower."""
    import torch

    torch.set_num_threads(1)


def fork_rng() -> AbstractContextManager[None]:
    """Restores torch's random state at the end, on the CPU and on the GPU that this process uses. torch's own takes
    every visible GPU unless it is given some, and warns if there are several."""
    import torch

    return torch.random.fork_rng([torch.cuda.current_device()] if kind() == "cuda" else [])


def dtype_name(settings: ModelSettings) -> str:
    """The name of the dtype that the base is loaded in."""
    if settings.dtype != "auto":
        return settings.dtype
    quantised = settings.load_in_4bit or settings.load_in_8bit
    if kind() == "cuda" and not has_bf16():
        return "float16" if quantised else "float32"
    return "bfloat16" if quantised or kind() == "cuda" else "float32"


def precision(settings: ModelSettings) -> str:
    """The precision of the base in words: `4-bit`, `8-bit` or the dtype's name."""
    if settings.load_in_4bit:
        return "4-bit"
    return "8-bit" if settings.load_in_8bit else dtype_name(settings)


def check(settings: ModelSettings) -> None:
    """Raises PerlError if the machine lacks what the settings ask for."""
    check_installed(settings)
    if kind() == "cpu" and settings.dtype == "float16":
        raise PerlError("--dtype float16 needs a GPU: its range is too small for training on a CPU", "--dtype bfloat16")
    if kind() == "cuda" and settings.dtype == "bfloat16" and not has_bf16():
        raise PerlError("This GPU does not support --dtype bfloat16", "--dtype float16 or float32")


def check_installed(settings: ModelSettings) -> None:
    """Raises PerlError if a library that the settings ask for is missing. Loads none."""
    if (settings.load_in_4bit or settings.load_in_8bit) and importlib.util.find_spec("bitsandbytes") is None:
        bits = "4" if settings.load_in_4bit else "8"
        raise PerlError(f"--load-in-{bits}bit needs bitsandbytes, which isn't installed", "pip install bitsandbytes")


def describe(settings: ModelSettings, *, measures_memory: bool = True) -> dict[str, Any]:
    """The device, as saved in the record of a run; on a GPU with the memory that is free and in total, in MB. Measuring
    it takes some memory of the GPU until the process ends, which one that trains needs anyway."""
    import torch

    on_gpu = kind() == "cuda"
    name = torch.cuda.get_device_name(0) if on_gpu else _cpu_name()
    found = {"type": kind(), "name": name, "threads": torch.get_num_threads(), "precision": precision(settings)}
    if on_gpu and measures_memory:
        free, total = torch.cuda.mem_get_info()
        found |= {FREE: round(free / 1e6, 1), TOTAL: round(total / 1e6, 1)}
    return found


def identity(described: Mapping[str, Any]) -> dict[str, Any]:
    """What identifies a described device: everything but the memory that happened to be free."""
    return {name: value for name, value in described.items() if name != FREE}


def line(described: Mapping[str, Any]) -> str:
    """The first line of a run: device, precision, and on a GPU the memory that is free."""
    name = str(described["name"])
    if described["type"] == "cpu" and not name.startswith("CPU"):
        name = f"CPU, {name}"
    parts = [f"device: {name}", *filter(None, [described.get("precision")])]
    if FREE in described:
        parts.append(f"{megabytes(described[FREE])} of {megabytes(described[TOTAL])} free")
    return ", ".join(parts)


def remarks(settings: ModelSettings, *, takes_dtype: bool = True) -> Iterator[str]:
    """What a user should know of the device before a run: a GPU that is there but not used, one of several that is,
    CPU cores that are busy, and a base in float32 for lack of bfloat16, if --dtype decides how much memory it takes
    (`takes_dtype`)."""
    if kind() == "cpu":
        reason = why_cpu()
        if reason is not None:
            yield f"{reason.problem}{f' ({reason.hint})' if reason.hint else ''}."
        if waiting := busy_cores():
            yield waiting
        return
    several = which_gpu()
    if several:
        yield f"{several}."
    is_auto = settings.dtype == "auto" and not (settings.load_in_4bit or settings.load_in_8bit)
    if is_auto and takes_dtype and not has_bf16():
        yield f"{NO_BFLOAT16}."


def busy_cores() -> str:
    """A sentence if other processes use cores that torch's threads are meant for: these then wait for each other in
    each operation. They are not reduced here, since the number of threads decides how sums are rounded."""
    import psutil
    import torch

    threads, cores = torch.get_num_threads(), psutil.cpu_count() or 1
    if threads < 2:
        return ""
    used = psutil.cpu_percent(LOOKED) / 100 * cores  # by others: this process waits
    free = max(1, round(cores - used))
    if free >= min(threads, cores):
        return ""
    return (
        f"Other processes use {used:.1f} of the {cores} CPU cores. torch's {threads} threads would wait for each other "
        f"there: OMP_NUM_THREADS={free} can be several times faster."
    )


def which_gpu() -> str:
    """Which of several visible GPUs is used and how to choose another; empty if there is only one."""
    import torch

    count = torch.cuda.device_count()
    if count < 2:
        return ""
    names = os.environ.get(VISIBLE, "").split(",")
    second = names[1].strip() if len(names) > 1 else "1"
    return f"{count} GPUs are visible; a run uses the first one, and {VISIBLE}={second} selects the second"


@dataclass(frozen=True)
class WhyCpu:
    """Why the CPU is used although this machine has a GPU, and what to do about it."""

    problem: str
    hint: str = ""
    is_fault: bool = False  # of the installation; otherwise a choice, or a kind of GPU that is not supported


def why_cpu() -> WhyCpu | None:
    """Why torch can't use a GPU that is there; None if there is none."""
    import torch

    hidden, version = os.environ.get(VISIBLE), driver()
    if version and hidden is not None and hidden.strip() in ("", "-1"):
        return WhyCpu(f"{VISIBLE}={hidden!r} hides the GPUs: the CPU is used", f"unset {VISIBLE} to use one")
    if version and torch.version.cuda is None:
        problem = f"There is an NVIDIA driver ({version}), but torch is built for the CPU, which is used"
        return WhyCpu(problem, CUDA_BUILD)
    if version:
        problem = f"torch can't use the GPU: driver {version}" + (f", {VISIBLE}={hidden!r}" if hidden else "")
        return WhyCpu(f"{problem}, torch for CUDA {torch.version.cuda}: {_cuda_error()}", DRIVER_HINT, is_fault=True)
    if torch.xpu.is_available():
        return WhyCpu("Intel GPUs (XPU) are not supported yet: the CPU is used")
    if torch.backends.mps.is_available():
        return WhyCpu("Apple's GPU (MPS) is not supported yet: the CPU is used")
    return None


def _cuda_error() -> str:
    """What torch says about a GPU that it can't use, in one line."""
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return errors.line(error, 200)
    return "no device is visible"


def driver() -> str:
    """The version of the NVIDIA driver; `unknown` if there is one that does not answer, empty if there is none."""
    if shutil.which("nvidia-smi"):
        words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            answer = subprocess.run(words, capture_output=True, text=True, timeout=SMI_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return "unknown"
        if answer.returncode == 0 and answer.stdout.strip():
            return answer.stdout.split()[0]
    try:
        return next((word for word in DRIVER.read_text(encoding="utf-8").split() if word[:1].isdigit()), "")
    except OSError:
        return ""


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "CPU")
    except OSError:
        name = "CPU"
    return f"{name} ({os.cpu_count()} cores)"
