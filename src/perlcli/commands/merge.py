"""`perl merge`: adds an adapter to its base's weights once, as the paper does at test time, for an ordinary model."""

from __future__ import annotations

import gc
from typing import Any

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

from perlcli import device, settings, upstream
from perlcli.commands import early
from perlcli.errors import PerlError
from perlcli.model import roles, sources, tokenizers, weights
from perlcli.model.sources import Source
from perlcli.model.weights import ADAPTER_CONFIG
from perlcli.run import disk, peaks
from perlcli.run.lifecycle import Run, recording
from perlcli.run.output_folder import check_output
from perlcli.run.record import RunRecord
from perlcli.settings import Dtype, ModelSettings
from perlcli.terminal import say
from perlcli.training import merging, reward_model
from perlcli.training.merging import Merging
from perlcli.training.origin import check_fingerprint, check_tokenizer, trained_in
from perlcli.training.prepare import Prepared
from perlcli.training.rendering import RENDERING, own_style
from perlcli.training.rows import trained_on

DTYPES: tuple[Dtype, ...] = ("float32", "float16", "bfloat16")
TASKS = ("CAUSAL_LM", "SEQ_CLS", "None")  # None: saved without a task, which trl only needs for rewards


def run(given: settings.Merge) -> RunRecord | None:
    """Merge an adapter, prove that the folder gives the same logits, report what changes; None for a dry run."""
    prepared = find(given)
    values, source = precision_of(prepared), prepared.source
    kind = "reward model" if source.is_classifier else "policy"
    summary = f"adapter: {source.name}, a {kind} on the base {source.base_name}"
    if prepared.is_dry:
        say(f"{summary}\nmerged weights: {values.dtype}\noutput: {prepared.settings.run.output}")
        say("Dry run: nothing was loaded, merged or written.")
        return None
    with recording(prepared.run) as run:
        run.note(f"{summary}; merging into {values.dtype} weights.")
        write(prepared, values)
        run.record.peak_memory_mb = peaks.peak_mb()
    return run.record


def write(prepared: Merging, values: ModelSettings) -> None:
    """Measure, merge in the precision of `values`, measure again, save and reload, with one model in memory at a time.
    Raises RunFailed if the merged or the saved model is not the adapted one."""
    run, own = prepared.run, trained_in(prepared.source, trust_remote_code=values.trust_remote_code)
    rows = merging.measured_rows(prepared)
    trained, used = device.precision(own) if own else None, device.precision(values)
    as_trained = merging.trained_logits(prepared, own, rows) if own and trained != used else None
    gc.collect()  # make room for the next model
    merged = merging.merge(merging.adapted(prepared, values), prepared, rows)
    wanted = merging.logits(merging.aligned(merged), rows)
    if trained and as_trained:
        merging.note_shift(prepared, trained, used, as_trained, wanted)
    run.record.total_parameters = roles.count_parameters(merged)[1]
    reward_model.keep_head(run, merged)
    with disk.aside(run.folder) as side:
        merged.save_pretrained(str(side))
        prepared.tokenizer.save_pretrained(str(side))
        weights.copy_processor(prepared.source.base, side)
    del merged
    gc.collect()
    merging.prove(prepared, values, rows, wanted)


def precision_of(prepared: Merging) -> ModelSettings:
    """How to load the base to merge into: as it is stored, whatever it was trained in, and never quantised."""
    wanted = prepared.settings.merge.dtype
    if wanted == "auto":
        said = str(getattr(prepared.source.config, "dtype", None)).removeprefix("torch.")
        stored = weights.dtype(prepared.source.base) or said
        wanted = next((dtype for dtype in DTYPES if dtype == stored), "float32")
    return ModelSettings(dtype=wanted, trust_remote_code=prepared.settings.merge.trust_remote_code)


def find(given: settings.Merge) -> Merging:
    """Find the adapter and make every cheap check. Raises PerlError for the first that fails."""
    upstream.hush_bars()
    name, trust = early.adapter_name(given), given.merge.trust_remote_code
    source = sources.locate(name, option="The adapter", trust_remote_code=trust)
    _check_mergeable(source)
    check_fingerprint(source)
    merging.check_unshared(source, trust_remote_code=trust)
    resolved: settings.Merge = settings.resolve(given, {"output": early.merged_folder(name)})
    settings.check(resolved)
    early.check_apart(str(resolved.run.output), base=str(source.base), adapter=str(source.adapter))
    check_output(resolved)
    if source.is_embedded:
        device.spare_threads()
    tokenizer = tokenizers.load_tokenizer(source, trust_remote_code=trust)
    check_tokenizer(source, tokenizer)
    prepared = Prepared(
        resolved, source, tokenizer, tokenizers.renderer(source, tokenizer, own_style(source, tokenizer)), Run(resolved)
    )
    prepared.run.prompts = trained_on(source)
    prepared.run.note_device(precision_of(prepared))
    own = source.record.model.get(RENDERING) if source.record is not None else None
    prepared.run.record.model = tokenizers.describe(source, tokenizer) | ({} if own is None else {RENDERING: own})
    if source.record is not None and source.record.status != "finished":
        prepared.run.note(f"The run {name} did not finish ({source.record.status}): merging the adapter that it saved.")
    return prepared


def _check_mergeable(source: Source) -> None:
    """Raises PerlError for what can't be merged: a base, another type of adapter or task, a quantised base."""
    config = source.adapter_config
    if config is None:
        raise early.nothing_to_merge(source.name)
    tuners: dict[Any, Any] = PEFT_TYPE_TO_TUNER_MAPPING
    if not hasattr(tuners.get(config.peft_type), "merge_and_unload"):
        problem = f"The adapter {source.name} is {sources.kind_of(config)}, which adds nothing to weights"
        raise PerlError(f"{problem}: it can't be merged", "use it on its base with peft")
    task = sources.task_of(config)
    if task not in TASKS:
        hint = "perl merge accepts policies (CAUSAL_LM) and rewards (SEQ_CLS)"
        raise PerlError(f"The adapter {source.name} is for {task}", hint)
    if getattr(source.config, "quantization_config", None) is not None:
        hint = f"name its unquantised original as base_model_name_or_path in {source.adapter}/{ADAPTER_CONFIG}"
        raise PerlError(f"The base {source.base} is stored quantised: it has no 16-bit weights to merge into", hint)
