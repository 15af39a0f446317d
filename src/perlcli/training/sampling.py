"""Sampling completions, and how likely a model finds them.

RL samples by TRL; the probe before it and evaluation sample here. Both draw the same tokens from the same random state:
they are given the same options, and `without_habits` takes away what a model's generation config would add."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import GenerationConfig

from perlcli import device, settings
from perlcli.data import Renderer
from perlcli.errors import RunFailed
from perlcli.model.tokenizers import batches_by_length, padded
from perlcli.settings.sampling import SamplingSettings
from perlcli.text import shorten
from perlcli.training import origin
from perlcli.training.guards import Model
from perlcli.training.prepare import Prepared, filled
from perlcli.training.stops import Ends

LOGITS = 2**25  # at most so many at once, 128 MB in float32: with all tokens of a batch they can outgrow the model
Ids = list[int]
# Of a model's own generation config, what changes only how tokens are computed.
HARMLESS = ("cache_implementation", "cache_config", "use_cache", "prefill_chunk_size")
# The options by which tokens are drawn from another distribution than that of the log-probabilities, and their value
# for the full one, each by its name in TRL and transformers.
FULL = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class Sampling:
    """How to sample completions: from the full distribution at this temperature, unless more is given."""

    temperature: float
    max_new_tokens: int
    seed: int
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    min_new_tokens: int = 0

    def distribution(self) -> dict[str, float | int | None]:
        """What decides the distribution of tokens, as TRL's config and transformers' call it."""
        names = ("temperature", "top_p", "top_k", "repetition_penalty")
        return {name: getattr(self, name) for name in names} | {"min_p": self.min_p or None}


def asked(values: SamplingSettings, seed: int) -> Sampling:
    """How to sample by these settings."""
    chosen = {name: getattr(values, name) for name in FULL if getattr(values, name) is not None}
    length, stop = filled(values.max_completion_length), tuple(filter(None, values.stop))
    least = values.min_completion_length or 0
    return Sampling(filled(values.temperature), length, seed, **chosen, stop=stop, min_new_tokens=least)


def note(prepared: Prepared[settings.Rl | settings.Eval]) -> None:
    """Note where KL isn't that of the distribution that is sampled from, and stop strings that were hardly meant."""
    values, run = prepared.settings.sampling, prepared.run
    how = asked(values, 0)
    off = [f"--{settings.dashed(name)} {getattr(how, name):g}" for name in FULL if getattr(how, name) != FULL[name]]
    off += [f"--min-completion-length {how.min_new_tokens}"] * bool(how.min_new_tokens)
    if off:
        kl = "Log-probabilities and KL are those of the full distribution at the temperature"
        run.note(f"{kl}, but completions are sampled with {' '.join(off)}.")
    if isinstance(prepared.settings, settings.Eval):
        _compare_with_run(prepared, values)
    for text in how.stop:
        if escape := next((escape for escape in (r"\n", r"\t") if escape in text), None):
            name = "a newline" if escape == r"\n" else "a tab"
            run.note(f"--stop {text!r} has a backslash, not {name}: in bash, $'{escape}' is {name}.")


def _compare_with_run(prepared: Prepared[Any], values: SamplingSettings) -> None:
    """Note whether an evaluation samples as the RL run that trained its policy did."""
    source = prepared.source
    trained = origin.sampling_settings(prepared.settings, source)
    changed = []
    for name in origin.SAMPLED if trained else ():
        now, then = _shown(name, getattr(values, name)), _shown(name, trained.get(name))
        if now != then:
            changed.append(f"--{settings.dashed(name)} {now}, not {then}")
    if trained:
        words = f"differently from {source.name}: {'; '.join(changed)}" if changed else f"as in {source.name}"
        prepared.run.note(f"Completions are sampled {words}.")


def _shown(name: str, value: float | Sequence[str] | None) -> str:
    """The value of a sampling option in words; unset and off are the same."""
    if name == "stop":
        texts = value if isinstance(value, Sequence) else ()
        return ", ".join(shorten(text) for text in texts if text) or "''"
    return f"{FULL.get(name, 0) if value is None else value:g}"


