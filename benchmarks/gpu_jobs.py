"""The jobs of gpu_proof.py in order of value: what each one measures, and the seconds that it takes on an H100."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SMALL, LARGE = "small", "large"
MACHINE, RL, REWARD, INPUTS, SAMPLING = "machine", "rl", "reward", "inputs", "sampling"
FINISHED, NO_MEMORY, NO_GPU, FAILED = "finished", "out of memory", "needs a GPU", "failed"
FOR_GOOD = (FINISHED, NO_MEMORY, NO_GPU)  # outcomes that no second try would change
REENTRANT = 'gradient_checkpointing_kwargs={{"use_reentrant": {}}}'
# What a step consists of, by shape; every other shape is measured with the sizes of "".
SIZES: dict[str, dict[str, dict[str, int]]] = {
    "": {
        RL: {"batch": 16, "generations": 4, "tokens": 64, "prompt_tokens": 192, "steps": 7, "rank": 16},
        REWARD: {"length": 512, "batch": 8, "steps": 8},
    },
    "llama-3.1-8b": {
        RL: {"batch": 8, "generations": 4, "tokens": 64, "prompt_tokens": 192, "steps": 5, "rank": 16},
        REWARD: {"length": 512, "batch": 8, "steps": 5},
    },
    "tiny": {
        RL: {"batch": 4, "generations": 2, "tokens": 4, "prompt_tokens": 12, "steps": 3, "rank": 4},
        REWARD: {"length": 48, "batch": 2, "steps": 3},
    },
}


@dataclass(frozen=True)
class Job:
    """One measurement, in a process of its own."""

    name: str
    kind: str  # of gpu_work.KINDS
    seconds: float  # expected on an H100
    values: dict[str, Any] = field(default_factory=dict)
    needs: str = ""  # the job that writes what this one reads


def sizes_of(shape: str) -> dict[str, dict[str, int]]:
    """The sizes of a step on a model of this shape, for RL and for reward models."""
    return SIZES.get(shape, SIZES[""])


def every_job(small: str, large: str) -> list[Job]:
    """All jobs for these two shapes, the most valuable ones first: what is left out loses the least."""

    def inputs(which: str, seconds: float) -> Job:
        return Job(f"inputs-{which}", INPUTS, seconds, of(which, RL) | {"length": of(which, REWARD)["length"]})

    def rl(which: str, precision: str, arm: str, seconds: float) -> Job:
        short = "bf16" if precision == "bfloat16" else precision
        values = {"arm": arm, "precision": precision, **of(which, RL)}
        return Job(f"rl-{which}-{short}-{arm}", RL, seconds, values, f"inputs-{which}")

    def reward(which: str, arm: str, seconds: float, more: str = "", reentrant: str = "") -> Job:
        words = ("--set", REENTRANT.format(reentrant)) if reentrant else ()
        values = {"arm": arm, "words": words, "checkpointing": more != "-unchecked", **of(which, REWARD)}
        return Job(f"reward-{which}-{arm}{more}", REWARD, seconds, values, f"inputs-{which}")

    def sampling(name: str, seconds: float, *ways: str) -> Job:
        return Job(name, SAMPLING, seconds, {"ways": ways, **of(SMALL, RL)}, f"inputs-{SMALL}")

    def of(which: str, kind: str) -> dict[str, Any]:
        shape = small if which == SMALL else large
        return {"shape": shape, "folder": which, **sizes_of(shape)[kind]}

    return [
        Job(MACHINE, MACHINE, 28),
        inputs(SMALL, 8),
        rl(SMALL, "bfloat16", "perl", 56),
        rl(SMALL, "bfloat16", "stock", 41),
        rl(SMALL, "bfloat16", "full", 27),
        reward(SMALL, "lora", 14),
        reward(SMALL, "full", 22),
        reward(SMALL, "lora-4bit", 15),
        inputs(LARGE, 44),
        rl(LARGE, "bfloat16", "perl", 70),
        rl(LARGE, "bfloat16", "stock", 69),
        rl(LARGE, "4bit", "perl", 80),
        rl(LARGE, "4bit", "stock", 84),
        Job("tests", "tests", 120),
        Job("roles", "roles", 70),
        rl(SMALL, "bfloat16", "perl-unshared", 56),
        rl(SMALL, "bfloat16", "perl-merged", 50),
        sampling("sampling", 30, "as it is", "bare base", "bf16 adapters", "merged copies"),
        reward(SMALL, "lora", 13, "-unchecked"),
        reward(SMALL, "full", 20, "-unchecked"),
        rl(SMALL, "4bit", "perl", 45),
        rl(SMALL, "4bit", "stock", 47),
        sampling("sampling-compiled-merged", 30, "merged copies, compiled"),
        rl(SMALL, "bfloat16", "perl-4-rewards", 35),
        reward(SMALL, "lora-8bit", 17, "-non-reentrant", "false"),
        reward(SMALL, "lora-8bit", 17, "-reentrant", "true"),
        reward(LARGE, "lora-4bit", 28),
        reward(LARGE, "lora", 24),
        Job("no-room", "no_room", 25, of(SMALL, REWARD), f"inputs-{SMALL}"),
        Job("resume", "resume", 15),
        Job("precisions", "precisions", 15),
        rl(LARGE, "bfloat16", "full", 75),
        sampling("sampling-compiled-bf16", 45, "bf16 adapters, compiled"),
        sampling("sampling-compiled", 45, "as it is, compiled"),
    ]
