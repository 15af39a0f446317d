"""What CUDA does differently, imitated on a CPU: as fixtures for a test, or for all tests of a process.

    PERLCLI_IMITATE=cuda python -m pytest -n0 tests/commands/test_rl.py

`IMITATIONS` names each. None of them is a GPU: kernels are torch's for CPUs, so figures mean nothing here. What they
bring to light is a branch of a library that no CPU takes by itself."""

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

NO_ROOM = (
    "CUDA out of memory. Tried to allocate 112.00 MiB. GPU 0 has a total capacity of 23.65 GiB of which 80.00 MiB is "
    "free. Including non-PyTorch memory, this process has 23.57 GiB memory in use."
)
CHOSEN = "PERLCLI_IMITATE"  # environment variable with names of IMITATIONS, comma-separated
FREE, TOTAL = 20_000_000_000, 24_000_000_000  # bytes of the stubbed GPU


def cuda_autocast(patch: pytest.MonkeyPatch) -> None:
    """peft's quantised layers cast only where autocast is off, and ask without naming a device, which means CUDA's."""
    import torch

    original = torch.is_autocast_enabled
    patch.setattr(torch, "is_autocast_enabled", lambda *of: original(*of) if of else original("cpu"))


def int8_activations(patch: pytest.MonkeyPatch) -> None:
    """8-bit layers multiply int8 activations, in training too, where a CPU unpacks the weights instead."""
    import bitsandbytes
    import bitsandbytes.autograd._functions as functions
    from bitsandbytes.nn import modules

    def matmul(a: Any, b: Any, out: Any = None, state: Any = None, threshold: float = 0.0, bias: Any = None) -> Any:
        if threshold > 0:
            state.threshold = threshold
        return functions.MatMul8bitLt.apply(a, b, out, bias, state)

    for where in (functions, bitsandbytes, modules.bnb):
        patch.setattr(where, "matmul", matmul)


def compact_head(patch: pytest.MonkeyPatch) -> None:
    """TRL's fused head sees only the positions that count (its kernels stay torch's)."""
    import trl.trainer.utils

    patch.setattr(trl.trainer.utils, "_use_triton", lambda device: True)


def stubbed_cuda(patch: pytest.MonkeyPatch) -> None:
    """`torch.cuda` answers for a GPU that is the CPU, so that our own branches for CUDA run."""
    import torch
    import transformers.training_args

    from perlcli import device

    patch.setattr(transformers.training_args, "is_torch_bf16_gpu_available", lambda: True)
    patch.setattr(device, "kind", lambda: "cuda")
    answers = {
        "synchronize": None,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "max_memory_allocated": 123_456_789,
        "max_memory_reserved": 234_567_890,
        "memory_allocated": 100_000_000,
        "mem_get_info": (FREE, TOTAL),
        "get_device_name": "NVIDIA Imitation",
        "get_device_capability": (9, 0),
        "current_device": torch.device("cpu"),
    }
    patch.setattr(torch.cuda, "get_rng_state", lambda *_: torch.random.get_rng_state())
    patch.setattr(torch.cuda, "set_rng_state", lambda state, *_: torch.random.set_rng_state(state))
    for name, answer in answers.items():
        patch.setattr(torch.cuda, name, functools.partial(_answer, answer))


def _answer(answer: object, *_: object, **__: object) -> object:
    return answer


def cuda(patch: pytest.MonkeyPatch) -> None:
    """All of them."""
    for imitate in (cuda_autocast, int8_activations, compact_head, stubbed_cuda):
        imitate(patch)


# What no imitation has: kernels of float16, a process of its own, an allocator
on_a_real_gpu = pytest.mark.skipif(bool(os.environ.get(CHOSEN)), reason="the GPU is only imitated")

IMITATIONS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    each.__name__: each for each in (cuda_autocast, int8_activations, compact_head, stubbed_cuda, cuda)
}


@pytest.fixture(scope="session", autouse=True)
def imitated() -> Iterator[None]:
    """The imitations that the environment names, around all tests of this process."""
    with pytest.MonkeyPatch.context() as patch:
        for name in filter(None, os.environ.get(CHOSEN, "").split(",")):
            IMITATIONS[name](patch)
        yield


def _fixture(name: str) -> Any:
    @pytest.fixture(name=f"like_{name}")
    def imitation(monkeypatch: pytest.MonkeyPatch) -> None:
        IMITATIONS[name](monkeypatch)

    return imitation


like_cuda_autocast, like_int8_activations, like_compact_head, like_stubbed_cuda, like_cuda = map(
    _fixture, ("cuda_autocast", "int8_activations", "compact_head", "stubbed_cuda", "cuda")
)


# A GPU without room


def _loading(patch: pytest.MonkeyPatch, fail: Callable[..., Any]) -> None:
    from transformers import PreTrainedModel

    patch.setattr(PreTrainedModel, "_load_pretrained_model", staticmethod(fail))


def _quantising(patch: pytest.MonkeyPatch, fail: Callable[..., Any]) -> None:
    """From the third weight on: transformers converts weight by weight and keeps the errors of each."""
    from bitsandbytes.nn import modules

    original, calls = modules.bnb.functional.quantize_4bit, iter(range(1_000_000))
    patch.setattr(
        modules.bnb.functional,
        "quantize_4bit",
        lambda *given, **more: fail() if next(calls) >= 2 else original(*given, **more),
    )


def _attaching(patch: pytest.MonkeyPatch, fail: Callable[..., Any]) -> None:
    from peft import PeftModel

    patch.setattr(PeftModel, "load_adapter", fail)


def _sampling(patch: pytest.MonkeyPatch, fail: Callable[..., Any]) -> None:
    from transformers import GenerationMixin

    patch.setattr(GenerationMixin, "generate", fail)


def _learning(patch: pytest.MonkeyPatch, fail: Callable[..., Any]) -> None:
    import accelerate

    patch.setattr(accelerate.Accelerator, "backward", fail)


def _evaluating(patch: pytest.MonkeyPatch, fail: Callable[..., Any]) -> None:
    from transformers import Trainer

    patch.setattr(Trainer, "evaluation_loop", fail)


def _saving(patch: pytest.MonkeyPatch, fail: Callable[..., Any]) -> None:
    from peft import PeftModel

    patch.setattr(PeftModel, "save_pretrained", fail)


PLACES = {
    "loading": _loading,
    "quantising": _quantising,
    "attaching": _attaching,
    "sampling": _sampling,
    "learning": _learning,
    "evaluating": _evaluating,
    "saving": _saving,
}


@pytest.fixture
def no_room(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes a GPU's memory run out in one of PLACES, in torch's words."""
    import torch

    def fail(*_: object, **__: object) -> Any:
        raise torch.OutOfMemoryError(NO_ROOM)

    return lambda place: PLACES[place](monkeypatch, fail)