@torch.no_grad()
def sample(model: Model, render: Renderer, prompts: Sequence[Ids], how: Sampling) -> list[Ids]:
    """One completion's token ids for each prompt, including the EOS or stop string that it ended with. Leaves torch's
    random state unchanged."""
    tokenizer, ends = render.tokenizer, Ends(render, how.stop)
    ids, mask = padded(prompts, tokenizer.pad_token_id, model.device, on_left=True)
    config = GenerationConfig(
        **how.distribution(),
        do_sample=True,
        min_new_tokens=how.min_new_tokens or None,
        max_new_tokens=how.max_new_tokens,
        eos_token_id=list(render.eos_ids),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    was_training = model.training
    model.eval()
    try:
        with device.fork_rng(), without_habits(model), finite():
            torch.manual_seed(how.seed)
            generate: Any = model.generate  # peft's wrapper passes it on
            criteria = ends.criteria(ids.shape[1])
            out = generate(input_ids=ids, attention_mask=mask, generation_config=config, stopping_criteria=criteria)
    finally:
        model.train(was_training)
    return [ends.cut(row) for row in out[:, ids.shape[1] :].tolist()]


@contextmanager
def finite() -> Iterator[None]:
    """Raises RunFailed where torch can't sample, since a probability is NaN or infinite."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("probability tensor contains"):
            raise
        problem = "The policy's probabilities of the next token are NaN or infinite"
        raise RunFailed(problem, "its weights have NaN or infinite values, or it needs another --dtype") from error


@contextmanager
def without_habits(model: Model) -> Iterator[None]:
    """Take away what the model's own generation config adds to sampling: transformers fills in from it whatever its
    caller leaves unset (the repetition penalty of Qwen2.5-Instruct, suppressed tokens, …)."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    own = inner.generation_config
    standard = GenerationConfig().to_dict().keys() - set(HARMLESS)
    kept = {name: value for name, value in own.to_dict().items() if name not in standard}
    model.generation_config = inner.generation_config = GenerationConfig(**kept)  # peft's wrapper may have its own
    try:
        yield
    finally:
        model.generation_config = inner.generation_config = own


def sample_batches(
    model: Model, render: Renderer, prompts: Sequence[Ids], how: Sampling, size: int
) -> Iterator[list[Ids]]:
    """Sample the completions of `size` prompts at a time; each batch has a seed that depends on its place only."""
    for start in range(0, len(prompts), size):
        yield sample(model, render, prompts[start : start + size], replace(how, seed=how.seed + start))


@torch.no_grad()
def log_probs(
    model: Model, prompts: Sequence[Ids], written: Sequence[Ids], temperature: float, size: int | None = None
) -> list[list[float]]:
    """The log-probability of each completion token under the model at this temperature, one list per completion, from
    batches of `size` rows of similar length (None: one batch)."""
    rows = [prompt + completion for prompt, completion in zip(prompts, written, strict=True)]
    result: list[list[float]] = [[] for _ in rows]
    for part in batches_by_length(rows, size):
        values = iter(_log_probs(model, [rows[i] for i in part], [len(prompts[i]) for i in part], temperature))
        for index in part:
            result[index] = [next(values) for _ in written[index]]
    return result


def _log_probs(model: Model, rows: Sequence[Ids], starts: Sequence[int], temperature: float) -> list[float]:
    """The log-probabilities of all tokens of a batch that come after the start of their row, row by row."""
    ids, mask = padded(rows, 0, model.device)
    spans = enumerate(zip(starts, map(len, rows), strict=True))
    places = [(index, token) for index, (start, end) in spans for token in range(start, end)]
    row, token = torch.tensor(places, device=ids.device).reshape(-1, 2).T
    step = max(1, LOGITS // int(model.config.get_text_config().vocab_size))
    # the logits at a position are for the token that follows it
    predicted = _logits(model, ids, mask, (row, token - 1), step)
    result: list[float] = []
    for logits, target in zip(predicted, ids[row, token].split(step), strict=True):
        scaled = logits.float() / temperature
        result += (scaled.gather(1, target.unsqueeze(1))[:, 0] - scaled.logsumexp(dim=1)).tolist()
    return result


def _logits(
    model: Model, ids: torch.Tensor, mask: torch.Tensor, places: tuple[torch.Tensor, torch.Tensor], step: int
) -> Iterator[torch.Tensor]:
    """The logits at some places of a batch, (places, vocabulary), `step` places at a time. The model's output layer is
    given only their hidden states, so that no others are computed, and the model scales or caps the logits itself."""
    head = model.get_output_embeddings()
    parts: list[torch.Tensor] = []

    def select(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        parts.extend(inputs[0][places].split(step))
        return (parts[0].unsqueeze(0),)

    with _before(head, select):
        yield model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]
    for part in parts[1:]:
        with _before(head, lambda *_, states=part: (states.unsqueeze(0),)):
            yield model(input_ids=ids[:1, :1], use_cache=False).logits[0]  # one token: its own state isn't used


@contextmanager
def _before(module: nn.Module, hook: Callable[..., tuple[torch.Tensor, ...]]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
