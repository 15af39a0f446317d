"""What every stage does before it loads weights: find the model, resolve the settings, check them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from peft import PeftConfig
from transformers import PreTrainedTokenizerBase

from perlcli import coffee, data, device, recipes, settings, upstream
from perlcli.data import Renderer
from perlcli.errors import PerlError
from perlcli.model import sources, tokenizers
from perlcli.model.sources import Source
from perlcli.run import disk
from perlcli.run.lifecycle import Run
from perlcli.run.output_folder import check_output
from perlcli.training.origin import check_adapter, check_tokenizer, keep_apart
from perlcli.training.starting_adapter import adapter_of, adapter_settings, keep_file

S_co = TypeVar("S_co", bound=settings.Training | settings.Eval | settings.Merge, covariant=True)
Given = TypeVar("Given", bound=settings.Training | settings.Eval)
T = TypeVar("T")


@dataclass(frozen=True)
class Prepared(Generic[S_co]):
    """A run that passed every cheap check, with what was found on the way."""

    settings: S_co
    source: Source
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    run: Run
    adapter: PeftConfig | None = None  # of the adapter that trains or is measured

    @property
    def is_dry(self) -> bool:
        """Whether the run ends before it loads weights."""
        return self.settings.run.dry_run


def filled(value: T | None) -> T:
    """The value of an option that is unset until `prepare` fills it in."""
    assert value is not None
    return value


def prepare(given: Given) -> Prepared[Given]:
    """Resolve a stage's settings and check them against the model, the machine and the output folder. Raises PerlError
    for the first check that fails."""
    upstream.hush_bars()
    source = locate(given)
    if given.data.data is None and not source.is_embedded:
        hint = f"--data FILE, or --data {data.COFFEE} for the embedded data"
        raise PerlError(f"--data is missing for the model {source.name}", hint)
    if source.is_embedded:
        device.spare_threads()
    proposed = {"output": _eval_folder(source)} if isinstance(given, settings.Eval) else {}
    resolved: Given = settings.resolve(given, adapter_settings(given, source), proposed, _preset(given, source))
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
        run.note("No --model: using the embedded coffee base, a toy with 0.9 M parameters.")
    renderer = tokenizers.renderer(source, tokenizer)
    if not resolved.run.dry_run:  # a dry run writes nothing
        _cache_tokens(renderer, tokenizer, run)
    return Prepared(resolved, source, tokenizer, renderer, run, adapter)


def locate(given: settings.Training | settings.Eval) -> Source:
    """The source of `--model`. Raises PerlError if it can't be found, or if a stage of the recipe that makes it, or a
    `--reward`, must run first."""
    recipe, name = given.recipe.recipe, given.model.model
    if recipe is not None:
        recipes.check_made(recipe, "--model", name)
    source = sources.locate(name, trust_remote_code=given.model.trust_remote_code)
    if recipe is not None and isinstance(given, settings.Rl | settings.Eval) and not source.is_classifier:
        for reward in given.sampling.reward:
            recipes.check_made(recipe, "--reward", reward)
    return source


def _preset(given: settings.Training | settings.Eval, source: Source) -> Mapping[str, object]:
    """The values of the coffee example if nothing but the embedded base, data and settings is named."""
    is_example = source.is_embedded and data.is_embedded(given.data.data) and given.recipe.recipe is None
    return coffee.SETTINGS[settings.command_of(given)] if is_example else {}


def _eval_folder(source: Source) -> str:
    """The default folder of an evaluation: next to the run that it measures, otherwise in `runs`."""
    place = Path(source.place)
    name = f"eval-{data.COFFEE if place.name == coffee.BASE.name else place.name}"
    if source.record is None:
        return str(Path("runs") / name)
    return str(Path(source.name).expanduser().parent / name)


def _cache_tokens(renderer: Renderer, tokenizer: PreTrainedTokenizerBase, run: Run) -> None:
    """Keep tokens between runs; if the cache can't be written, say so: the next run encodes its data again."""
    renderer.cache = tokenizers.token_cache(tokenizer)
    closed = disk.why_closed(renderer.cache.folder) if renderer.cache is not None else None
    if closed:
        run.note(f"Tokens are not cached for the next run: {closed} (HF_HOME sets another folder).")


def loaded(prepared: Prepared[settings.Training | settings.Eval | settings.Merge]) -> None:
    """Update the record's fingerprints: a Hub model's weights are only there once they are downloaded."""
    model, source = prepared.run.record.model, prepared.source
    model["fingerprint"] = source.fingerprint
    model["adapter_fingerprint"] = source.adapter_fingerprint


def require(prepared: Prepared[settings.Training], *, policy: bool) -> None:
    """Raises PerlError if `--model` is a reward model but the stage needs a policy, or the other way round."""
    source = prepared.source
    if policy and source.is_classifier:
        raise PerlError(f"--model {source.name} is a reward model, not a policy", "name a causal LM or its adapter")
    if not policy and source.adapter and not source.is_classifier:
        hint = f"train the reward on its base: --model {source.base}"
        raise PerlError(f"--model {source.name} is a policy's adapter", hint)
