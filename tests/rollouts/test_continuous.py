"""Sampling by transformers' continuous batching."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from perlcli.data import Renderer
from perlcli.errors import RunFailed
from perlcli.model import loading, sources, tokenizers
from perlcli.model.log_probs import log_probs
from perlcli.rollouts.continuous import MOST, PAGE, Continuous, batching
from perlcli.rollouts.how import Sampling
from perlcli.run.record import read_record
from perlcli.settings import ModelSettings

Perl = Callable[..., Any]
SHORT = ("--max-length", "128", "--max-completion-length", "8", "--rollouts", "continuous")
BATCH = ("--per-device-train-batch-size", "4", "--gradient-accumulation-steps", "1", "--eval-fraction", "0")
HOW = Sampling(temperature=0.7, max_new_tokens=8, seed=3)


def model_of(folder: Path) -> tuple[Any, Renderer]:
    source = sources.locate(str(folder))
    return loading.load_causal(source, ModelSettings()), tokenizers.renderer(source, tokenizers.load_tokenizer(source))


@pytest.mark.slow
def test_rl_and_eval_sample_by_it(perl: Perl, llama: Path, reward_run: Path, rows: dict[str, Path]) -> None:
    words = ("--reward", reward_run, "--data", rows["prompts"], *SHORT)
    result = perl("rl", "--model", llama, *words, *BATCH, "--max-steps", "2", "--output", "run")
    assert "Completions are sampled by transformers' continuous batching." in result.stdout
    steps = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    for row in steps:
        assert row["sampler/diff_mean"] < 1e-4 and row["sampler/importance"] == pytest.approx(1, abs=1e-3)
    assert read_record(Path("run")).guards["kl_at_start"] == 0
    perl("eval", "--model", "run", *words, "--max-samples", "4", "--output", "eval")


def test_its_log_probabilities_are_those_of_training(llama: Path) -> None:
    model, render = model_of(llama)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12], [5, 6, 7]]
    before = torch.random.get_rng_state()
    written = Continuous(render).sample(model, prompts, HOW)
    assert torch.equal(before, torch.random.get_rng_state()) and not model.training
    own = log_probs(model, prompts, [each.ids for each in written], 0.7)
    for each, wanted in zip(written, own, strict=True):
        assert 1 <= len(each.ids) <= 8
        assert each.log_probs == pytest.approx(wanted, abs=1e-4)


def test_a_failure_is_told_with_another_way(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, render = model_of(llama)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no blocks")

    monkeypatch.setattr(model, "generate_batch", fail)
    with pytest.raises(RunFailed, match="--rollouts continuous failed: no blocks") as caught:
        Continuous(render).sample(model, [[5, 6]], HOW)
    assert caught.value.hint == "--rollouts transformers"


def test_the_cache_has_room_for_the_completions() -> None:
    few = batching([[1] * 10] * 4, HOW)
    assert few.num_blocks == -(-4 * 18 // PAGE) + 4
    many = batching([[1] * 1000] * 400, HOW)
    assert many.num_blocks == MOST // PAGE + 400
    long = batching([[1] * 2 * MOST], HOW)
    assert long.num_blocks * PAGE >= 2 * MOST + 8 and long.max_batch_tokens >= 2 * MOST + 8
