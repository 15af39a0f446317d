"""Checks an adapter against the record of the run that trained it: base, tokenizer, precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from perlcli import device, settings
from perlcli.errors import PerlError
from perlcli.model import tokenizers, weights
from perlcli.model.sources import Source
from perlcli.run.files import PROOF
from perlcli.run.lifecycle import Run
from perlcli.run.output_folder import is_inside
from perlcli.run.record import find_record


def keep_apart(resolved: Any, source: Source) -> None:
    """Raise PerlError where --overwrite would delete an adapter that the run reads, or the base below it."""
    folder = Path(str(resolved.run.output)).expanduser()
    for place in (source.base, source.adapter):
        if resolved.run.overwrite and place and is_inside(place, folder):
            raise PerlError(f"--overwrite would delete {place}, which this run reads", "name another --output")


def check_tokenizer(source: Source, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise PerlError where an adapter's folder has another tokenizer or chat template now than its run used."""
    record = find_record(source.adapter)
    known, found = record.model.get("tokenizer") if record else None, tokenizers.tokenizer_fingerprint(tokenizer)
    if known and known != found:
        raise PerlError(
            f"{source.name} was trained with another tokenizer or chat template ({known}) than it has now ({found})",
            "put the tokenizer files of its run back into its folder",
        )


def check_adapter(source: Source, run: Run, used: settings.ModelSettings | None) -> None:
    """Hold an adapter's own record against the base that it is put on: its weights, and its precision (None: its own).

    Raises PerlError for other weights, and under --strict for another precision, which is a note otherwise: how far a
    reward shifts is measured when it is loaded.
    """
    record = find_record(source.adapter)
    if record is None:
        return
    check_fingerprint(source)
    trained = record.device.get("precision")
    if used is None or trained == device.precision(used):
        return
    found = f"{source.name} was trained on its base in {trained}, but is used on it in {device.precision(used)}"
    if used.strict:
        raise PerlError(f"--strict: {found}", "load the base as in its training, or leave --strict out")
    measures = run.record.command in ("rl", "eval") and (Path(str(source.adapter)) / PROOF).exists()
    if not measures:  # else the shift is told when the reward is loaded
        run.note(f"{found}: what it gives shifts a little.")


def check_fingerprint(source: Source) -> None:
    """Raise PerlError where an adapter's base isn't what its record knows; a hub's is known once it is loaded."""
    record = find_record(source.adapter)
    known, found = record.model.get("fingerprint") if record else None, weights.fingerprint(source.base)
    if known and found and known != found:
        raise PerlError(
            f"{source.name} was trained on other weights ({known}) than those of {source.base} ({found})",
            f"put its base back, or correct base_model_name_or_path in {source.adapter}/{weights.ADAPTER_CONFIG}",
        )


def trained_in(source: Source, *, trust_remote_code: bool = False) -> settings.ModelSettings | None:
    """How a run held the base of the adapter or classifier that it left, by its record; None without one.

    The precision is that of the machine it ran on, where `auto` can have been something else than it is here.
    """
    record = find_record(source.adapter or source.base)
    if record is None:
        return None
    precision, dtype = record.device["precision"], record.settings.get("dtype", "auto")
    four, eight = precision == "4-bit", precision == "8-bit"
    if not (four or eight):
        dtype = precision
    elif dtype == "auto":
        dtype = "bfloat16"
    return settings.ModelSettings(
        dtype=dtype, load_in_4bit=four, load_in_8bit=eight, trust_remote_code=trust_remote_code
    )
