"""The policy: where it starts, what its anchor is, and how its folder is written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, set_seed

from perlcli import coffee, device, settings
from perlcli.data import Data, Prompt, with_all_columns
from perlcli.data.render import of_prompt
from perlcli.errors import PerlError
from perlcli.model import adapters, loading, roles, sources, tokenizers, weights
from perlcli.run.record import RunRecord, find_record
from perlcli.settings import BASE, SFT
from perlcli.training import rendering
from perlcli.training.origin import check_adapter, keep_apart
from perlcli.training.prepare import Prepared, filled, loaded
from perlcli.training.rows import fit

if TYPE_CHECKING:  # trl takes seconds to import, and an evaluation needs none of it
    from trl import RLOOConfig

ANCHOR_FOLDER = "anchor"
PROMPTS = 256  # that an evaluation answers by default
PROMPTS_AT_END = 64  # that the evaluation at the end of `perl rl` answers


def start(prepared: Prepared[settings.Sft | settings.Rl]) -> Any:
    """The model to train: the frozen base with the adapter that --model names or a fresh one; with --full, the base.
    Raises PerlError if it can't be loaded."""
    set_seed(prepared.settings.run.seed)  # a new adapter starts from random weights
    model = loading.load_causal(prepared.source, prepared.settings.model)
    loaded(prepared)
    if prepared.settings.lora.full:
        return loading.train_all(model)
    if prepared.source.adapter:
        return roles.load_adapter(model, prepared.source.adapter, trainable=True)
    return roles.new_adapter(model, prepared.settings.lora, "CAUSAL_LM")


def save(prepared: Prepared[settings.Sft | settings.Rl], model: Any, folder: Path) -> None:
    """Write the policy's adapter and the tokenizer into a folder; after full tuning, the full model instead."""
    if prepared.settings.lora.full:
        roles.round_weights(model, getattr(torch, device.dtype_name(prepared.settings.model)))
        model.save_pretrained(str(folder))
        weights.copy_processor(prepared.source.base, folder)
    else:
        roles.save_adapter(model, folder)
    prepared.tokenizer.save_pretrained(str(folder))
    if roles.ANCHOR in getattr(model, "peft_config", {}):
        roles.save_adapter(model, folder, roles.ANCHOR)
        (folder / roles.ANCHOR).replace(folder / ANCHOR_FOLDER)


def fitting_prompts(
    prepared: Prepared[settings.Rl | settings.Eval], rows: Data, role: str
) -> list[tuple[Prompt, list[int]]]:
    """The prompts that leave room for a completion within --max-length, each with its token ids. `role` is train or
    eval. Raises PerlError if --max-length leaves no room for any prompt."""
    most = PROMPTS_AT_END if isinstance(prepared.settings, settings.Rl) else PROMPTS
    completion, tokens = filled(prepared.settings.sampling.max_completion_length), partial(of_prompt, prepared.renderer)
    columns = fit(prepared, role, rows, tokens, completion=completion, most=most)
    fitting = list(columns)
    rows_of_all = with_all_columns([item["row"] for item in fitting])
    return [(row, item["ids"]) for row, item in zip(rows_of_all, fitting, strict=True)]


def start_of(folder: str) -> str | None:
    """The full model that was the anchor of a run with --full, or else its start; None for any other folder. Raises
    PerlError if the folder's record can't be read."""
    record = find_record(folder)
    start = _tuned_from(record)
    wanted = (record.settings.get("anchor") or SFT) if record is not None else SFT
    if start is None or wanted == SFT:
        return start
    return base_of(start) if wanted == BASE else str(wanted)


def base_of(model: str) -> str:
    """What the first of our runs with --full that led to this model started from. Raises PerlError for a bad record."""
    start = _tuned_from(find_record(model))
    return model if start is None else base_of(start)


def _tuned_from(record: RunRecord | None) -> str | None:
    if record is None or not record.settings.get("full"):
        return None
    return str(coffee.BASE) if record.model["name"] == coffee.NAME else os.path.expanduser(str(record.model["name"]))


def the_base(name: str) -> str:
    """A base for people, by its name."""
    return f"the {name}" if name == coffee.NAME else f"the base {name}"


@dataclass(frozen=True)
class Anchor:
    """The reference model of the KL penalty, found but not loaded."""

    words: str
    is_start: bool  # whether the policy starts at it, so that KL starts at 0
    adapter: str | None = None  # a policy's adapter on the same base; None is the bare base
    model: str | None = None  # with --full: a full model


def find_anchor(prepared: Prepared[settings.Rl]) -> Anchor:
    """What `--anchor` names. Raises PerlError if it can't be this policy's anchor."""
    if prepared.settings.rl.beta == 0:
        return Anchor("none in training, as --beta is 0", is_start=False, adapter=prepared.source.adapter)
    wanted = prepared.settings.rl.anchor or SFT
    if prepared.settings.lora.full:
        return _full_anchor(wanted, prepared)
    start = prepared.source.adapter
    if wanted == SFT:
        name = prepared.source.name if start else the_base(prepared.source.base_name)
        return Anchor(f"{name}, where RL starts", True, adapter=start)
    if wanted == BASE:
        return Anchor(the_base(prepared.source.base_name), start is None)
    source = _locate_anchor(wanted, prepared)
    if not sources.same_base(source, prepared.source):
        problem = f"--anchor {wanted} is on the base {source.base_name}, the policy on {prepared.source.base_name}"
        raise PerlError(problem, "the anchor shares the policy's base: name an adapter on the same base")
    if clash := adapters.apart(prepared.adapter, source.adapter_config):
        raise PerlError(f"--anchor {wanted} can't share the policy's base: {clash}", f"--anchor {SFT}")
    check_adapter(source, prepared.run, prepared.settings.model)
    return Anchor(wanted, source.adapter == start, adapter=source.adapter)


