"""Launchers such as torchrun and accelerate: several processes are refused, since each would write the same run, and so
is what a launcher sets in the environment that would change a run without its settings."""

from __future__ import annotations

import os
import time

from perlcli.errors import PerlError
from perlcli.text import clip, shorten

# How many processes were launched, as torchrun, accelerate and schedulers say it, MPI's libraries, and srun.
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "SLURM_PROCID")  # which one this is
# What torchrun tells its processes. With LOCAL_RANK, accelerate would set up communication even for a single process.
OF_ONE = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
HINT = "start it once, without torchrun, accelerate launch, mpirun or srun -n; it uses one GPU"
# What accelerate's Accelerator, inside of TRL's trainers, reads from the environment: of each variable the values that
# change nothing, what it stands for, and what to type instead.
OFF = ("", "0", "false", "no")
ONE_PROCESS = "start it without accelerate launch"
ACCELERATE = {
    "ACCELERATE_USE_FSDP": (OFF, "FSDP is not supported", ONE_PROCESS),
    "ACCELERATE_USE_DEEPSPEED": (OFF, "DeepSpeed is not supported", ONE_PROCESS),
    "ACCELERATE_USE_MEGATRON_LM": (OFF, "Megatron-LM is not supported", ONE_PROCESS),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (OFF, "parallelism over devices is not supported", ONE_PROCESS),
    "ACCELERATE_DYNAMO_BACKEND": (OFF, "compiled models are not supported", ONE_PROCESS),
    "ACCELERATE_MIXED_PRECISION": (OFF, "--dtype decides the precision", "--dtype bfloat16, float16 or float32"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        ("", "1"),
        "an option decides the passes per step",
        "--gradient-accumulation-steps N",
    ),
    "ACCELERATE_TORCH_DEVICE": (("",), "the device can't be chosen like that", "CUDA_VISIBLE_DEVICES=1 perl …"),
}
PATIENCE = 10.0  # seconds that other processes wait for the first one to say what is wrong


def check(command: str) -> None:
    """Raises PerlError if this is one of several processes that were launched together, or if accelerate would be
    set up by the environment. A single process becomes an ordinary one. Only the first of several says what is wrong:
    the others end without a word."""
    try:
        _check_size(command)
    except PerlError:
        if any(_is_later(os.environ.get(name, "")) for name in RANKS):
            time.sleep(PATIENCE)  # a launcher stops all processes as soon as one has failed
            raise SystemExit(PerlError.exit_code) from None
        raise
    for name, (neutral, what, hint) in ACCELERATE.items():
        text = os.environ.get(name, "").strip()
        if text.lower() not in neutral:
            problem = f"perl {command} was started with {name}={clip(text, 40)}, as accelerate launch sets it"
            raise PerlError(f"{problem}: {what}", f"{hint}, or unset {name}")
    for name in OF_ONE:
        os.environ.pop(name, None)
    if os.environ.pop("ACCELERATE_USE_CPU", "").strip().lower() not in OFF:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # else TRL's trainers alone would leave the GPU


def _check_size(command: str) -> None:
    for name in SIZES:
        text = os.environ.get(name, "").strip()
        if text and not text.isdecimal():
            raise PerlError(f"The environment variable {name} must be a whole number, not {shorten(text)}", HINT)
        if text and int(text) > 1:
            problem = f"perl {command} was started in {int(text):,} processes ({name}={text}), but runs in only one"
            raise PerlError(f"{problem}: several processes are not supported yet", HINT)


def _is_later(rank: str) -> bool:
    return rank.strip().isdecimal() and int(rank) > 0
