"""The adapter that a run starts from or creates, checked before any weights are loaded."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig

from perlcli import settings
from perlcli.errors import PerlError
from perlcli.model import adapters, sources, weights
from perlcli.model.sources import Source
from perlcli.model.target_modules import target_modules
from perlcli.redaction import hidden_in
from perlcli.run.lifecycle import Run
from perlcli.run.record import find_record

LORA_FIELDS = {"lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "use_dora": "use_dora"}


def task_of(stage: settings.Training) -> str:
    """peft's name for what a stage trains: SEQ_CLS trains and saves a reward's head."""
    return "SEQ_CLS" if isinstance(stage, settings.Reward) else "CAUSAL_LM"


def adapter_of(resolved: settings.Training | settings.Eval, source: Source) -> PeftConfig | None:
    """The peft config of the adapter that a run starts from, measures or creates; None for none. Raises PerlError if
    peft has no such adapter for this base, before a run's folder is made."""
    if isinstance(resolved, settings.Eval):
        return source.adapter_config
    if source.adapter_config is not None:
        adapters.check_precision(source.adapter_config, resolved.model, f"The adapter {source.name}")
        return source.adapter_config
    if resolved.lora.full:
        return None
    config = new_adapter(resolved, source)
    adapters.check_precision(config, resolved.model, "The adapter")
    return config


def new_adapter(resolved: settings.Training, source: Source) -> PeftConfig:
    """The peft config of a new adapter, tried on the model's modules without weights. Raises PerlError if it fails."""
    lora, task = resolved.lora, task_of(resolved)
    config = adapters.asked(lora, task)
    model = sources.skeleton(source, trust_remote_code=resolved.model.trust_remote_code)
    if model is not None and lora.peft is not None:
        adapters.try_on(lora, model, task)
    elif model is not None:
        target_modules(model, str(lora.lora_target_modules))
    return config


def keep_file(resolved: settings.Training | settings.Eval, run: Run) -> None:
    """Keep the content of the --peft file in the record. Raises PerlError with --resume if the file had other content
    when the run started."""
    if isinstance(resolved, settings.Eval) or resolved.lora.peft is None:
        return
    content = hidden_in(adapters.content(resolved.lora.peft))  # as a record has it
    run.record.model["peft"] = content
    before = find_record(str(run.folder)) if resolved.keep.resume else None
    if before is not None and before.model.get("peft") != content:
        raise PerlError(
            f"--resume: {resolved.lora.peft} describes another adapter than the run in {run.folder} trains",
            f"use --peft {run.folder}/{weights.ADAPTER_CONFIG}, if the run saved it",
        )


def adapter_settings(given: settings.Training | settings.Eval, source: Source) -> dict[str, Any]:
    """The adapter settings of a run that starts from an adapter: the adapter decides them, not the user. Raises
    PerlError if the run can't start from this adapter, or the user asked for other settings."""
    config = source.adapter_config
    if config is None or isinstance(given, settings.Eval):
        return {}
    check_start(given, source, config)
    lora = adapters.as_lora(config)
    if lora is None:
        values: dict[str, Any] = dict.fromkeys(settings.LORA[:-1])
    else:
        values = {name: getattr(lora, field) for name, field in LORA_FIELDS.items()}
        modules = lora.target_modules or []
        values["lora_target_modules"] = modules if isinstance(modules, str) else ",".join(sorted(modules))
        if isinstance(given, settings.Rl) and not given.lora.lora_dropout:
            values["lora_dropout"] = 0.0  # the adapter's was for its own training; here it would part policy and anchor
    check_agrees(given.lora, source.name, config, values)
    return values


def check_start(given: settings.Training, source: Source, config: PeftConfig) -> None:
    """Raises PerlError if this run can't start from the adapter with this config."""
    name = source.name
    hint = f"perl merge {name} --output DIR, then --model DIR"
    if given.lora.full:
        raise PerlError(f"--full can't start from the adapter {name}", hint)
    if given.lora.peft:
        raise PerlError(f"--peft {given.lora.peft} describes a new adapter, but {name} is already an adapter", hint)
    is_rl = isinstance(given, settings.Rl)
    if is_rl and getattr(config, "bias", "none") != "none":  # peft writes them into the base
        raise PerlError(f"The adapter {name} changes the biases of its base, which the anchor shares", hint)
    if is_rl and adapters.moves_base(config):
        start = f"init_lora_weights={getattr(config, 'init_lora_weights', None)}"
        raise PerlError(f"Loading the adapter {name} ({start}) changes its base, which other roles share", hint)
    adapters.check_kind(config, f"The adapter {name}", hint)
    fault = adapters.why_alone(config) if is_rl else None
    if fault is not None:
        raise PerlError(f"The adapter {name} can't share its base: {fault}", hint)


def check_agrees(lora: settings.LoraSettings, name: str, config: PeftConfig, values: dict[str, Any]) -> None:
    """Raises PerlError if the user asked for an adapter setting that differs from the existing adapter's `values`."""
    clashes = []
    for option in settings.LORA:
        asked, own = getattr(lora, option), values.get(option)
        if asked not in (None, False, own):
            what = f"has {own}" if own else f"is {adapters.words(config)}"
            clashes.append(f"--{settings.dashed(option)} {asked}, but the adapter {what}")
    if clashes:
        raise PerlError(f"{name} is already an adapter: {'; '.join(clashes)}", "leave the option out")
