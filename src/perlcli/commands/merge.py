"""`perl merge`: an adapter added to its base's weights once, as the paper does at test time: an ordinary model."""

from __future__ import annotations

import gc
import json
import math
import warnings
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from perlcli import device, settings, upstream
from perlcli.errors import PerlError, RunFailed, line
from perlcli.model import loading, roles, sources, tokenizers
from perlcli.model.sources import Source
from perlcli.model.weights import ADAPTER_CONFIG
from perlcli.run.files import RECORD, SAMPLES
from perlcli.run.lifecycle import Run, recording
from perlcli.run.output_folder import check_output
from perlcli.run.record import RunRecord, find_record
from perlcli.settings import ModelSettings
from perlcli.terminal import say
from perlcli.text import enum_value
from perlcli.training import guards
from perlcli.training.origin import check_fingerprint, check_tokenizer, trained_in
from perlcli.training.prepare import Prepared, loaded
from perlcli.training.rows import trained_on
from perlcli.training.value_model import HEAD_FILE

PROMPTS = (
    "Can I get a large latte with oat milk, and a slice of the lemon cake?",
    "Explain in two sentences why the sky is blue.",
    "def add(a, b):\n    return",
    "Translate to French: Where is the railway station?",
    "List three prime numbers between 10 and 30.",
)
ANSWER = "Of course. One moment, please."  # what a reward model reads behind each of them
SCORED, LONGEST = 8, 256  # samples of a reward's run that are scored, and their tokens
# How far merged logits may lie from the adapted model's, as a share of the largest: what rounding can't explain is a
# fault. In bfloat16 (8 bits) the weights that hold the sum are rounded, and so is every step of either model.
TOLERANCE = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.5}
TASKS = ("CAUSAL_LM", "SEQ_CLS", "None")  # None: peft was not told, and trl needs it for rewards alone
Ids = list[int]


def run(given: settings.Merge) -> RunRecord | None:
    """Merge an adapter, prove that the folder gives the same logits, say what changes; None for a dry run."""
    prepared = find(given)
    values = precision_of(prepared)
    own = trained_in(prepared.source, trust_remote_code=values.trust_remote_code)
    if prepared.is_dry:
        preview(prepared, values)
        return None
    with recording(prepared.run) as run:
        run.note(f"{summary(prepared)}; merging into {values.dtype} weights.")
        try:
            write(prepared, values, own)
        except torch.OutOfMemoryError as error:  # a GPU that held the base in 4 bits needs four times as much here
            problem = f"The GPU's memory is too small for the base in {values.dtype}"
            raise RunFailed(problem, "CUDA_VISIBLE_DEVICES= perl merge … merges on the CPU") from error
        run.record.peak_memory_mb = device.peak_memory_mb()
    return run.record


def write(prepared: Prepared, values: ModelSettings, own: ModelSettings | None) -> None:
    """Measure, merge, measure again, save and load afresh: one model in memory at a time."""
    run = prepared.run
    rows = reward_rows(prepared) if prepared.source.is_classifier else policy_rows(prepared)
    before = trained_logits(prepared, own, rows) if own and differs(own, values) else None
    gc.collect()  # make room for the next model
    merged = merge(adapted(prepared, values), prepared, rows)
    wanted = logits(aligned(merged), rows)
    if own and before:
        tell_shift(prepared, (own, values), before, wanted)
    run.record.total_parameters = roles.count_parameters(merged)[1]
    merged.save_pretrained(str(run.folder))
    prepared.tokenizer.save_pretrained(str(run.folder))
    del merged
    gc.collect()
    prove(prepared, values, rows, wanted)


# Before weights are loaded


def find(given: settings.Merge) -> Prepared:
    """Find the adapter and check all that is cheap. Raises PerlError."""
    upstream.hush_bars()
    name, trust = given.merge.adapter, given.merge.trust_remote_code
    if not name:
        raise PerlError("ADAPTER is missing: nothing to merge", "perl merge RUN, the folder of a run or of an adapter")
    _refuse_other_folders(name)
    source = sources.locate(name, option="The adapter", trust_remote_code=trust)
    _check_mergeable(source)
    check_fingerprint(source)
    resolved = settings.resolve(given, {"output": _beside(name)})
    settings.check(resolved)
    _check_apart(source, str(resolved.run.output))
    check_output(resolved)
    if source.is_embedded:
        device.spare_threads()
    tokenizer = tokenizers.load_tokenizer(source, trust_remote_code=trust)
    check_tokenizer(source, tokenizer)
    prepared = Prepared(resolved, source, tokenizer, tokenizers.renderer(source, tokenizer), Run(resolved))
    prepared.run.prompts = trained_on(source)
    prepared.run.record.device = device.describe(precision_of(prepared))
    prepared.run.record.model = tokenizers.describe(source, tokenizer)
    trained = find_record(source.adapter)
    if trained is not None and trained.status != "finished":
        prepared.run.note(f"The run {name} did not finish ({trained.status}): merging the adapter that it saved.")
    return prepared


