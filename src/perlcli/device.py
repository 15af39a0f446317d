"""What this machine can do, and a clear error if it cannot do what the settings ask for."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from perlcli.errors import PerlError
from perlcli.settings import ModelSettings


def kind() -> str:
    """`cuda` if there is a GPU that torch can use, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def spare_threads() -> None:
    """Limits torch to one CPU thread, for the embedded base: it is too small to gain from a second one, and on a busy
    machine threads that wait for each other (OpenMP spins) make a run many times slower."""
    import torch

    torch.set_num_threads(1)


def dtype_name(settings: ModelSettings) -> str:
    """The name of the dtype that the base is loaded in."""
    if settings.dtype != "auto":
        return settings.dtype
    quantised = settings.load_in_4bit or settings.load_in_8bit
    if kind() == "cuda" and not _cuda_has_bf16():
        return "float16" if quantised else "float32"
    return "bfloat16" if quantised or kind() == "cuda" else "float32"


def precision(settings: ModelSettings) -> str:
    """The precision of the base in words: `4-bit`, `8-bit` or the dtype's name."""
    if settings.load_in_4bit:
        return "4-bit"
    return "8-bit" if settings.load_in_8bit else dtype_name(settings)


def check(settings: ModelSettings) -> None:
    """Raises PerlError if the machine lacks what the settings ask for."""
    if (settings.load_in_4bit or settings.load_in_8bit) and importlib.util.find_spec("bitsandbytes") is None:
        bits = "4" if settings.load_in_4bit else "8"
        raise PerlError(f"--load-in-{bits}bit needs bitsandbytes, which isn't installed", "pip install bitsandbytes")
    if kind() == "cpu" and settings.dtype == "float16":
        raise PerlError("--dtype float16 needs a GPU: its range is too small for training on a CPU", "--dtype bfloat16")
    if kind() == "cuda" and settings.dtype == "bfloat16" and not _cuda_has_bf16():
        raise PerlError("This GPU does not support --dtype bfloat16", "--dtype float16 or float32")


def describe(settings: ModelSettings) -> dict[str, Any]:
    """The device, as saved in the record of a run."""
    import torch

    name = torch.cuda.get_device_name(0) if kind() == "cuda" else _cpu_name()
    return {"type": kind(), "name": name, "threads": torch.get_num_threads(), "precision": precision(settings)}


def _cuda_has_bf16() -> bool:
    import torch

    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "CPU")
    except OSError:
        name = "CPU"
    return f"{name} ({os.cpu_count()} cores)"
