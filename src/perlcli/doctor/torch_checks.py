"""The checks of `perl doctor` that need torch. They run in another process, which may crash."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from perlcli import device, upstream
from perlcli.doctor.checks import Check, Finding, examine
from perlcli.errors import PerlError, reason
from perlcli.run import out_of_memory
from perlcli.text import size

BUSY = 0.1  # with a smaller share of its memory free, a GPU is in use by someone else
COMPILER = "sft and rl need a C compiler and Python's headers (Debian, Ubuntu: apt install gcc python3-dev)"
REINSTALL = "pip install --force-reinstall trl torch"
OFF = 1e-3  # the largest error of a log-probability or its gradient in float32
INSTEAD = {
    "float32": "reinstall torch",
    "bfloat16": "--dtype float32 (or float16 on a GPU)",
    "float16": "--dtype float32 or bfloat16",
    "8-bit": "pip install --upgrade bitsandbytes; until then --load-in-4bit or neither",
    "4-bit": "pip install --upgrade bitsandbytes; until then --load-in-8bit or neither",
}


def build() -> Iterator[Finding]:
    """How torch was built, and how many threads it uses."""
    import torch

    kinds = (("CUDA", torch.version.cuda), ("ROCm", torch.version.hip))
    built = next((f"{kind} {version}" for kind, version in kinds if version), "the CPU")
    yield Finding("torch", "ok", f"torch {torch.__version__}, built for {built}, threads: {torch.get_num_threads()}")


def gpus() -> Iterator[Finding]:
    """Each visible GPU, or why there is none."""
    import torch

    if device.kind() == "cpu":
        yield no_gpu()
        return
    for number in range(torch.cuda.device_count()):
        yield gpu(number)
    several = device.which_gpu()
    if several:
        yield Finding("gpu", "ok", several)


def no_gpu() -> Finding:
    """Why no GPU is used."""
    reason = device.why_cpu()
    if reason is None:
        return Finding("gpu", "ok", "none: the CPU is used")
    return Finding("gpu", "FAIL" if reason.is_fault else "warn", reason.problem, reason.hint)


def gpu(number: int) -> Finding:
    """A GPU: its name, memory, compute capability and driver, and whether it has bfloat16."""
    import torch

    free, total = torch.cuda.mem_get_info(number)
    major, minor = torch.cuda.get_device_capability(number)
    has_bf16 = device.has_bf16(number)
    text = f"{number}: {torch.cuda.get_device_name(number)}, {size(free)} of {size(total)} free"
    text += f", compute capability {major}.{minor}, {'bfloat16' if has_bf16 else 'no bfloat16'}"
    text += f", driver {device.driver() or 'unknown'}, CUDA {torch.version.cuda}"
    if visible := os.environ.get(device.VISIBLE):
        text += f", {device.VISIBLE}={visible}"
    if free < BUSY * total:
        hint = f"another process uses its memory; choose another GPU with {device.VISIBLE}"
        return Finding("gpu", "warn", text, hint)
    return Finding("gpu", "ok", text, "" if has_bf16 else device.NO_BFLOAT16)


def libraries() -> Iterator[Finding]:
    """Whether the training libraries can be imported."""
    from peft import PeftModel
    from trl import RewardTrainer, RLOOTrainer, SFTTrainer

    names = ", ".join(kind.__name__ for kind in (SFTTrainer, RewardTrainer, RLOOTrainer, PeftModel))
    yield Finding("libraries", "ok", f"{names} can be imported")


def kernels() -> Iterator[Finding]:
    """Whether TRL's head for log-probabilities works, which sft and rl need; on a GPU it compiles kernels first."""
    from perlcli.doctor import kernels as head

    on_gpu, began = device.kind() == "cuda", time.monotonic()
    try:
        off = head.error()
    except Exception as error:  # of Triton, the compiler or the driver
        if out_of_memory.failure(error) is not None:
            raise
        hint = COMPILER if on_gpu else REINSTALL
        yield Finding("kernels", "FAIL", f"TRL's log-probabilities can't be computed: {reason(error)}", hint)
        return
    where = "kernels compiled for the GPU" if on_gpu else "on the CPU"
    text = f"TRL's log-probabilities differ from torch's by {off:.1g} (at most {OFF:g}), {where}"
    if off <= OFF:  # false for NaN
        yield Finding("kernels", "ok", f"{text}, {time.monotonic() - began:.1f} s")
    else:
        yield Finding("kernels", "FAIL", text, REINSTALL)


def pictures() -> Iterator[Finding]:
    """Whether matplotlib can draw."""
    from perlcli.run import plots

    with tempfile.TemporaryDirectory() as folder:
        plots.bars(("a", "b"), (0.1, 0.2), "test", Path(folder) / "test.png")
    yield Finding("matplotlib", "ok", "can draw plots")


def precision(name: str) -> Iterator[Finding]:
    """Whether a precision works: the loss and gradients of a LoRA adapter on the embedded base, against float32."""
    from perlcli.doctor import precisions

    if name == "float16" and device.kind() != "cuda":
        return  # float16 only trains on a GPU
    began = time.monotonic()
    try:
        device.check(precisions.PRECISIONS[name])
    except PerlError as error:  # as training in this precision would raise
        yield Finding(name, "warn", error.problem, error.hint)
        return
    found = precisions.compare(name)
    place, least = "GPU" if device.kind() == "cuda" else "CPU", precisions.TOLERANCES[name][1]
    text = (
        f"loss {found.loss:.4f} (float32: {found.float32_loss:.4f}), gradients match float32's with "
        f"cosine {found.cosine:.5f} (at least {least}), {time.monotonic() - began:.1f} s on the {place}"
    )
    if found.is_right:
        yield Finding(name, "ok", text)
    else:
        yield Finding(name, "FAIL", f"differs from float32: {text}", INSTEAD[name])


CHECKS: dict[str, Check] = {"torch": build, "gpu": gpus, "libraries": libraries}
CHECKS |= {"kernels": kernels, "matplotlib": pictures}
CHECKS |= {name: partial(precision, name) for name in INSTEAD}


def main(names: Iterable[str]) -> None:
    """Run these checks; write each one's start, findings and end as lines of JSON to standard output."""
    output = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # for what the libraries print
    write = partial(print, file=output, flush=True)  # flushed, because the next check may crash this process
    upstream.hush()
    for name in names:
        write(json.dumps({"begin": name}))
        for finding in examine(name, CHECKS[name]):
            write(json.dumps(dataclasses.asdict(finding)))
        write(json.dumps({"end": name}))


if __name__ == "__main__":
    main(sys.argv[1:])