def _refuse_other_folders(name: str) -> None:
    """Raise PerlError for the folder of a run that holds no adapter, with what it holds instead; for a value model."""
    folder = Path(name).expanduser()
    if (folder / HEAD_FILE).exists():
        raise PerlError(f"{name} is the value model of a run, not a policy", f"name the run: {folder.parent}")
    if not (folder / RECORD).exists() or (folder / ADAPTER_CONFIG).exists():
        return
    found = find_record(str(folder))
    assert found is not None
    if found.command == "merge":
        raise PerlError(f"{name} is merged already: an ordinary model", "use it as it is")
    if found.settings.get("full"):
        raise PerlError(f"{name} was trained with --full: it is an ordinary model already", "use it as it is")
    raise PerlError(
        f"{name} is the folder of `perl {found.command}` ({found.status}) and holds no adapter",
        "name the folder of a run of perl sft, reward or rl",
    )


def _check_mergeable(source: Source) -> None:
    """Raise PerlError for what can't be merged: a base, another kind of adapter or task, a quantised base."""
    config = source.adapter_config
    if config is None:
        hint = "name the folder of a run, or of a LoRA adapter"
        raise PerlError(f"{source.name} is a model, not an adapter: there is nothing to merge", hint)
    kind = enum_value(config.peft_type)
    if not hasattr(PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type), "merge_and_unload"):
        hint = "use it with peft, beside its base"
        raise PerlError(f"The adapter {source.name} is {kind}, which adds nothing to weights: it can't be merged", hint)
    task = enum_value(config.task_type)
    if task not in TASKS:
        raise PerlError(
            f"The adapter {source.name} is for {task}", "perl merge takes policies (CAUSAL_LM) and rewards (SEQ_CLS)"
        )
    if getattr(source.config, "quantization_config", None) is not None:
        raise PerlError(
            f"The base {source.base} is stored quantised: it has no 16-bit weights to merge into",
            f"name its unquantised original as base_model_name_or_path in {source.adapter}/{ADAPTER_CONFIG}",
        )


def _beside(name: str) -> str:
    """Where the merged model goes by default: beside a local adapter, else into `runs`."""
    place = Path(name).expanduser()
    if not place.is_dir():
        return str(Path("runs") / f"{place.name}-merged")
    place = place if place.name not in ("", "..") else place.resolve()
    return str(place.with_name(f"{place.name}-merged"))


def _check_apart(source: Source, output: str) -> None:
    """Raise PerlError where the output would touch what is merged: not even --overwrite may do that.

    A hub id counts as a folder of that name too: once it exists, it would be taken for the base.
    """
    out = Path(output).expanduser().resolve()
    for what, place in (("base", source.base), ("adapter", str(source.adapter))):
        folder = Path(place).resolve()
        touches = out.is_relative_to(folder) or folder.is_relative_to(out)
        if out == folder or (touches and folder.is_dir()):
            raise PerlError(
                f"--output {output} is, holds or lies in the {what} {place}: a merge never overwrites what it reads",
                "name another folder",
            )


def precision_of(prepared: Prepared) -> ModelSettings:
    """How to load the base that is merged into: never quantised."""
    asked = prepared.settings.merge.dtype
    if asked == "auto":
        own = trained_in(prepared.source)
        stored = str(getattr(prepared.source.config, "dtype", None)).removeprefix("torch.")
        asked = own.dtype if own else stored if stored in TOLERANCE else "float32"
    return ModelSettings(dtype=asked, trust_remote_code=prepared.settings.merge.trust_remote_code)


def differs(one: ModelSettings, other: ModelSettings) -> bool:
    """Whether two ways to hold a base give different logits."""
    return device.precision(one) != device.precision(other)


def summary(prepared: Prepared) -> str:
    """The adapter, what it is and its base, in words."""
    source, kind = prepared.source, "reward model" if prepared.source.is_classifier else "policy"
    return f"adapter: {source.name}, a {kind} on the base {source.base_name}"


def preview(prepared: Prepared, values: ModelSettings) -> None:
    """Print what a run would do, for `--dry-run`."""
    say(f"{summary(prepared)}\nmerged weights: {values.dtype}")
    say(f"output: {prepared.settings.run.output}\nDry run: nothing was loaded, merged or written.")


# What is measured


