"""Checks an adapter against the record of the run that trained it: base, tokenizer, precision."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from perlcli import device, settings
from perlcli.errors import PerlError
from perlcli.model import tokenizers, weights
from perlcli.model.sources import Source
from perlcli.run.files import PROOF
from perlcli.run.lifecycle import Run
from perlcli.run.output_folder import is_inside


def keep_apart(resolved: settings.Training | settings.Eval, source: Source) -> None:
    """Raises PerlError if --overwrite would delete an adapter that the run reads, or its base."""
    folder = Path(str(resolved.run.output)).expanduser()
    for place in (source.base, source.adapter):
        if resolved.run.overwrite and place and is_inside(place, folder):
            raise PerlError(f"--overwrite would delete {place}, which this run reads", "choose another --output")


def check_tokenizer(source: Source, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises PerlError if an adapter's tokenizer or chat template was changed since its run."""
    if source.adapter is None or source.record is None:
        return
    known, now = source.record.model.get("tokenizer"), tokenizers.tokenizer_fingerprint(tokenizer)
    if known and known != now:
        raise PerlError(
            f"{source.name} was trained with another tokenizer or chat template ({known}) than it has now ({now})",
            "put the tokenizer files of its run back into its folder",
        )


def check_adapter(source: Source, run: Run, used: settings.ModelSettings | None) -> None:
    """Compare the base that an adapter is put on with the adapter's own record: its weights and its precision.

    `used` is how the base is loaded; None means as the adapter was trained. Another precision is only a note, except
    with --strict: how far a reward shifts is measured when it is loaded.

    Raises PerlError for other weights, and with --strict for another precision.
    """
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
    """Raises PerlError if an adapter's base has other weights than its record says. A Hub base can only be checked once
    it is downloaded."""
    if source.adapter is None or source.record is None:
        return
    known, now = source.record.model.get("fingerprint"), source.fingerprint
    if known and now and known != now:
        raise PerlError(
            f"{source.name} was trained on other weights ({known}) than those of {source.base} ({now})",
            f"put its base back, or correct base_model_name_or_path in {source.adapter}/{weights.ADAPTER_CONFIG}",
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
