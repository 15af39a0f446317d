"""The policy: where it starts, which anchor holds it, and how its folder is written."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from perlcli import coffee, device, settings
from perlcli.data import Data, Prompt
from perlcli.data.tokens import of_prompt
from perlcli.errors import PerlError
from perlcli.model import loading, roles, sources, tokenizers, weights
from perlcli.run.record import find_record
from perlcli.settings import BASE, SFT
from perlcli.training.origin import check_adapter, keep_apart
from perlcli.training.prepare import Prepared, loaded
from perlcli.training.rows import fit

ANCHOR_FOLDER = "anchor"


def start(prepared: Prepared) -> Any:
    """The model to train: on the frozen base the adapter that --model names, or a fresh one; with --full the base."""
    set_seed(prepared.settings.run.seed)  # a new adapter begins at random
    model = loading.load_causal(prepared.source, prepared.settings.model)
    loaded(prepared)
    if prepared.settings.lora.full:
        return model.float().requires_grad_(True)  # bfloat16 weights would round small updates away
    if prepared.source.adapter:
        return roles.load_adapter(model, prepared.source.adapter, trainable=True)
    return roles.new_adapter(model, prepared.settings.lora, "CAUSAL_LM")


def save(prepared: Prepared, model: Any, folder: Path) -> None:
    """Write the policy's adapter, or the whole model after full tuning, and the tokenizer, into a folder."""
    if prepared.settings.lora.full:
        model.to(getattr(torch, device.dtype_name(prepared.settings.model)))
        model.save_pretrained(str(folder))
    else:
        roles.save_adapter(model, folder)
    prepared.tokenizer.save_pretrained(str(folder))
    if roles.ANCHOR in getattr(model, "peft_config", {}):
        roles.save_adapter(model, folder, roles.ANCHOR)
        (folder / roles.ANCHOR).replace(folder / ANCHOR_FOLDER)


def fitting_prompts(prepared: Prepared, rows: Data, role: str) -> list[tuple[Prompt, list[int]]]:
    """The prompts that leave room for a completion within --max-length, each with its token ids."""
    values = settings.flat(prepared.settings)
    room = values["max_length"] - values["max_completion_length"]
    if room <= 0:
        raise PerlError("--max-length leaves no room for a prompt before --max-completion-length", "raise --max-length")
    fitting = fit(prepared, role, rows, partial(of_prompt, prepared.renderer), room)
    return [(item["row"], item["ids"]) for item in fitting]


def start_of(folder: str) -> str | None:
    """The whole model that a run with --full was held to, or began from, by its record; None for any other folder."""
    start = _tuned_from(folder)
    record = find_record(folder)
    if record is None or start is None:
        return None
    wanted = record.settings.get("anchor") or SFT
    if wanted == SFT:
        return start
    return base_of(start) if wanted == BASE else str(wanted)


def base_of(model: str) -> str:
    """The model before any full tuning of ours: what a run with --full began from, and so on back."""
    start = _tuned_from(model)
    return model if start is None else base_of(start)


def _tuned_from(folder: str) -> str | None:
    """The model that a run with --full began from; None for any other folder."""
    record = find_record(folder)
    if record is None or not record.settings.get("full"):
        return None
    return str(coffee.BASE) if record.model["name"] == coffee.NAME else os.path.expanduser(str(record.model["name"]))


def _round_reference(reference: Any, prepared: Prepared) -> None:
    """Give TRL's reference model the precision that the policy was loaded in: TRL reads it from its file in float32."""
    dtype = getattr(torch, device.dtype_name(prepared.settings.model))
    for parameter in reference.parameters() if reference is not None else ():
        parameter.data = parameter.data.to(dtype).float()


@dataclass(frozen=True)
class Anchor:
    """What the KL penalty holds the policy to, found but not loaded."""

    words: str
    is_start: bool  # the policy begins at it, so that KL begins at 0
    adapter: str | None = None  # a policy's adapter on the same base; None is the bare base
    model: str | None = None  # under full tuning: a whole model