def policy_rows(prepared: Prepared) -> list[Ids]:
    """A few prompts as token ids, through the chat template where there is one."""
    render = prepared.renderer
    return [render.prompt_ids([{"role": "user", "content": text}] if render.chat else text) for text in PROMPTS]


def reward_rows(prepared: Prepared) -> list[Ids]:
    """A few rows to score as token ids: those that the run scored itself, else prompts of ours with an answer."""
    render, path = prepared.renderer, Path(str(prepared.source.adapter)) / SAMPLES
    if path.exists():
        samples = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        texts = [sample[key] for sample in samples for key in ("chosen", "rejected", "text") if sample.get(key)]
        return [prepared.tokenizer(text, add_special_tokens=False)["input_ids"][:LONGEST] for text in texts[:SCORED]]
    if render.chat:
        talks = [[{"role": "user", "content": text}, {"role": "assistant", "content": ANSWER}] for text in PROMPTS]
        return [render.whole_ids(talk) for talk in talks]
    return [render.whole_ids(f"{text}\n{ANSWER}") for text in PROMPTS]


@torch.no_grad()
def logits(model: Any, rows: list[Ids]) -> list[torch.Tensor]:
    """The logits of each row alone, float32: of shape (tokens, vocabulary), or (1,) for a reward model's score."""
    model.eval()
    return [model(input_ids=torch.tensor([row], device=model.device)).logits[0].float().cpu() for row in rows]


def aligned(model: Any) -> Any:
    """The model with every weight in memory of its own: in a mapped file weights lie anywhere, and kernels for CPUs
    round otherwise where they aren't aligned."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def largest_difference(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    """The largest absolute difference between two models' logits; NaN where either has one."""
    return float(torch.stack([(a - b).abs().max() for a, b in zip(some, others, strict=True)]).max())


