"""Merges an adapter into its base's weights, and measures what that changes."""

from __future__ import annotations

import math
import warnings
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from perlcli import device, settings
from perlcli.errors import PerlError, RunFailed, line
from perlcli.model import loading, roles, sources, weights
from perlcli.model.sources import Source
from perlcli.run import loaders
from perlcli.run.files import CARD, SAMPLES, read_rows
from perlcli.settings import ModelSettings
from perlcli.training import guards
from perlcli.training.origin import check_fingerprint
from perlcli.training.prepare import Prepared, loaded

PROMPTS = (
    "Can I get a large latte with oat milk, and a slice of the lemon cake?",
    "Explain in two sentences why the sky is blue.",
    "def add(a, b):\n    return",
    "Translate to French: Where is the railway station?",
    "List three prime numbers between 10 and 30.",
)
ANSWER = "Of course. One moment, please."  # what a reward model reads after each of them
SCORED, LONGEST = 8, 256  # samples of a reward's run that are scored, and tokens of each
# The most that merged logits may differ from the adapted model's, as a share of the largest logit: rounding can't
# explain more. In bfloat16 (8 bits) the weights that hold the sum are rounded, and so is every step of both models.
TOLERANCE = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.5}
Ids = list[int]
Logits = list[torch.Tensor]  # of each row: (tokens, vocabulary), or (1,) for a reward model
Merging = Prepared[settings.Merge]


def measured_rows(prepared: Merging) -> list[Ids]:
    """The token ids of a few prompts for a policy; for a reward model, of rows that its run scored itself, otherwise of
    the prompts with an answer."""
    render, path = prepared.renderer, Path(str(prepared.source.adapter)) / SAMPLES
    if not prepared.source.is_classifier:
        return [render.prompt_ids([{"role": "user", "content": text}] if render.chat else text) for text in PROMPTS]
    samples = read_rows(path)
    texts = [sample[key] for sample in samples for key in ("chosen", "rejected", "text") if sample.get(key)]
    texts = [text for text in texts if isinstance(text, str)]
    if texts:
        return [prepared.tokenizer(text, add_special_tokens=False)["input_ids"][:LONGEST] for text in texts[:SCORED]]
    return [render.read_ids(text if render.makes_turns else f"{text}\n", ANSWER) for text in PROMPTS]


@torch.no_grad()
def logits(model: Any, rows: list[Ids]) -> Logits:
    """The logits of each row by itself, float32 on the CPU: (tokens, vocabulary), or (1,) for a reward model."""
    model.eval()
    return [model(input_ids=torch.tensor([row], device=model.device)).logits[0].float().cpu() for row in rows]


def aligned(model: PreTrainedModel) -> PreTrainedModel:
    """The model with each weight copied into its own memory. Weights in a memory-mapped file may be unaligned, and CPU
    kernels then round differently."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def largest_difference(some: Logits, others: Logits) -> float:
    """The largest absolute difference between two models' logits; NaN if either model has a NaN."""
    return float(torch.stack([(a - b).abs().max() for a, b in zip(some, others, strict=True)]).max())


def share_same_token(some: Logits, others: Logits) -> float:
    """The share of positions at which two policies consider the same next token the likeliest."""
    same = torch.cat([a.argmax(dim=-1) == b.argmax(dim=-1) for a, b in zip(some, others, strict=True)])
    return float(same.float().mean())


def share_same_order(some: Logits, others: Logits) -> float:
    """The share of pairs of rows that two reward models put in the same order; 1 for a single row."""
    pairs = combinations(zip(some, others, strict=True), 2)
    return fmean([bool((a[0] > b[0]) == (a[1] > b[1])) for a, b in pairs] or [True])


def check_unshared(source: Source, *, trust_remote_code: bool = False) -> None:
    """Raises PerlError if several layers share a weight (Zamba 2) and each has an adapter of its own to it: a merged
    model has room for one. Tied embeddings are not meant: `untie` gives the output its own."""
    model = sources.skeleton(source, trust_remote_code=trust_remote_code)
    if not isinstance(model, PreTrainedModel) or source.adapter is None:
        return
    model.tie_weights()  # which initialising would do
    named = (name.removeprefix(roles.OF_PEFT) for name in weights.names(source.adapter))
    adapted = {name[: found.start()] for name in named if (found := roles.OF_ADAPTERS.search(name))}
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    first = {id(end.weight): "" for end in ends if end is not None}
    for name, weight in model.named_parameters(remove_duplicate=False):
        module = name.rpartition(".")[0]
        if module not in adapted:
            continue
        other = first.setdefault(id(weight), module)
        if other and other != module:
            problem = f"{source.name} can't be merged: {other} and {module} share a weight, each with its own adapter"
            raise PerlError(problem, "use it on its base with peft")


def load(prepared: Merging, values: ModelSettings, source: Source) -> PreTrainedModel:
    """A source's base: a causal LM, or a classifier with one score. Raises PerlError if it can't be loaded."""
    if source.is_classifier:
        return loading.load_classifier(source, values, int(prepared.tokenizer.pad_token_id))
    return loading.load_causal(source, values)


def adapted(prepared: Merging, values: ModelSettings) -> PeftModel:
    """The adapter on its base, not merged. Raises PerlError if it was trained on another base, or doesn't fit."""
    source = prepared.source
    base = load(prepared, values, source)
    loaded(prepared)
    check_fingerprint(source)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")  # `untie` deals with it
        model = roles.load_adapter(base, str(source.adapter), trainable=False)
    return model


