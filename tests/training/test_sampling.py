"""Sampling from the full distribution without side effects, and the log-probabilities of completions."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from perlcli import device
from perlcli.data import Renderer
from perlcli.model import loading, log_probs, tokenizers
from perlcli.model.sources import locate
from perlcli.rollouts import local
from perlcli.rollouts.how import FULL, Sampling
from perlcli.rollouts.stops import Ends
from perlcli.settings import ModelSettings
from perlcli.settings.sampling import SamplingSettings
from perlcli.training import sampling

# What a model's generation config can add to sampling.
HABITS: dict[str, Any] = {
    **{"top_k": 1, "top_p": 0.1, "min_p": 0.5, "typical_p": 0.1, "repetition_penalty": 9.0, "num_beams": 2},
    **{"no_repeat_ngram_size": 1, "suppress_tokens": list(range(40, 120)), "min_new_tokens": 8, "epsilon_cutoff": 0.1},
    **{"bad_words_ids": [[token] for token in range(120, 200)], "forced_eos_token_id": 7, "guidance_scale": 3.0},
}
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
        local.sample(model, render, PROMPTS, Sampling(1.0, 4, 0))
        assert model.training is training


def test_sampling_that_fails_keeps_the_mode(
    model: Any, render: Renderer, still_random: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "generate", lambda **_: 1 / 0)
    model.train()
    with pytest.raises(ZeroDivisionError):
        local.sample(model, render, PROMPTS, Sampling(1.0, 4, 0))
    assert model.training


def test_sampling_only_depends_on_its_seed(model: Any, render: Renderer) -> None:
    first = local.sample(model, render, PROMPTS, Sampling(1.0, 8, 3))
    torch.rand(5)
    assert local.sample(model, render, PROMPTS, Sampling(1.0, 8, 3)) == first
    assert local.sample(model, render, PROMPTS, Sampling(1.0, 8, 4)) != first
    assert all(len(row) <= 8 for row in first)


def test_cold_sampling_in_a_batch_is_greedy_decoding_of_each_prompt(model: Any, render: Renderer) -> None:
    wanted = []
    for prompt in PROMPTS:
        written: list[int] = []
        while len(written) < 6 and not render.ended(written):
            written.append(int(logits(model, prompt + written)[-1].argmax()))
        wanted.append(written)
    assert local.sample(model, render, PROMPTS, Sampling(1e-4, 6, 0)) == wanted


def test_completion_ends_with_the_first_end_token(model: Any, render: Renderer) -> None:
    free = local.sample(model, render, PROMPTS, Sampling(1.0, 8, 3))
    stop = free[0][2]
    also = Renderer(render.tokenizer, [stop])
    cut = local.sample(model, also, PROMPTS, Sampling(1.0, 8, 3))
    assert cut[0] == free[0][: free[0].index(stop) + 1]
    assert also.ended(cut[0])
    assert not render.ended(cut[0])


def test_sampling_ignores_the_model_s_generation_config(
    model: Any, render: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RL and evaluation must sample from the same policy."""
    plain = local.sample(model, render, PROMPTS, Sampling(1.0, 8, 3))
    for name, value in HABITS.items():
        with monkeypatch.context() as patch:
            patch.setattr(model.generation_config, name, value)
            assert local.sample(model, render, PROMPTS, Sampling(1.0, 8, 3)) == plain, name


def test_what_is_not_of_sampling_stays_in_the_generation_config(model: Any) -> None:
    own = model.generation_config
    own.cache_implementation, own.of_its_own = "dynamic", 7
    try:
        with local.without_habits(model):
            assert (model.generation_config.cache_implementation, model.generation_config.of_its_own) == ("dynamic", 7)
        assert model.generation_config is own
    finally:
        own.cache_implementation = None
        del own.of_its_own


def drawn(model: Any, render: Renderer, **how: Any) -> list[list[int]]:
    return local.sample(model, render, PROMPTS, Sampling(1.0, 8, 3, **how))


def test_options_narrow_what_is_sampled(model: Any, render: Renderer) -> None:
    greedy = local.sample(model, render, PROMPTS, Sampling(1e-4, 8, 0))
    full = drawn(model, render)
    assert full != greedy
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 0.999}):
        assert drawn(model, render, **narrow) == greedy, narrow
    assert drawn(model, render, repetition_penalty=5.0) != full
    off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "stop": ("",)}
    assert drawn(model, render, **off) == full


