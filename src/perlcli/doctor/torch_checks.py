"""The checks of `perl doctor` that need torch, in a process of their own: one that crashes takes no other with it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TextIO

from perlcli import device, upstream
from perlcli.doctor.checks import GB, Finding, examine
from perlcli.errors import PerlError
from perlcli.settings import ModelSettings

DRIVER = Path("/proc/driver/nvidia/version")
CUDA_BUILD = "install a CUDA build of torch: pytorch.org/get-started"
BUSY = 0.1  # a GPU of whose memory less is free belongs to someone else
VISIBLE = "CUDA_VISIBLE_DEVICES"
INSTEAD = {
    "float32": "reinstall torch",
    "bfloat16": "--dtype float32 (or float16 on a GPU)",
    "float16": "--dtype float32 or bfloat16",
    "8-bit": "pip install --upgrade bitsandbytes; until then --load-in-4bit or neither",
    "4-bit": "pip install --upgrade bitsandbytes; until then --load-in-8bit or neither",
}


def build() -> Iterator[Finding]:
    """How torch was built, and the threads that it computes with."""
    import torch

    kinds = (("CUDA", torch.version.cuda), ("ROCm", torch.version.hip))
    built = next((f"{kind} {version}" for kind, version in kinds if version), "the CPU")
    yield Finding("torch", "ok", f"torch {torch.__version__}, built for {built}, threads: {torch.get_num_threads()}")


def gpus() -> Iterator[Finding]:
    """Each GPU in sight, or why there is none."""
    import torch

    if not torch.cuda.is_available():
        yield no_gpu(is_cpu_build=torch.version.cuda is None)
        return
    count = torch.cuda.device_count()
    for number in range(count):
        yield gpu(number)
    if count > 1:
        yield Finding("gpu", "ok", f"{count} GPUs in sight; a run uses the first, another one by {VISIBLE}=1")


def no_gpu(*, is_cpu_build: bool) -> Finding:
    """Why torch sees no GPU."""
    hidden, has_driver = os.environ.get(VISIBLE), driver()
    if not has_driver:
        return Finding("gpu", "ok", "none: training runs on the CPU")
    if hidden is not None and hidden.strip() in ("", "-1"):
        return Finding(
            "gpu", "warn", f"{VISIBLE}={hidden!r} hides the GPUs: training runs on the CPU", f"unset {VISIBLE}"
        )
    if is_cpu_build:
        return Finding(
            "gpu", "warn", f"there is an NVIDIA driver ({has_driver}), but torch is built for the CPU", CUDA_BUILD
        )
    told = f"torch can't use the GPU: driver {has_driver}" + (f", {VISIBLE}={hidden!r}" if hidden else "")
    return Finding("gpu", "FAIL", told, f"{CUDA_BUILD}, for a CUDA that this driver knows (nvidia-smi tells it)")


def gpu(number: int) -> Finding:
    """A GPU: its name, memory, compute capability and driver."""
    import torch

    free, total = torch.cuda.mem_get_info(number)
    major, minor = torch.cuda.get_device_capability(number)
    told = f"{number}: {torch.cuda.get_device_name(number)}, {free / GB:.1f} of {total / GB:.1f} GB free"
    told += f", compute capability {major}.{minor}, driver {driver() or 'unknown'}"
    if visible := os.environ.get(VISIBLE):
        told += f", {VISIBLE}={visible}"
    if free < BUSY * total:
        return Finding("gpu", "warn", told, f"another process has its memory; {VISIBLE} chooses another GPU")
    return Finding("gpu", "ok", told)


def driver() -> str:
    """The version of the NVIDIA driver; empty where there is none."""
    if shutil.which("nvidia-smi"):
        words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            found = subprocess.run(words, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return "unknown"
        if found.returncode == 0 and found.stdout.strip():
            return found.stdout.split()[0]
    return next((word for word in DRIVER.read_text().split() if word[:1].isdigit()), "") if DRIVER.exists() else ""


def libraries() -> Iterator[Finding]:
    """Whether the libraries that train can be imported, trainers and all."""
    from peft import PeftModel
    from trl import RewardTrainer, RLOOTrainer, SFTTrainer

    names = ", ".join(found.__name__ for found in (SFTTrainer, RewardTrainer, RLOOTrainer, PeftModel))
    yield Finding("libraries", "ok", f"{names} can be imported")


def pictures() -> Iterator[Finding]:
    """Whether matplotlib draws."""
    from perlcli.run import plots

    with tempfile.TemporaryDirectory() as folder:
        plots.bars(("a", "b"), (0.1, 0.2), "test", Path(folder) / "test.png")
    yield Finding("matplotlib", "ok", "draws pictures")


def precision(name: str) -> Iterator[Finding]:
    """Whether a precision works: loss and gradients of a LoRA adapter on the embedded base against float32's."""
    from perlcli.doctor import precisions

    began = time.monotonic()
    settings = precisions.PRECISIONS[name]
    if lack := lacking(settings):
        yield Finding(name, "warn", lack.problem, lack.hint)
        return
    found = precisions.compare(name)
    place, least = "GPU" if device.kind() == "cuda" else "CPU", precisions.TOLERANCES[name][1]
    told = (
        f"forward and backward, loss {found.loss:.4f} (float32: {found.float32_loss:.4f}), gradients as float32's by a "
        f"cosine of {found.cosine:.5f} (at least {least}), {time.monotonic() - began:.1f} s on the {place}"
    )
    if found.is_right:
        yield Finding(name, "ok", told)
    else:
        yield Finding(name, "FAIL", f"computes something else than float32: {told}", INSTEAD[name])


def lacking(settings: ModelSettings) -> PerlError | None:
    """What this machine lacks for a precision, as training would say it."""
    try:
        device.check(settings)
    except PerlError as error:
        return error
    return None


def half() -> Iterator[Finding]:
    """float16, which trains on a GPU alone."""
    if device.kind() == "cuda":
        yield from precision("float16")


CHECKS: dict[str, Callable[[], Iterable[Finding]]] = {
    "torch": build, "gpu": gpus, "libraries": libraries, "matplotlib": pictures,
    "float32": partial(precision, "float32"), "bfloat16": partial(precision, "bfloat16"), "float16": half,
    "8-bit": partial(precision, "8-bit"), "4-bit": partial(precision, "4-bit"),
}  # fmt: skip


def main(names: Iterable[str]) -> None:
    """Make these checks, telling each one's beginning, findings and end as a line of JSON on standard output."""
    told = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print goes elsewhere
    upstream.hush()
    for name in names:
        tell(told, {"begin": name})
        for found in examine(name, CHECKS[name]):
            tell(told, dataclasses.asdict(found))
        tell(told, {"end": name})


def tell(file: TextIO, content: dict[str, str]) -> None:
    """Write a line of JSON at once: the next check may end this process."""
    print(json.dumps(content), file=file, flush=True)
