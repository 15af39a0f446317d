"""The policy: where it starts, how its folder is written, and the anchor that stands beside it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from perlcli import base, coffee, data, device, roles, settings
from perlcli.data import Data, Prompt
from perlcli.errors import PerlError
from perlcli.prepare import Prepared, loaded, report_data
from perlcli.record import find_record

ANCHOR_FOLDER = "anchor"


def start(prepared: Prepared) -> Any:
    """The model to train: on the frozen base the adapter that --model names, or a fresh one; with --full the base."""
    set_seed(prepared.settings.run.seed)  # a new adapter begins at random
    model = base.load_causal(prepared.source, prepared.settings.model)
    loaded(prepared)
    if prepared.settings.lora.full:
        return model.float().requires_grad_(True)  # bfloat16 weights would round small updates away
    if prepared.source.adapter:
        return roles.load_adapter(model, prepared.source.adapter, trainable=True)
    return roles.new_adapter(model, prepared.settings.lora, "CAUSAL_LM")


def save(prepared: Prepared, model: Any) -> None:
    """Write the policy's adapter, or the whole model after full tuning, and the tokenizer into the run's folder."""
    if prepared.settings.lora.full:
        model.to(getattr(torch, device.dtype_name(prepared.settings.model)))
        model.save_pretrained(str(prepared.run.folder))
    else:
        roles.save_adapter(model, prepared.run.folder)
    prepared.tokenizer.save_pretrained(str(prepared.run.folder))
    if roles.ANCHOR in getattr(model, "peft_config", {}):
        roles.save_adapter(model, prepared.run.folder, roles.ANCHOR)
        place, old = prepared.run.folder / ANCHOR_FOLDER, prepared.run.folder / ".anchor-before-resume"
        shutil.rmtree(old, ignore_errors=True)
        if place.exists():
            place.replace(old)
        (prepared.run.folder / roles.ANCHOR).replace(place)
        shutil.rmtree(old, ignore_errors=True)


def fitting_prompts(prepared: Prepared, rows: Data, role: str) -> list[tuple[Prompt, list[int]]]:
    """The prompts that leave room for a completion within --max-length, each with its token ids."""
    values = settings.flat(prepared.settings)
    room = values["max_length"] - values["max_completion_length"]
    if room <= 0:
        raise PerlError("--max-length leaves no room for a prompt before --max-completion-length", "raise --max-length")

    def row_tokens(row: Prompt) -> dict[str, Any]:
        return {"row": row, "ids": prepared.renderer.prompt_ids(row.prompt)}

    fitting = data.fit(rows, room, row_tokens)
    report_data(prepared.run, role, rows)
    return [(item["row"], item["ids"]) for item in fitting]


def start_of(folder: str) -> str | None:
    """The whole model that a run with --full began from, by the run's record; None for any other folder."""
    record = find_record(folder)
    if record is None or not record.settings.get("full"):
        return None
    name = record.model["name"]
    return str(coffee.BASE if name == base.EMBEDDED else name)


def attach_anchor(model: Any, folder: str | None) -> str | None:
    """Put the anchor that `perl rl` keeps beside its policy on the same base; None where the base is the anchor."""
    place = Path(folder or "") / ANCHOR_FOLDER
    if folder is None or not (place / base.ADAPTER_CONFIG).exists():
        return None
    roles.add_adapter(model, str(place), roles.ANCHOR)
    model.set_adapter(roles.POLICY)
    roles.as_float32(model)
    return roles.ANCHOR