def test_a_stop_string_ends_each_completion_on_its_own(model: Any, render: Renderer) -> None:
    full = drawn(model, render)
    stop = next(text for ids in full[0][2:4] if (text := render.tokenizer.decode([ids])).strip())
    cut = drawn(model, render, stop=(stop,))
    ends = Ends(render, (stop,))
    assert cut == [ends.cut(row) for row in full]
    assert ends.ended(cut[0]) and len(cut[0]) < len(full[0])


def test_the_distribution_is_the_full_one_unless_options_say_otherwise() -> None:
    how = sampling.asked(SamplingSettings(temperature=0.5, max_completion_length=9, stop=("",)), 4)
    assert how == Sampling(0.5, 9, 4)
    given = {"top_p": 0.9, "top_k": 3, "min_p": 0.1, "repetition_penalty": 2.0, "stop": ("a",)}
    how = sampling.asked(SamplingSettings(temperature=0.5, max_completion_length=9, **given), 4)  # type: ignore[arg-type]
    assert {name: getattr(how, name) for name in given} == given
    assert set(how.distribution()) == {"temperature", *FULL}


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_log_probs_do_not_depend_on_the_batch(model: Any, temperature: float) -> None:
    written = [[70, 71], [80, 81, 82, 83], [90]]
    found = log_probs.log_probs(model, PROMPTS, written, temperature)
    for prompt, completion, row in zip(PROMPTS, written, found, strict=True):
        table = (logits(model, prompt + completion) / temperature).log_softmax(dim=-1)
        wanted = [float(table[len(prompt) - 1 + index, token]) for index, token in enumerate(completion)]
        assert row == pytest.approx(wanted, abs=1e-4)


def test_log_probs_of_greedy_tokens_are_0_at_a_low_temperature(model: Any) -> None:
    best = [int(logits(model, prompt)[-1].argmax()) for prompt in PROMPTS]
    found = log_probs.log_probs(model, PROMPTS, [[token] for token in best], 1e-4)
    assert found == [[pytest.approx(0.0, abs=1e-3)]] * 3


# Log-probabilities without the logits of everything

WRITTEN = [[70, 71], [80, 81, 82, 83], [90]]
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 3.0, "head_dim": 8},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2},
}


def tiny(kind: str) -> Any:
    """A random model of one layer whose class scales, caps or positions in its own way."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    heads = {"num_key_value_heads": 2, "pad_token_id": 0}
    more = MODELS[kind] if kind == "gpt2" else {**sizes, **heads, **MODELS[kind]}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=100, initializer_range=0.5, **more)
    return AutoModelForCausalLM.from_config(config).eval()


def from_all_logits(model: Any, temperature: float) -> list[float]:
    """The log-probabilities by the definition: from the logits of every token of every row."""
    found = []
    for prompt, completion in zip(PROMPTS, WRITTEN, strict=True):
        table = (logits(model, prompt + completion) / temperature).log_softmax(dim=-1)
        found += [float(table[len(prompt) - 1 + index, token]) for index, token in enumerate(completion)]
    return found


@pytest.mark.parametrize("at_once", [1, 300, 2**25])
@pytest.mark.parametrize("kind", MODELS)
def test_log_probs_are_those_of_all_logits(kind: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(kind)
    monkeypatch.setattr(log_probs, "LOGITS", at_once)
    for size in (None, 1, 2):
        found = log_probs.log_probs(model, PROMPTS, WRITTEN, 0.7, size)
        assert list(map(len, found)) == list(map(len, WRITTEN))
        flat = [value for row in found for value in row]
        assert flat == pytest.approx(from_all_logits(model, 0.7), abs=1e-6, rel=1e-6)
    assert not model.get_output_embeddings()._forward_pre_hooks


class Largest(TorchDispatchMode):
    """Keeps the most elements that a result with the vocabulary as its last dimension had; weights are given."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.found = vocabulary, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.t.default:  # of the output layer's weight
            return result
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor) and leaf.dim()]
        wide = [tensor.numel() for tensor in tensors if tensor.shape[-1] == self.vocabulary]
        self.found = max([self.found, *wide])
        return result


@pytest.mark.parametrize(("at_once", "most"), [(2**25, 7 * 100), (300, 300)])
def test_no_logits_but_the_completions_are_computed(at_once: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_probs, "LOGITS", at_once)
    model = tiny("llama")
    with Largest(100) as largest:
        log_probs.log_probs(model, PROMPTS, WRITTEN, 1.0)
    assert largest.found == most  # of all tokens: 3 x 7 x 100


# The random state


def test_only_the_gpu_in_use_has_its_random_state_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's default takes every visible GPU and warns of the many."""
    asked: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_rng_state", asked.append)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, index: asked.append(index))
    with device.fork_rng():
        assert torch.cuda.is_available()
    assert asked == [1, 1]
