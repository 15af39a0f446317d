"""Where a run's adapter comes from, checked before any weights are loaded: a new one against the model, an existing one
against the settings and against the record of the run that trained it (base, tokenizer, precision)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftConfig
from transformers import PreTrainedTokenizerBase

from perlcli import device, settings
from perlcli.errors import PerlError
from perlcli.model import adapters, sources, tokenizers, weights
from perlcli.model.sources import Source
from perlcli.redaction import hidden_in
from perlcli.run.files import PROOF
from perlcli.run.lifecycle import Run
from perlcli.run.output_folder import is_inside
from perlcli.run.record import find_record

# What an evaluation takes over from the RL run that trained its policy.
LENGTHS = ("min_completion_length", "max_completion_length")
SAMPLED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop", *LENGTHS)
LORA_FIELDS = {"lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "use_dora": "use_dora"}


def task_of(stage: settings.Training) -> str:
    """peft's name for what a stage trains: SEQ_CLS trains and saves a reward's head."""
    return "SEQ_CLS" if isinstance(stage, settings.Reward) else "CAUSAL_LM"


def adapter_of(resolved: settings.Training | settings.Eval, source: Source) -> PeftConfig | None:
    """The adapter that a run starts from, measures or creates. Raises PerlError if it does not suit its base."""
    config, name = source.adapter_config, f"The adapter {source.name}"
    if isinstance(resolved, settings.Eval) or (config is None and resolved.lora.full):
        return config
    if config is None:
        config, name = _new_adapter(resolved, source), "The adapter"
    adapters.check_precision(config, resolved.model, name)
    return config


def _new_adapter(resolved: settings.Training, source: Source) -> PeftConfig:
    """The config of a new adapter, tried on the model's modules without weights. Raises PerlError if it doesn't fit."""
    lora, task = resolved.lora, task_of(resolved)
    config = adapters.asked(lora, task)
    model = sources.skeleton(source, trust_remote_code=resolved.model.trust_remote_code)
    if model is not None:
        adapters.try_on(lora, model, task)
    return config


def keep_file(resolved: settings.Training | settings.Eval, run: Run) -> None:
    """Keep the content of the --peft file in the record. Raises PerlError if a resumed run began with another one."""
    if isinstance(resolved, settings.Eval) or resolved.lora.peft is None:
        return
    content = hidden_in(adapters.content(resolved.lora.peft))  # as a record has it
    run.record.model["peft"] = content
    before = find_record(str(run.folder)) if resolved.keep.resume else None
    if before is not None and before.model.get("peft") != content:
        problem = f"--resume: {resolved.lora.peft} describes another adapter than the run in {run.folder} trains"
        raise PerlError(problem, f"use --peft {run.folder}/{weights.ADAPTER_CONFIG}, if the run saved it")


def adapter_settings(given: settings.Training | settings.Eval, source: Source) -> dict[str, object]:
    """The adapter settings of a run that starts from an adapter, which decides them. Raises PerlError if the run can't
    start from this adapter, or the user asked for other settings."""
    config = source.adapter_config
    if config is None or isinstance(given, settings.Eval):
        return {}
    _check_start(given, source, config)
    lora = adapters.as_lora(config)
    if lora is None:
        values: dict[str, object] = dict.fromkeys(settings.LORA[:-1])
    else:
        values = {name: getattr(lora, field) for name, field in LORA_FIELDS.items()}
        modules = lora.target_modules or []
        values["lora_target_modules"] = modules if isinstance(modules, str) else ",".join(sorted(modules))
        if isinstance(given, settings.Rl) and not given.lora.lora_dropout:
            values["lora_dropout"] = 0.0  # the adapter's was for its own training; here it would part policy and anchor
    clashes = []
    for option in settings.LORA:
        asked, own = getattr(given.lora, option), values.get(option)
        if asked not in (None, False, own):
            what = f"has {own}" if own else f"is {adapters.words(config)}"
            clashes.append(f"--{settings.dashed(option)} {asked}, but the adapter {what}")
    if clashes:
        raise PerlError(f"{source.name} is already an adapter: {'; '.join(clashes)}", "leave the option out")
    return values


def _check_start(given: settings.Training, source: Source, config: PeftConfig) -> None:
    name, hint = source.name, f"perl merge {source.name} --output DIR, then --model DIR"
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


def sampling_settings(given: settings.Training | settings.Eval, source: Source) -> dict[str, Any]:
    """How the RL run that trained a policy sampled, which its evaluation takes over unless the user asks for more."""
    if not isinstance(given, settings.Eval) or source.record is None or source.record.command != "rl":
        return {}
    kept = {name: source.record.settings.get(name) for name in SAMPLED}
    used = {name: tuple(value) if isinstance(value, list) else value for name, value in kept.items()}
    return {name: value for name, value in used.items() if value not in (None, ())}


# An existing adapter and its record


def keep_apart(resolved: settings.Training | settings.Eval, source: Source) -> None:
    """Raises PerlError if --overwrite would delete an adapter that the run reads, or its base."""
    for place in (source.base, source.adapter):
        if resolved.run.overwrite and place and is_inside(place, Path(str(resolved.run.output)).expanduser()):
            raise PerlError(f"--overwrite would delete {place}, which this run reads", "choose another --output")


def check_tokenizer(source: Source, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises PerlError if an adapter's tokenizer or chat template was changed since its run."""
    if source.adapter is None or source.record is None:
        return
    known, now = source.record.model.get("tokenizer"), tokenizers.tokenizer_fingerprint(tokenizer)
    if known and known != now:
        problem = f"{source.name} was trained with another tokenizer or chat template ({known}) than it has now ({now})"
        raise PerlError(problem, "put the tokenizer files of its run back into its folder")


