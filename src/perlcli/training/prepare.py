"""What every stage does before it loads weights: find the model, resolve the settings, check them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from perlcli import coffee, data, device, recipes, settings, upstream
from perlcli.data import Renderer
from perlcli.errors import PerlError
from perlcli.model import sources, tokenizers, weights
from perlcli.model.sources import Source
from perlcli.run import disk
from perlcli.run.files import RECORD
from perlcli.run.lifecycle import Run
from perlcli.run.output_folder import check_output
from perlcli.training.origin import check_adapter, check_tokenizer, keep_apart
from perlcli.training.starting_adapter import adapter_of, adapter_settings, keep_file


@dataclass(frozen=True)
class Prepared:
    """A run that passed every cheap check, with what was found on the way."""

    settings: Any
    source: Source
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    run: Run
    adapter: Any = None  # peft's config of the adapter that trains or is measured; None for none

    @property
    def is_dry(self) -> bool:
        """Whether the run ends before it loads weights."""
        return bool(self.settings.run.dry_run)


def prepare(given: Any) -> Prepared:
    """Resolve and check a stage's settings against the model, the machine and the output folder. Raises PerlError."""
    upstream.hush_bars()
    command = settings.command_of(given)
    recipe = given.recipe.recipe
    source = locate(given)
    if given.data.data is None and not source.is_embedded:
        raise PerlError(
            f"--data is missing for the model {source.name}",
            f"--data FILE, or --data {data.COFFEE} for the embedded data",
        )
    is_default = source.is_embedded and data.is_embedded(given.data.data) and recipe is None
    preset = coffee.SETTINGS[command] if is_default else {}
    if source.is_embedded:
        device.spare_threads()
    proposed = {"output": _eval_folder(source)} if command == "eval" else {}
    resolved = settings.resolve(given, adapter_settings(given, source), proposed, preset)
    settings.check(resolved)
    device.check(resolved.model)
    check_output(resolved)
    keep_apart(resolved, source)
    adapter = adapter_of(resolved, source)
    tokenizer = tokenizers.load_tokenizer(source, trust_remote_code=given.model.trust_remote_code)
    check_tokenizer(source, tokenizer)
    run = Run(resolved)
    run.record.device = device.describe(resolved.model)
    run.record.model = tokenizers.describe(source, tokenizer)
    check_adapter(source, run, resolved.model)
    keep_file(resolved, run)
    if given.model.model is None:
        run.note("No --model: taking the embedded coffee base, a toy of 0.9 M parameters.")
    renderer = tokenizers.renderer(source, tokenizer)
    if not resolved.run.dry_run:  # which writes nothing
        renderer.cache = cache = tokenizers.token_cache(tokenizer)
        _tell_cache(run, cache.folder if cache is not None else None)
    return Prepared(resolved, source, tokenizer, renderer, run, adapter)


def _tell_cache(run: Run, folder: Path | None) -> None:
    """Say where tokens can't be kept: the next run encodes its data again, and that is all."""
    if folder is not None and (closed := disk.why_closed(folder)):
        run.note(f"Tokens aren't kept for the next run: {closed} (HF_HOME names another place).")


def locate(given: Any) -> Source:
    """Find `--model`. Raises PerlError, also where it or a `--reward` is left by a stage of the recipe still to run."""
    recipe, name = given.recipe.recipe, given.model.model
    if recipe is not None:
        recipes.check_made(recipe, "--model", name)
    source = sources.locate(name, trust_remote_code=given.model.trust_remote_code)
    if recipe is not None and hasattr(given, "sampling") and not source.is_classifier:
        for reward in given.sampling.reward:
            recipes.check_made(recipe, "--reward", reward)
    return source


def _eval_folder(source: Source) -> str:
    """Where an evaluation goes by default: beside the run that it measures, else into `runs`."""
    place = Path(source.adapter or source.base)
    name = f"eval-{data.COFFEE if place.name == coffee.BASE.name else place.name}"
    is_run = (place / RECORD).exists()
    return str(Path(source.name).expanduser().parent / name if is_run else Path("runs") / name)


def loaded(prepared: Prepared) -> None:
    """Bring the record's fingerprints up to date: a hub's weights are there only once they were loaded."""
    model, source = prepared.run.record.model, prepared.source
    model["fingerprint"] = weights.fingerprint(source.base)
    if source.adapter:
        model["adapter_fingerprint"] = weights.fingerprint(source.adapter)


def require(prepared: Prepared, *, policy: bool) -> None:
    """Raise PerlError where `--model` is a reward model and a policy is needed, or the other way round."""
    source = prepared.source
    if policy and source.is_classifier:
        raise PerlError(f"--model {source.name} is a reward model, not a policy", "give a causal LM or its adapter")
    if not policy and source.adapter and not source.is_classifier:
        hint = f"train the reward on its base: --model {source.base}"
        raise PerlError(f"--model {source.name} is a policy's adapter", hint)