def share_same_token(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    """The share of positions at which two policies find the same next token the likeliest."""
    same = torch.cat([a.argmax(dim=-1) == b.argmax(dim=-1) for a, b in zip(some, others, strict=True)])
    return float(same.float().mean())


def share_same_order(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    """The share of pairs of rows that two reward models put in the same order; 1 for a single row."""
    pairs = combinations(zip(some, others, strict=True), 2)
    return fmean([bool((a[0] > b[0]) == (a[1] > b[1])) for a, b in pairs] or [True])


# With weights


def load(prepared: Prepared, values: ModelSettings, source: Source) -> Any:
    """A source's base in this precision: a causal LM, or a classifier of one score."""
    if source.is_classifier:
        return loading.load_classifier(source, values, prepared.tokenizer.pad_token_id)
    return loading.load_causal(source, values)


def adapted(prepared: Prepared, values: ModelSettings) -> PeftModel:
    """The adapter on its base, not merged. Raises PerlError where it isn't the base that it was trained on, or where
    one of them has weights that the other has no place for."""
    source = prepared.source
    model = load(prepared, values, source)
    loaded(prepared)
    check_fingerprint(source)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")  # see `untie`
        model = roles.load_adapter(model, str(source.adapter), trainable=False)
    stray = sorted(left_out(model, set(load_peft_weights(str(source.adapter), device="cpu"))))
    if stray:
        raise PerlError(
            f"The adapter {source.name} does not fit its base, which has no place for {stray[0]} ({len(stray)} in all)"
        )
    return model


def left_out(model: PeftModel, saved: set[str]) -> set[str]:
    """The saved weights of an adapter that peft found no place for, and says nothing of.

    A weight that the model only has under another name, as between versions of transformers, was put there by peft.
    """
    ours = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    stray = saved - ours - set(model.state_dict())
    return stray if len(stray) > len(ours - saved) else set()


def trained_logits(prepared: Prepared, own: ModelSettings, rows: list[Ids]) -> list[torch.Tensor] | None:
    """The adapted model's logits as it was trained, say on a 4-bit base; None, and said, where this machine can't."""
    try:
        device.check(own)
    except PerlError as error:
        prepared.run.note(f"Not compared with the model as trained, in {device.precision(own)}: {error.problem}")
        return None
    return logits(adapted(prepared, own), rows)


def merge(model: PeftModel, prepared: Prepared, rows: list[Ids]) -> Any:
    """The merged model, held against the adapted one on these rows; raises RunFailed where it is another model."""
    source, metrics = prepared.source, prepared.run.record.metrics
    untie(model)
    wanted = logits(model, rows)
    if not source.is_classifier:  # a bare base has no head that was trained
        with model.disable_adapter():
            metrics["adapter_effect"] = largest_difference(wanted, logits(model, rows))
    tuner: Any = model.base_model
    before = base_weights(model)
    try:
        merged = tuner.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError, AttributeError, TypeError, RuntimeError) as error:
        raise RunFailed(f"peft can't merge {source.name}: {line(error)}") from error
    if before == base_weights(merged):
        raise RunFailed(
            f"Merging changed no weight: in {str(merged.dtype).removeprefix('torch.')} the adapter is lost to rounding",
            "perl merge --dtype float32 keeps it",
        )
    tell_difference(prepared, str(merged.dtype).removeprefix("torch."), wanted, logits(merged, rows))
    return merged


def base_weights(model: Any) -> list[str]:
    """A digest of each weight of the base by its content alone, adapters left out."""
    found = [name for name, _ in model.named_parameters() if roles.is_base(name)]
    parameters = dict(model.named_parameters())
    return sorted(guards.sums(parameters[name]) for name in found if parameters[name].dim() > 1)


def tell_difference(prepared: Prepared, dtype: str, before: list[torch.Tensor], after: list[torch.Tensor]) -> None:
    """Say how far the merged model lies from the adapted one; raises RunFailed where rounding can't explain it."""
    run, difference = prepared.run, largest_difference(before, after)
    word = "score" if prepared.source.is_classifier else "logit"
    run.record.metrics[f"{word}_difference"] = difference
    size = max(float(row.abs().max()) for row in before)
    if not math.isfinite(difference) or difference > TOLERANCE[dtype] * max(1.0, size):
        raise RunFailed(f"The merged model is not the adapted one: {word}s differ by up to {difference:.3g}")
    told = f"Merged in {dtype}: the largest {word} difference from the adapted model is {difference:.3g}"
    if prepared.source.is_classifier:
        scores = torch.cat(before)
        run.record.metrics["score_range"] = float(scores.max() - scores.min())
        run.note(f"{told} on {len(before)} texts.")
        return
    run.record.metrics["share_same_token"] = share = share_same_token(before, after)
    run.note(f"{told} on {len(before)} prompts; the likeliest next token is the same at {share:.1%} of positions.")


def untie(model: PeftModel) -> None:
    """Give the output its own copy of the embeddings where the adapter changes either: merged, they are two matrices.

    peft (0.21) adds an adapter of one to the weights of both.
    """
    inner: Any = model.get_base_model()
    ends = (inner.get_input_embeddings(), inner.get_output_embeddings())
    if ends[1] is None or not any(isinstance(end, BaseTunerLayer) for end in ends):
        return
    first, last = (getattr(end, "base_layer", end) for end in ends)
    if first.weight.data_ptr() == last.weight.data_ptr():
        last.weight = nn.Parameter(last.weight.detach().clone(), requires_grad=False)
        inner.config.tie_word_embeddings = False


def tell_shift(
    prepared: Prepared, held: tuple[ModelSettings, ModelSettings], before: list[torch.Tensor], after: list[torch.Tensor]
) -> None:
    """Say how far the merged model lies from the model as it was trained, on a base of another precision."""
    run, (trained, used) = prepared.run, map(device.precision, held)
    shift = largest_difference(before, after)
    what = f"The adapter was trained on its base in {trained} and is merged into {used} weights"
    if prepared.source.is_classifier:
        order = share_same_order(before, after)
        run.record.metrics |= {"score_difference_as_trained": shift, "share_same_order_as_trained": order}
        run.note(
            f"{what}: rewards shift by up to {shift:.3g} (they span {run.record.metrics['score_range']:.3g}), and "
            f"{order:.1%} of pairs of texts keep their order. Never mix rewards of the two."
        )
        return
    share = share_same_token(before, after)
    run.record.metrics |= {"logit_difference_as_trained": shift, "share_same_token_as_trained": share}
    run.note(
        f"{what}: its answers shift, logits by up to {shift:.3g}, "
        f"the likeliest next token is the same at {share:.1%} of positions."
    )


def prove(prepared: Prepared, values: ModelSettings, rows: list[Ids], wanted: list[torch.Tensor]) -> None:
    """Load the folder afresh in plain transformers; raises RunFailed where its logits are not the merged model's."""
    run = prepared.run
    source = sources.locate(str(run.folder), trust_remote_code=values.trust_remote_code)
    if source.is_classifier != prepared.source.is_classifier:
        raise RunFailed(f"The saved model is another kind of model: {source.config.architectures}")
    found = logits(aligned(load(prepared, values, source)), rows)
    if not all(map(torch.equal, wanted, found)):
        shift = largest_difference(wanted, found)
        raise RunFailed(f"The saved model is not the merged one: loaded afresh, its logits differ by up to {shift:.3g}")
    word = "scores" if source.is_classifier else "logits"
    run.note(f"Loaded afresh from {run.folder} in plain transformers: the same {word}, bit for bit.")
