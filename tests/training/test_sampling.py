"""Sampling from the full distribution without side effects, and the log-probabilities of completions."""

from pathlib import Path
from typing import Any

import pytest
import torch

from perlcli.data import Renderer
from perlcli.model import loading, tokenizers
from perlcli.model.sources import locate
from perlcli.settings import ModelSettings
from perlcli.training import sampling
from perlcli.training.sampling import Sampling

PROMPTS = [[1, 40, 41, 42, 43, 44], [1, 50], [1, 60, 61]]


@pytest.fixture(scope="module")
def model(llama: Path) -> Any:
    """The tiny Llama's base."""
    return loading.load_causal(locate(str(llama)), ModelSettings())


@pytest.fixture(scope="module")
def render(llama: Path) -> Renderer:
    source = locate(str(llama))
    return tokenizers.renderer(source, tokenizers.load_tokenizer(source))


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    """The logits after each token of one row, unpadded."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0]


def test_sampling_keeps_the_mode_and_the_random_state(model: Any, render: Renderer, still_random: None) -> None:
    for training in (True, False):
        model.train(training)
        sampling.sample(model, render, PROMPTS, Sampling(1.0, 4, 0))
        assert model.training is training


def test_sampling_only_depends_on_its_seed(model: Any, render: Renderer) -> None:
    first = sampling.sample(model, render, PROMPTS, Sampling(1.0, 8, 3))
    torch.rand(5)
    assert sampling.sample(model, render, PROMPTS, Sampling(1.0, 8, 3)) == first
    assert sampling.sample(model, render, PROMPTS, Sampling(1.0, 8, 4)) != first
    assert all(len(row) <= 8 for row in first)


def test_cold_sampling_in_a_batch_is_greedy_decoding_of_each_prompt(model: Any, render: Renderer) -> None:
    wanted = []
    for prompt in PROMPTS:
        written: list[int] = []
        while len(written) < 6 and not render.ended(written):
            written.append(int(logits(model, prompt + written)[-1].argmax()))
        wanted.append(written)
    assert sampling.sample(model, render, PROMPTS, Sampling(1e-4, 6, 0)) == wanted


def test_completion_ends_with_the_first_end_token(model: Any, render: Renderer) -> None:
    free = sampling.sample(model, render, PROMPTS, Sampling(1.0, 8, 3))
    stop = free[0][2]
    also = Renderer(render.tokenizer, [stop])
    cut = sampling.sample(model, also, PROMPTS, Sampling(1.0, 8, 3))
    assert cut[0] == free[0][: free[0].index(stop) + 1]
    assert also.ended(cut[0])
    assert not render.ended(cut[0])


def test_sampling_ignores_the_model_s_generation_config(
    model: Any, render: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RL and evaluation must sample from the same policy."""
    plain = sampling.sample(model, render, PROMPTS, Sampling(1.0, 8, 3))
    habits = {"top_k": 1, "top_p": 0.1, "min_p": 0.5, "typical_p": 0.1, "repetition_penalty": 9.0, "num_beams": 2}
    for name, value in {**habits, "no_repeat_ngram_size": 1}.items():
        with monkeypatch.context() as patch:
            patch.setattr(model.generation_config, name, value)
            assert sampling.sample(model, render, PROMPTS, Sampling(1.0, 8, 3)) == plain, name


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_log_probs_do_not_depend_on_the_batch(model: Any, temperature: float) -> None:
    written = [[70, 71], [80, 81, 82, 83], [90]]
    found = sampling.log_probs(model, PROMPTS, written, temperature)
    for prompt, completion, row in zip(PROMPTS, written, found, strict=True):
        table = (logits(model, prompt + completion) / temperature).log_softmax(dim=-1)
        wanted = [float(table[len(prompt) - 1 + index, token]) for index, token in enumerate(completion)]
        assert row == pytest.approx(wanted, abs=1e-4)


def test_log_probs_of_greedy_tokens_are_0_at_a_low_temperature(model: Any) -> None:
    best = [int(logits(model, prompt)[-1].argmax()) for prompt in PROMPTS]
    found = sampling.log_probs(model, PROMPTS, [[token] for token in best], 1e-4)
    assert found == [[pytest.approx(0.0, abs=1e-3)]] * 3
