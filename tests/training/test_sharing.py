"""What runs say of shared prompts, and what these change in them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHORT
from safetensors.torch import load_file
from trl import RLOOTrainer

from perlcli.model import shared_prompts
from perlcli.run.record import read_record

Perl = Callable[..., Any]
RL = (*SHORT, "--max-completion-length", "6", "--gradient-accumulation-steps", "1", "--eval-fraction", "0")


def adapter(run: str) -> dict[str, torch.Tensor]:
    return load_file(Path(run) / "adapter_model.safetensors")


@pytest.mark.parametrize("stage", ["rl", "reward"])
def test_a_run_says_what_it_saved_and_learns_the_same(
    perl: Perl, llama: Path, reward_run: Path, rows: dict[str, Path], stage: str
) -> None:
    given = ("--reward", reward_run, *RL) if stage == "rl" else SHORT
    words = (stage, "--model", llama, "--data", rows["prompts" if stage == "rl" else "pairs"], *given)
    told = perl(*words, "--output", "shared").stdout
    assert "Shared prompts: " not in perl(*words, "--output", "separate", "--no-shared-prompts").stdout
    found = read_record(Path("shared")).shared
    assert f"Shared prompts: {found['read']:,} tokens were read in place of {found['given']:,}" in told
    assert 0 < found["read"] < 0.95 * found["given"] and not read_record(Path("separate")).shared
    for name, value in adapter("separate").items():
        torch.testing.assert_close(adapter("shared")[name], value, atol=1e-3, rtol=1e-2)


def test_rows_stay_in_their_optimiser_step(perl: Perl, llama: Path, reward_run: Path, rows: dict[str, Path]) -> None:
    """With several steps of a generation, TRL's choice of the rows of each step is kept."""
    seen: dict[str, list[list[int]]] = {}
    words = ("rl", "--model", llama, "--data", rows["prompts"], "--reward", reward_run, *RL)
    for name, more in (("shared", ()), ("separate", ("--no-shared-prompts",))):
        seen[name] = []
        with pytest.MonkeyPatch.context() as patch:
            own = RLOOTrainer._compute_loss

            def spy(self: Any, model: Any, inputs: Any, name: str = name, own: Any = own) -> Any:
                seen[name].append(sorted(map(sum, inputs["completion_ids"].tolist())))
                return own(self, model, inputs)

            patch.setattr(RLOOTrainer, "_compute_loss", spy)
            perl(*words, "--set", "steps_per_generation=2", "--output", name, *more)
    assert seen["shared"] == seen["separate"] and len(seen["shared"]) == 2


@pytest.mark.parametrize("stage", ["rl", "reward"])
def test_a_model_that_cannot_share_is_named(
    perl: Perl, llama: Path, reward_run: Path, rows: dict[str, Path], stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_prompts, "can_share", lambda _: False)
    given = ("--reward", reward_run, *RL) if stage == "rl" else SHORT
    words = (stage, "--model", llama, "--data", rows["prompts" if stage == "rl" else "pairs"], *given)
    told = perl(*words, "--output", "run").stdout
    why = "LlamaModel keeps a running state, not only keys and values"
    assert told.count(f"Each row is read from its start, also where rows start alike: {why}.") == 1
    found = read_record(Path("run")).shared
    assert found.get("read", 0) == found.get("given", 0)
