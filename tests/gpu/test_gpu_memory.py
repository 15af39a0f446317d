"""A GPU's memory: as it was predicted, phase by phase, and one clear error when it runs out."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from imitations import on_a_real_gpu

from perlcli.run.record import read_record

pytestmark = [pytest.mark.gpu, on_a_real_gpu]
Perl = Callable[..., Any]
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LENGTH, COMPLETION, BATCH = 512, 64, 8
SIZES = ("--max-length", LENGTH, "--per-device-train-batch-size", BATCH, "--gradient-accumulation-steps", 1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 160 M parameters, large enough for its tensors to outweigh what an allocator rounds up, with rows of
    one length."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import shapes

        size = {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}
        patch.setitem(shapes.CONFIGS, "medium", {**shapes.LLAMA, **size, "num_attention_heads": 16})
        folder = tmp_path_factory.mktemp("medium")
        shapes.make_model("medium", folder / "model", "bfloat16")
        shapes.make_rows(folder / "model", folder, LENGTH, COMPLETION, 32)
    return folder


def in_own_process(*words: object) -> str:
    """What a command prints in a process of its own, in which nothing else was ever allocated."""
    command = [sys.executable, "-m", "perlcli", *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("checkpointing", ["true", "false"])
@pytest.mark.parametrize(
    ("stage", "arm"), [("reward", "lora"), ("reward", "lora-4bit"), ("reward", "full"), ("sft", "lora"), ("rl", "lora")]
)
def test_gpu_memory_is_within_a_tenth_of_the_estimate(stage: str, arm: str, checkpointing: str, made: Path) -> None:
    common = ["--model", made / "model", *SIZES, "--gradient-checkpointing", checkpointing]
    data = {"reward": "pairs", "sft": "chats", "rl": "prompts"}[stage]
    words = [*common, "--data", made / f"{data}.jsonl", "--dtype", "bfloat16", "--max-steps", 3, "--output", "run"]
    words += {"full": ["--full"], "lora-4bit": ["--load-in-4bit"]}.get(arm, [])
    if stage == "rl":
        in_own_process("reward", *common, "--data", made / "pairs.jsonl", "--max-steps", 1, "--output", "reward")
        words += ["--reward", "reward", "--num-generations", BATCH, "--max-completion-length", COMPLETION]
        words += ["--min-completion-length", COMPLETION]
    in_own_process(stage, *words)
    memory = read_record(Path("run")).memory
    completion = ["--max-completion-length", COMPLETION] if stage == "rl" else []
    asked = ["estimate", stage, *common, *completion, "--arms", arm, "--dtype", "bfloat16", "--json"]
    (row, *_) = json.loads(in_own_process(*asked))["stages"][stage]
    assert memory["training_mb"] == pytest.approx(row["peak"] / 1e6, rel=0.1)
    assert memory["loading_mb"] == pytest.approx(row["loading"] / 1e6, rel=0.1)


@pytest.fixture
def little_room() -> Iterator[Callable[[float], None]]:
    """Lets this process have only so many more bytes of the GPU."""

    def allow(more: float) -> None:
        torch.cuda.empty_cache()
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + more) / total)

    yield allow
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.mark.parametrize(
    ("more", "place"),
    [(5e7, "while loading the base in bfloat16"), (8e8, "in a training step")],
    ids=["loading", "training"],
)
def test_gpu_memory_that_runs_out_is_one_clear_error(
    more: float, place: str, made: Path, little_room: Callable[[float], None], perl: Perl
) -> None:
    little_room(more)
    words = ("-m", made / "model", "-d", made / "pairs.jsonl", "-o", "run", "--max-steps", "2", "--dtype", "bfloat16")
    told = perl("reward", *words, *SIZES, "--gradient-checkpointing", "false", code=1).stderr
    assert f"Error: The GPU's memory is too small (out of memory {place})" in told
    assert read_record(Path("run")).status == "failed"