def check_adapter(source: Source, run: Run, used: settings.ModelSettings | None) -> None:
    """Raises PerlError if an adapter's record names other base weights, or with --strict another precision than `used`,
    by which the base is loaded (None: as the adapter was trained). Without --strict another precision is a note."""
    if source.adapter is None or source.record is None:
        return
    check_fingerprint(source)
    trained = source.record.device.get("precision")
    if used is None or trained == device.precision(used):
        return
    problem = f"{source.name} was trained on its base in {trained} but is used in {device.precision(used)}"
    if used.strict:
        raise PerlError(f"--strict: {problem}", "load the base as it was in training, or leave out --strict")
    is_measured = run.record.command in ("rl", "eval") and (Path(source.adapter) / PROOF).exists()
    if not is_measured:  # otherwise the shift is reported when the reward is loaded
        run.note(f"{problem}: its outputs shift slightly.")


def check_fingerprint(source: Source) -> None:
    """Raises PerlError if an adapter's base has other weights than its record says, once a Hub base is downloaded."""
    if source.adapter is None or source.record is None:
        return
    known, now = source.record.model.get("fingerprint"), source.fingerprint
    if known and now and known != now:
        hint = f"put its base back, or correct base_model_name_or_path in {source.adapter}/{weights.ADAPTER_CONFIG}"
        raise PerlError(
            f"{source.name} was trained on other weights ({known}) than those of {source.base} ({now})", hint
        )


def trained_in(source: Source, *, trust_remote_code: bool = False) -> settings.ModelSettings | None:
    """How the run that left an adapter or classifier held its base, by its record; None without a record. The precision
    is that of the machine it ran on, where `auto` may have meant something else than here."""
    if source.record is None:
        return None
    precision, dtype = source.record.device["precision"], source.record.settings.get("dtype", "auto")
    four, eight = precision == "4-bit", precision == "8-bit"
    if not (four or eight):
        dtype = precision
    elif dtype == "auto":
        dtype = "bfloat16"
    return settings.ModelSettings(
        dtype=dtype, load_in_4bit=four, load_in_8bit=eight, trust_remote_code=trust_remote_code
    )