def trained_logits(prepared: Merging, own: ModelSettings, rows: list[Ids]) -> Logits | None:
    """The logits of the adapted model as it was trained, for example in 4 bits; None if that can't be loaded here."""
    try:
        device.check(own)
    except PerlError as error:
        prepared.run.note(f"Not compared with the model as trained, in {device.precision(own)}: {error.problem}")
        return None
    return logits(adapted(prepared, own), rows)


def merge(model: PeftModel, prepared: Merging, rows: list[Ids]) -> PreTrainedModel:
    """The merged model, compared with the adapted one on these rows; raises RunFailed if they are not the same."""
    untie(model)
    tuner: Any = model.base_model
    before, matrices = logits(model, rows), base_weights(model)
    if not prepared.source.is_classifier:  # the head of a bare base is untrained
        with model.disable_adapter():
            prepared.run.record.metrics["adapter_effect"] = largest_difference(before, logits(model, rows))
    try:
        merged: PreTrainedModel = tuner.merge_and_unload(safe_merge=True)
    except (torch.OutOfMemoryError, MemoryError):  # not a fault of the adapter
        raise
    except Exception as error:  # of any type: each kind of adapter merges in its own way
        raise RunFailed(f"peft can't merge {prepared.source.name}: {line(error)}") from error
    dtype = str(merged.dtype).removeprefix("torch.")
    if matrices == base_weights(merged):
        problem = f"Merging changed no weight: in {dtype} the adapter is lost to rounding"
        raise RunFailed(problem, "perl merge --dtype float32 keeps it")
    note_difference(prepared, dtype, before, logits(merged, rows))
    return merged


def untie(model: PeftModel) -> None:
    """Give the output its own copy of the embeddings if the adapter changes either: merged, the two differ. peft (0.21)
    adds an adapter of one to the weights of both; remove this when it unties them itself."""
    inner: Any = model.get_base_model()
    ends = (inner.get_input_embeddings(), inner.get_output_embeddings())
    if ends[1] is None or not any(isinstance(end, BaseTunerLayer) for end in ends):
        return
    first, last = (getattr(end, "base_layer", end) for end in ends)
    if first.weight.data_ptr() == last.weight.data_ptr():
        last.weight = nn.Parameter(last.weight.detach().clone(), requires_grad=False)
        inner.config.tie_word_embeddings = False


def base_weights(model: nn.Module) -> list[str]:
    """A digest of each of the base's matrices, in no particular order, adapters left out."""
    matrices = [weight for name, weight in model.named_parameters() if roles.is_base(name) and weight.dim() > 1]
    return sorted(map(guards.sums, matrices))


def note_difference(prepared: Merging, dtype: str, before: Logits, after: Logits) -> None:
    """Report how far the merged model is from the adapted one; raises RunFailed if rounding can't explain it."""
    run, difference = prepared.run, largest_difference(before, after)
    word = "score" if prepared.source.is_classifier else "logit"
    run.record.metrics[f"{word}_difference"] = difference
    size = max(float(row.abs().max()) for row in before)
    if not math.isfinite(difference) or difference > TOLERANCE[dtype] * max(1.0, size):
        raise RunFailed(f"The merged model is not the adapted one: {word}s differ by up to {difference:.3g}")
    what = f"Merged in {dtype}: the largest {word} difference from the adapted model is {difference:.3g}"
    if prepared.source.is_classifier:
        scores = torch.cat(before)
        run.record.metrics["score_range"] = float(scores.max() - scores.min())
        run.note(f"{what} on {len(before)} texts.")
        return
    run.record.metrics["share_same_token"] = share = share_same_token(before, after)
    run.note(f"{what} on {len(before)} prompts; the likeliest next token is the same at {share:.1%} of positions.")


def note_shift(prepared: Merging, trained: str, used: str, before: Logits, after: Logits) -> None:
    """Report how far the model merged in one precision is from the model as it was trained in another."""
    run, shift = prepared.run, largest_difference(before, after)
    what = f"The adapter was trained on its base in {trained} and is merged into {used} weights"
    if prepared.source.is_classifier:
        order = share_same_order(before, after)
        run.record.metrics |= {"score_difference_as_trained": shift, "share_same_order_as_trained": order}
        span = f"rewards shift by up to {shift:.3g} (they span {run.record.metrics['score_range']:.3g})"
        run.note(f"{what}: {span}, and {order:.1%} of pairs of texts keep their order. Never mix rewards from the two.")
        return
    share = share_same_token(before, after)
    run.record.metrics |= {"logit_difference_as_trained": shift, "share_same_token_as_trained": share}
    tokens = f"the likeliest next token is the same at {share:.1%} of positions"
    run.note(f"{what}: its answers shift, logits by up to {shift:.3g}, {tokens}.")


def prove(prepared: Merging, values: ModelSettings, rows: list[Ids], wanted: Logits) -> None:
    """Reload the saved folder in plain transformers; raises RunFailed if its logits are not the `wanted` ones."""
    run = prepared.run
    source = sources.locate(str(run.folder), trust_remote_code=values.trust_remote_code)
    if source.is_classifier != prepared.source.is_classifier:
        raise RunFailed(f"The saved model is another kind of model: {source.config.architectures}")
    reloaded = logits(aligned(load(prepared, values, source)), rows)
    if not all(map(torch.equal, wanted, reloaded)):
        shift = largest_difference(wanted, reloaded)
        raise RunFailed(f"The saved model is not the merged one: loaded afresh, its logits differ by up to {shift:.3g}")
    word, how = "scores" if source.is_classifier else "logits", "in plain transformers"
    if loaders.CAUSAL_HEAD in run.record.model:
        how = f"as a causal model with a head, by the code in its {CARD}"
    run.note(f"Loaded afresh from {run.folder} {how}: the same {word}, bit for bit.")