def _locate_anchor(wanted: str, prepared: Prepared[settings.Rl]) -> sources.Source:
    trust = prepared.settings.model.trust_remote_code
    source = sources.locate(wanted, option="--anchor", trust_remote_code=trust)
    if source.is_classifier:
        raise PerlError(f"--anchor {wanted} is a reward model, not a policy")
    keep_apart(prepared.settings, source)
    prepared.run.record.model["anchor"] = weights.fingerprint(source.place)
    tokenizer = tokenizers.load_tokenizer(source, trust_remote_code=trust)
    its, ours = map(tokenizers.tokenizer_fingerprint, (tokenizer, prepared.tokenizer))
    if its != ours:
        raise PerlError(f"--anchor {wanted} has another tokenizer or chat template ({its}) than the policy ({ours})")
    rendering.check(source, prepared.run, "--anchor")
    return source


def _full_anchor(wanted: str, prepared: Prepared[settings.Rl]) -> Anchor:
    start = prepared.source.base
    if wanted == SFT:
        return Anchor(f"{prepared.source.name}, where RL starts", True, model=start)
    if wanted == BASE:
        base = base_of(start)
        trust = prepared.settings.model.trust_remote_code
        keep_apart(prepared.settings, sources.locate(base, option="--anchor", trust_remote_code=trust))
        return Anchor(f"the base {base}", base == start, model=base)
    source = _locate_anchor(wanted, prepared)
    if source.adapter:
        raise PerlError(f"--anchor {wanted} is an adapter, but --full needs a full model", f"perl merge {wanted}")
    return Anchor(wanted, source.base == start, model=source.base)


@contextmanager
def named_after(model: PreTrainedModel | PeftModel, anchor: Anchor, config: RLOOConfig) -> Iterator[None]:
    """Make TRL load its reference model from the anchor, on the policy's device: it takes the name that the policy's
    config was loaded from, and would spread the model over all visible GPUs."""
    before = model.name_or_path
    if anchor.model is not None:
        model.config._name_or_path = anchor.model
        config.model_init_kwargs = {"device_map": {"": str(roles.device_of(model))}}
    try:
        yield
    finally:
        model.config._name_or_path = before
        config.model_init_kwargs = None


def set_anchor(trainer: Any, anchor: Anchor, prepared: Prepared[settings.Rl]) -> None:
    """Put the anchor where TRL looks for it: the adapter `ref`, or no such adapter for the bare base. Raises PerlError
    if the anchor's adapter doesn't fit.

    TRL has already put a copy of the policy there. It stays if RL starts from an adapter; without a KL penalty it is
    only kept for `perl eval`. For a policy that starts at the base it would only take time and memory.
    """
    model = trainer.model
    if not isinstance(model, PeftModel):
        dtype = getattr(torch, device.dtype_name(prepared.settings.model))
        for parameter in trainer.ref_model.parameters() if trainer.ref_model is not None else ():
            parameter.data = parameter.data.to(dtype).float()  # TRL loads it in float32; the policy was rounded
        return
    if anchor.adapter and (anchor.is_start or not trainer.beta):
        roles.as_float32(model)  # on a quantised base peft makes the copy of some kinds in bfloat16
        roles.copy_policy_to_anchor(model)
        return
    model.delete_adapter(roles.ANCHOR)
    if anchor.adapter:
        roles.add_adapter(model, anchor.adapter, roles.ANCHOR)


@contextmanager
def switched(policy: PeftModel, adapter: str | None) -> Iterator[PeftModel]:
    """The policy's model with another adapter (None: the bare base) while inside."""
    with roles.switched(policy, adapter):
        yield policy


def attach_anchor(model: PeftModel, policy: sources.Source) -> tuple[str | None, str]:
    """Add the anchor that `perl rl` keeps in a policy's folder to the policy's base. Returns its name there (None for
    the bare base) and a description. Raises PerlError if it doesn't fit the base."""
    folder = Path(policy.place) / ANCHOR_FOLDER
    if policy.adapter is None or not (folder / weights.ADAPTER_CONFIG).exists():
        return None, the_base(policy.base_name)
    roles.add_adapter(model, str(folder), roles.ANCHOR)
    wanted = policy.record.settings.get("anchor") if policy.record is not None else None
    if wanted not in (None, SFT):
        return roles.ANCHOR, f"{wanted}, as the run kept it"
    start = policy.record.model.get("name") if policy.record is not None else None
    return roles.ANCHOR, f"{start or 'the policy'}, where RL started"
