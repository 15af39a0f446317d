"""Launchers of several processes, such as torchrun: refused, since each process would write the same run."""

from __future__ import annotations

import os

from perlcli.errors import PerlError
from perlcli.text import shorten

# How many processes were launched, as torchrun, accelerate and schedulers say it, MPI's libraries, and srun.
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
# What torchrun tells its processes. With LOCAL_RANK, accelerate would set up communication even for a single process.
OF_ONE = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
HINT = "start it once, without torchrun, accelerate launch, mpirun or srun -n; it uses one GPU"


def check(command: str) -> None:
    """Raises PerlError if this is one of several processes that were launched together. A single one becomes an
    ordinary process."""
    for name in SIZES:
        text = os.environ.get(name, "").strip()
        if text and not text.isdecimal():
            raise PerlError(f"The environment variable {name} must be a whole number, not {shorten(text)}", HINT)
        if text and int(text) > 1:
            problem = f"perl {command} was started in {int(text):,} processes ({name}={text}), but runs in only one"
            raise PerlError(f"{problem}: several processes are not supported yet", HINT)
    for name in OF_ONE:
        os.environ.pop(name, None)
