"""The adapter that a run starts from or creates, checked before any weights load."""

from __future__ import annotations

from typing import Any

from perlcli import settings
from perlcli.errors import PerlError
from perlcli.model import adapters, sources, weights
from perlcli.model.sources import Source
from perlcli.model.target_modules import target_modules
from perlcli.redaction import hidden_in
from perlcli.run.lifecycle import Run
from perlcli.run.record import find_record

LORA_FIELDS = {"lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "use_dora": "use_dora"}
TASKS = {"reward": "SEQ_CLS"}  # what peft is told that a stage trains; CAUSAL_LM where nothing stands here


def adapter_of(resolved: Any, source: Source) -> Any:
    """The peft config of the adapter that a run starts from or makes; None for none.

    Raises PerlError where peft has none for this base, before a run's folder is made.
    """
    if not hasattr(resolved, "lora") or source.adapter_config is not None:
        config, what = source.adapter_config, f"The adapter {source.name}"
    else:
        config, what = None if resolved.lora.full else new_adapter(resolved, source), "The adapter"
    if config is not None and hasattr(resolved, "lora"):
        adapters.check_precision(config, resolved.model, what)
    return config


def new_adapter(resolved: Any, source: Source) -> Any:
    """The peft config of a new adapter, tried on the model's modules without their weights. Raises PerlError."""
    lora, task = resolved.lora, task_of(resolved)
    config = adapters.asked(lora, task)
    model = sources.skeleton(source, trust_remote_code=resolved.model.trust_remote_code)
    if model is not None and lora.peft is not None:
        adapters.try_on(lora, model, task)
    elif model is not None:
        target_modules(model, str(lora.lora_target_modules))
    return config


def task_of(resolved: Any) -> str:
    """What peft is told that a stage trains."""
    return TASKS.get(settings.command_of(resolved), "CAUSAL_LM")


def keep_file(resolved: Any, run: Run) -> None:
    """Keep in the record what the --peft file holds; raises PerlError under --resume where it held something else."""
    if not hasattr(resolved, "lora") or resolved.lora.peft is None:
        return
    run.record.model["peft"] = held = hidden_in(adapters.content(resolved.lora.peft))  # as a record has it
    before = find_record(str(run.folder)) if resolved.keep.resume else None
    if before is not None and before.model.get("peft") != held:
        raise PerlError(
            f"--resume: {resolved.lora.peft} holds another adapter than the one that the run in {run.folder} trains",
            f"--peft {run.folder}/{weights.ADAPTER_CONFIG} is that one, if it was saved",
        )


def adapter_settings(given: Any, source: Source) -> dict[str, Any]:
    """The settings of the adapter that a run starts from: they are the adapter's, not the user's, to set."""
    config = source.adapter_config
    if config is None or not hasattr(given, "lora"):
        return {}
    check_start(given, source)
    if adapters.kind_of(config) != "LORA":
        return asked_alike(given, source, dict.fromkeys(settings.LORA[:-1]))
    found = {name: getattr(config, field) for name, field in LORA_FIELDS.items()}
    modules = config.target_modules
    found["lora_target_modules"] = modules if isinstance(modules, str) else ",".join(sorted(modules))
    if settings.command_of(given) == "rl" and not given.lora.lora_dropout:
        found["lora_dropout"] = 0.0  # the adapter's was for the training before: it would part policy and anchor
    return asked_alike(given, source, found)


def check_start(given: Any, source: Source) -> None:
    """Raise PerlError for an adapter that this run can't start from."""
    config, name = source.adapter_config, source.name
    hint = f"perl merge {name} --output DIR, then --model DIR"
    if given.lora.full:
        raise PerlError(f"--full can't start from the adapter {name}", hint)
    if given.lora.peft:
        raise PerlError(f"--peft {given.lora.peft} says what a new adapter is, and {name} is an adapter already", hint)
    if settings.command_of(given) == "rl":
        if getattr(config, "bias", "none") != "none":  # peft writes them into the base
            raise PerlError(f"The adapter {name} changes the biases of its base, which is its anchor's too", hint)
        if adapters.moves_base(config):
            raise PerlError(
                f"The adapter {name} (init_lora_weights={config.init_lora_weights}) moves its base's weights as it is "
                "loaded, and the base serves other roles too", hint,
            )  # fmt: skip
    adapters.check_kind(config, f"The adapter {name}", hint)
    fault = adapters.why_alone(config) if settings.command_of(given) == "rl" else None
    if fault is not None:
        raise PerlError(f"The adapter {name} can't share its base: {fault}", hint)


def asked_alike(given: Any, source: Source, found: dict[str, Any]) -> dict[str, Any]:
    """What an adapter is, where the user asked for nothing else. Raises PerlError."""
    clashes = []
    for name in settings.LORA:
        asked, its = getattr(given.lora, name), found.get(name)
        if asked not in (None, False, its):
            told = f"has {its}" if its else f"is {adapters.words(source.adapter_config)}"
            clashes.append(f"--{settings.dashed(name)} {asked}, but the adapter {told}")
    if clashes:
        raise PerlError(f"{source.name} is an adapter already: " + "; ".join(clashes), "leave the option out")
    return found
