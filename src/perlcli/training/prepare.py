"""What every stage does before it loads weights: find the model, resolve the settings, check them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from peft import PeftConfig
from transformers import PreTrainedTokenizerBase

from perlcli import coffee, data, device, recipes, settings, upstream
from perlcli.data import Renderer, loading
from perlcli.errors import PerlError
from perlcli.memory import prediction
from perlcli.model import checks, context, quantised, sources, tokenizers
from perlcli.model.sources import Source
from perlcli.run import disk, output_folder
from perlcli.run.lifecycle import Run
from perlcli.training import checkpointing, origin, rendering

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
    """A stage's settings, resolved and checked against model, machine and folder. Raises PerlError for a fault."""
    upstream.hush_bars()
    source = locate(given)
    if source.is_embedded:
        device.spare_threads()
    else:
        loading.check_given(given.data.data, source.name)
    is_example = source.is_embedded and data.is_embedded(given.data.data) and given.recipe.recipe is None
    preset = coffee.SETTINGS[settings.command_of(given)] if is_example else {}
    trust, is_full = given.model.trust_remote_code, not isinstance(given, settings.Eval) and given.lora.full
    own = origin.adapter_settings(given, source), quantised.proposed(source)
    presets = (*own, _of_eval(given, source), preset, context.proposed(source, trust_remote_code=trust))
    quantised.check(source, given.model, full=is_full)
    resolved: Given = settings.resolve(given, *presets)
    settings.check(resolved)
    device.check(resolved.model)
    is_scored = source.is_classifier or isinstance(resolved, settings.Reward)
    found = checks.check(source, resolved.model, longest=resolved.data.max_length, full=is_full, scored=is_scored)
    output_folder.check_output(resolved)
    origin.keep_apart(resolved, source)
    adapter = origin.adapter_of(resolved, source)
    tokenizer = tokenizers.load_tokenizer(source, trust_remote_code=trust)
    tokenizers.use_template(tokenizer, resolved.data.chat_template)
    origin.check_tokenizer(source, tokenizer)
    run = Run(resolved)
    run.note_device(resolved.model, takes_dtype=not is_full)
    resolved = checkpointing.decided(resolved, run)
    style = rendering.resumed(rendering.style_of(resolved.data, source, tokenizer), run)
    loss_on = resolved.loss.loss_on if isinstance(resolved, settings.Sft) else None
    run.record.model = tokenizers.describe(source, tokenizer) | {rendering.RENDERING: rendering.summary(style, loss_on)}
    origin.check_adapter(source, run, resolved.model)
    origin.keep_file(resolved, run)
    if given.model.model is None:
        run.note("No --model: using the embedded coffee base, a toy with 0.9 M parameters.")
    for note in found:
        run.note(note)
    note_held(resolved, source, run)
    if unread := rendering.unread(style.options, tokenizer):
        run.note(f"{rendering.KWARGS}: the chat template does not read {', '.join(unread)}.")
    renderer = tokenizers.renderer(source, tokenizer, style)
    if not resolved.run.dry_run:  # a dry run writes nothing
        renderer.cache = tokenizers.token_cache(tokenizer)
        closed = disk.why_closed(renderer.cache.folder) if renderer.cache is not None else None
        if closed:
            run.note(f"Tokens are not cached for the next run: {closed} (HF_HOME sets another folder).")
    return Prepared(resolved, source, tokenizer, renderer, run, adapter)


def note_held(resolved: settings.Training | settings.Eval, source: Source, run: Run) -> None:
    """Note and record how much of a quantised base is in 4 or 8 bits: of a mixture of experts it can be little."""
    bits, dtype = 4 if resolved.model.load_in_4bit else 8, device.dtype_name(resolved.model)
    if not (resolved.model.load_in_4bit or resolved.model.load_in_8bit):
        return
    trust, is_scored = resolved.model.trust_remote_code, source.is_classifier or isinstance(resolved, settings.Reward)
    shape = prediction.shape_of(source.config, source.base_name, trust_remote_code=trust)
    inside, rest = prediction.held(shape, bits, dtype, head=not is_scored)
    run.record.model["held_bytes"] = {f"{bits}-bit": inside, dtype: rest}
    run.note(prediction.held_line(shape, bits, dtype, head=not is_scored))


def locate(given: settings.Training | settings.Eval) -> Source:
    """The source of `--model`. Raises PerlError if it can't be found, or if a stage of the recipe must run first."""
    recipe, name = given.recipe.recipe, given.model.model
    if recipe is not None:
        recipes.check_made(recipe, "--model", name)
    source = sources.locate(name, trust_remote_code=given.model.trust_remote_code)
    if recipe is not None and isinstance(given, settings.Rl | settings.Eval) and not source.is_classifier:
        for reward in given.sampling.reward:
            recipes.check_made(recipe, "--reward", reward)
    return source


def _of_eval(given: settings.Training | settings.Eval, source: Source) -> dict[str, object]:
    """What an evaluation takes from the run that it measures."""
    if not isinstance(given, settings.Eval):
        return {}
    return {"output": output_folder.of_eval(given.model.model)} | origin.sampling_settings(given, source)


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