def find_anchor(prepared: Prepared) -> Anchor:
    """What `--anchor` names. Raises PerlError where it can't stand beside the policy."""
    if prepared.settings.rl.beta == 0:
        return Anchor("none in training, as --beta is 0", is_start=False, adapter=prepared.source.adapter)
    wanted = prepared.settings.rl.anchor or SFT
    if prepared.settings.lora.full:
        return _whole_anchor(wanted, prepared)
    start = prepared.source.adapter
    if wanted == SFT:
        return Anchor("the policy that RL starts from" if start else "the base, where RL starts", True, adapter=start)
    if wanted == BASE:
        return Anchor("the base", start is None)
    source = _locate_anchor(wanted, prepared)
    if not sources.same_base(source, prepared.source):
        raise PerlError(
            f"--anchor {wanted} is on the base {source.base_name}, the policy on {prepared.source.base_name}",
            "the anchor shares the policy's base: give one of the same",
        )
    check_adapter(source, prepared.run, prepared.settings.model)
    return Anchor(wanted, source.adapter == start, adapter=source.adapter)


def _locate_anchor(wanted: str, prepared: Prepared) -> sources.Source:
    trust = prepared.settings.model.trust_remote_code
    source = sources.locate(wanted, option="--anchor", trust_remote_code=trust)
    if source.is_classifier:
        raise PerlError(f"--anchor {wanted} is a reward model, not a policy")
    keep_apart(prepared.settings, source)
    prepared.run.record.model["anchor"] = weights.fingerprint(source.adapter or source.base)
    tokenizer = tokenizers.load_tokenizer(source, trust_remote_code=trust)
    marks = [tokenizers.tokenizer_fingerprint(tokenizer), tokenizers.tokenizer_fingerprint(prepared.tokenizer)]
    if marks[0] != marks[1]:
        raise PerlError(
            f"--anchor {wanted} has another tokenizer or chat template ({marks[0]}) than the policy ({marks[1]})"
        )
    return source


def _whole_anchor(wanted: str, prepared: Prepared) -> Anchor:
    start = prepared.source.base
    if wanted == SFT:
        return Anchor("the model that RL starts from", True, model=start)
    if wanted == BASE:
        found = base_of(start)
        trust = prepared.settings.model.trust_remote_code
        keep_apart(prepared.settings, sources.locate(found, option="--anchor", trust_remote_code=trust))
        return Anchor(f"the base {found}", found == start, model=found)
    source = _locate_anchor(wanted, prepared)
    if source.adapter:
        raise PerlError(f"--anchor {wanted} is an adapter, and --full needs a whole model", f"perl merge {wanted}")
    return Anchor(wanted, source.base == start, model=source.base)


@contextmanager
def named_after(model: Any, anchor: Anchor) -> Iterator[None]:
    """Let TRL load its reference model from the anchor: it takes the name that the policy's config was loaded from."""
    before = model.name_or_path
    if anchor.model is not None:
        model.config._name_or_path = anchor.model
    try:
        yield
    finally:
        model.config._name_or_path = before


def set_anchor(trainer: Any, anchor: Anchor, prepared: Prepared) -> None:
    """Put the anchor where TRL looks for it: the adapter `ref`, or none for the bare base.

    TRL has put a copy of the policy there, which stays where RL starts from an adapter; without a penalty it is kept
    for `perl eval` alone. For a policy that begins at the base that copy is an adapter that adds nothing, and takes
    time and memory: the bare base gives the same numbers.
    """
    model = trainer.model
    if not hasattr(model, "peft_config"):
        _round_reference(trainer.ref_model, prepared)
        return
    if anchor.adapter and (anchor.is_start or not trainer.beta):
        roles.as_float32(model)  # on a quantised base peft makes the copy of some kinds in bfloat16
        parameters = dict(model.named_parameters())
        for name, parameter in parameters.items():
            if roles.is_of(roles.POLICY, name):  # TRL's copy leaves out adapters of embeddings
                place = re.sub(rf"\.{roles.POLICY}(\.|$)", rf".{roles.ANCHOR}\1", name)
                parameters[place].data.copy_(parameter.data)
        return
    model.delete_adapter(roles.ANCHOR)
    if anchor.adapter:
        roles.add_adapter(model, anchor.adapter, roles.ANCHOR)


def attach_anchor(model: Any, folder: str | None) -> tuple[str | None, str]:
    """Put the anchor that `perl rl` keeps beside its policy on the same base; gives its name there, None for the bare
    base, and what it is in words."""
    place = Path(folder or "") / ANCHOR_FOLDER
    if folder is None or not (place / weights.ADAPTER_CONFIG).exists():
        return None, "the base"
    roles.add_adapter(model, str(place), roles.ANCHOR)
    record = find_record(folder)
    wanted = record.settings.get("anchor") if record is not None else None
    return roles.ANCHOR, "the policy that RL started from" if wanted in (None, SFT) else f"{wanted}, as the run kept it"
