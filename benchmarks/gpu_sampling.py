"""Tokens per second of `perl rl` sampling as it is, and of ways that could make it faster."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from gpu_work import best_of
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig

from perlcli.model import roles
from perlcli.rollouts.merged import merged

REPEATS = 3  # after the first call, which also compiles
COMPILED = ", compiled"
NAMES = ["q_proj", "k_proj", "v_proj", "o_proj"]


@contextmanager
def as_it_is(model: Any) -> Iterator[None]:
    """Adapters in float32 that convert their input, on a base in bfloat16."""
    with roles.casting(model, on=True):
        yield


@contextmanager
def bare_base(model: Any) -> Iterator[None]:
    """Without the adapter: what no way to compute it can exceed."""
    with model.disable_adapter():
        yield


@contextmanager
def bf16_adapters(model: Any) -> Iterator[None]:
    """Adapters in bfloat16 as well, so that nothing is converted."""
    for name, parameter in model.named_parameters():
        if not roles.is_base(name):
            parameter.data = parameter.data.to(torch.bfloat16)
    with roles.casting(model, on=False):
        yield
    roles.as_float32(model)


WAYS: dict[str, Callable[[Any], Any]] = {
    "as it is": as_it_is, "bare base": bare_base, "bf16 adapters": bf16_adapters, "merged copies": merged,
}  # fmt: skip


def measure(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second of each way in `job["ways"]`; with `, compiled`: with a static cache, compiled on a GPU."""
    gpu = job["device"] == "cuda"
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": 0} if gpu else None)
    lora = LoraConfig(r=job["rank"], target_modules=NAMES, task_type="CAUSAL_LM", init_lora_weights=False)
    model = roles.as_float32(get_peft_model(model, lora)).eval()
    torch.manual_seed(0)
    ids = torch.randint(5, 900, (job["batch"], job["prompt_tokens"]), device=model.device)
    found = {}
    for way in job["ways"]:
        with torch.no_grad(), WAYS[way.removesuffix(COMPILED)](model):
            found[way] = speed(model, ids, job["tokens"], static=way.endswith(COMPILED), gpu=gpu)
    return {"ways": found}


def speed(model: Any, ids: torch.Tensor, new: int, *, static: bool, gpu: bool) -> dict[str, float]:
    """Tokens per second, milliseconds per decoding step, and the seconds of the first call. TRL's config turns
    compilation off; its trainer's `generation_config` is public, so a caller can turn it on."""
    how = {"cache_implementation": "static"} if static else {"disable_compile": True}
    config = GenerationConfig(
        do_sample=True, max_new_tokens=new, min_new_tokens=new, top_k=0, eos_token_id=0, pad_token_id=1, **how
    )

    def sample() -> None:
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        assert out.shape[1] == ids.shape[1] + new

    start = time.perf_counter()
    sample()
    if gpu:
        torch.cuda.synchronize()
    first = time.perf_counter() - start
    seconds = best_of(sample, repeats=REPEATS, gpu=gpu)
    return {"tokens_s": ids.shape[0] * new / seconds, "token_ms": seconds / new * 1000, "first_s": first}
