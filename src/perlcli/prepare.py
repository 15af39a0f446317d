"""What every stage does before it loads weights: find the model, fill in the settings, check them, look at the data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from perlcli import adapters, base, coffee, data, device, disk, projections, recipes, settings, upstream, weights
from perlcli.base import Source
from perlcli.data import Data, Renderer, checks
from perlcli.data.fitting import Tokens
from perlcli.data.sources import has_split
from perlcli.errors import PerlError
from perlcli.outputs import check_output, is_inside
from perlcli.private import hidden_in
from perlcli.record import PROMPTS, PROOF, RECORD, find_record
from perlcli.running import Run
from perlcli.terminal import say

LORA_FIELDS = {"lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "use_dora": "use_dora"}
TASKS = {"reward": "SEQ_CLS"}  # what peft is told that a stage trains; CAUSAL_LM where nothing stands here
PART = 1000  # rows that are lists of tokens at once


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
    preset = dict(coffee.SETTINGS[command]) if is_default else {}
    if source.is_embedded:
        device.spare_threads()
    if command == "eval":
        preset["output"] = _eval_folder(source)
    resolved = settings.resolve(given, {**preset, **_adapter_settings(given, source)})
    settings.check(resolved)
    device.check(resolved.model)
    check_output(resolved)
    keep_apart(resolved, source)
    adapter = _adapter(resolved, source)
    tokenizer = base.load_tokenizer(source, trust_remote_code=given.model.trust_remote_code)
    check_tokenizer(source, tokenizer)
    run = Run(resolved)
    run.record.device = device.describe(resolved.model)
    run.record.model = base.describe(source, tokenizer)
    check_adapter(source, run, resolved.model)
    _keep_file(resolved, run)
    if given.model.model is None:
        run.note("No --model: taking the embedded coffee base, a toy of 0.9 M parameters.")
    renderer = base.renderer(source, tokenizer)
    if not resolved.run.dry_run:  # which writes nothing
        renderer.cache = cache = base.token_cache(tokenizer)
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
    source = base.locate(name, trust_remote_code=given.model.trust_remote_code)
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


def keep_apart(resolved: Any, source: Source) -> None:
    """Raise PerlError where --overwrite would delete an adapter that the run reads, or the base below it."""
    folder = Path(str(resolved.run.output)).expanduser()
    for place in (source.base, source.adapter):
        if resolved.run.overwrite and place and is_inside(place, folder):
            raise PerlError(f"--overwrite would delete {place}, which this run reads", "name another --output")


def check_tokenizer(source: Source, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise PerlError where an adapter's folder has another tokenizer or chat template now than its run used."""
    record = find_record(source.adapter)
    known, found = record.model.get("tokenizer") if record else None, base.tokenizer_fingerprint(tokenizer)
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


def loaded(prepared: Prepared) -> None:
    """Bring the record's fingerprints up to date: a hub's weights are there only once they were loaded."""
    model, source = prepared.run.record.model, prepared.source
    model["fingerprint"] = weights.fingerprint(source.base)
    if source.adapter:
        model["adapter_fingerprint"] = weights.fingerprint(source.adapter)


def _adapter(resolved: Any, source: Source) -> Any:
    """The peft config of the adapter that a run starts from or makes; None for none.

    Raises PerlError where peft has none for this base, before a run's folder is made.
    """
    if not hasattr(resolved, "lora") or source.adapter_config is not None:
        config, what = source.adapter_config, f"The adapter {source.name}"
    else:
        config, what = None if resolved.lora.full else _new_adapter(resolved, source), "The adapter"
    if config is not None and hasattr(resolved, "lora"):
        adapters.check_precision(config, resolved.model, what)
    return config


def _new_adapter(resolved: Any, source: Source) -> Any:
    """The peft config of a new adapter, tried on the model's modules without their weights. Raises PerlError."""
    lora, task = resolved.lora, task_of(resolved)
    config = adapters.asked(lora, task)
    model = base.skeleton(source, trust_remote_code=resolved.model.trust_remote_code)
    if model is not None and lora.peft is not None:
        adapters.try_on(lora, model, task)
    elif model is not None:
        projections.target_modules(model, str(lora.lora_target_modules))
    return config


def task_of(resolved: Any) -> str:
    """What peft is told that a stage trains."""
    return TASKS.get(settings.command_of(resolved), "CAUSAL_LM")


def _keep_file(resolved: Any, run: Run) -> None:
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


def _adapter_settings(given: Any, source: Source) -> dict[str, Any]:
    """The settings of the adapter that a run starts from: they are the adapter's, not the user's, to set."""
    config = source.adapter_config
    if config is None or not hasattr(given, "lora"):
        return {}
    _check_start(given, source)
    if adapters.kind_of(config) != "LORA":
        return _asked_alike(given, source, dict.fromkeys(settings.LORA[:-1]))
    found = {name: getattr(config, field) for name, field in LORA_FIELDS.items()}
    modules = config.target_modules
    found["lora_target_modules"] = modules if isinstance(modules, str) else ",".join(sorted(modules))
    if settings.command_of(given) == "rl" and not given.lora.lora_dropout:
        found["lora_dropout"] = 0.0  # the adapter's was for the training before: it would part policy and anchor
    return _asked_alike(given, source, found)


def _check_start(given: Any, source: Source) -> None:
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


def _asked_alike(given: Any, source: Source, found: dict[str, Any]) -> dict[str, Any]:
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


def load_data(prepared: Prepared, use: str, split: str = "train", source: str | None = None) -> Data:
    """The rows of `--data`, or of another source, for a use."""
    options = prepared.settings.data
    name = options.data if source is None else source
    if split == "test" and hasattr(prepared.settings, "held_out"):  # --split is of the rows that train
        options = replace(options, split=None, subset=options.subset if name == options.data else None)
    found = data.load(name, use, split=split, chat=prepared.renderer.chat, options=options)
    if options.drop_duplicates:
        data.drop_repeats(found)
    return found


def load_sides(prepared: Prepared, use: str) -> tuple[Data, Data | None]:
    """The rows that train, and those that measure; None where there is nothing to measure on."""
    options, values = prepared.settings.data, prepared.settings.held_out
    train = load_data(prepared, use)
    if values.eval_fraction is not None:
        train, held_out = data.hold_out(train, values.eval_fraction)
        return train, first_rows(prepared, held_out, values.max_eval_samples, "--max-eval-samples")
    source = options.data
    if values.eval_data is None and not data.is_embedded(source) and not has_split(source, "test", options):
        if values.max_eval_samples is not None:
            prepared.run.note("--max-eval-samples does nothing: no rows are held out (--eval-data, --eval-fraction).")
        return train, None
    held_out = load_data(prepared, use, "test", values.eval_data)
    held_out.report.overlap = data.overlap(train, held_out)
    return train, first_rows(prepared, held_out, values.max_eval_samples, "--max-eval-samples")


def first_rows(prepared: Prepared, rows: Data, limit: int | None, option: str) -> Data:
    """The first rows, `limit` at most; says so where that leaves some out."""
    if limit is not None and len(rows.rows) > limit:
        prepared.run.note(f"Measuring on the first {limit:,} of {len(rows.rows):,} rows ({option}).")
        checks.restrict(rows, rows.rows[:limit], rows.numbers[:limit])
    return rows


def fit(prepared: Prepared, role: str, rows: Data, tokens: Tokens, longest: int | None = None) -> list[dict[str, Any]]:
    """The rows' columns within --max-length, or within `longest`; says what became of the rows, and records it."""
    return list(_fitted(prepared, role, rows, tokens, longest))


def dataset(prepared: Prepared, role: str, rows: Data, tokens: Tokens) -> Dataset:
    """The same as a table, which holds a token in 8 bytes where lists take 40."""
    columns = _fitted(prepared, role, rows, tokens)
    parts = []
    while part := list(islice(columns, PART)):
        parts.append(Dataset.from_list(part))
    return concatenate_datasets(parts)


def _fitted(
    prepared: Prepared, role: str, rows: Data, tokens: Tokens, longest: int | None = None
) -> Iterator[dict[str, Any]]:
    values = prepared.settings.data
    trained = data.prompts(rows) if role == "train" else None
    longest = longest or values.max_length
    yield from data.fitted(rows, longest, tokens, on_long=values.on_long, render=prepared.renderer)
    if trained is not None:
        prepared.run.prompts = trained.packed(rows.numbers, trained_on(prepared.source))
    report_data(prepared.run, role, rows)


def trained_on(source: Source) -> bytes:
    """Digests of the prompts that a model of ours has seen in training, its start's among them, as `Run` keeps them."""
    path = Path(source.adapter or source.base) / PROMPTS
    return path.read_bytes() if path.is_file() else b""


def report_data(run: Run, role: str, rows: Data) -> None:
    """Say what became of the rows, and keep it in the record."""
    run.record.data[role] = rows.report.summary()
    for line in rows.report.lines():
        run.note(f"{role}: {line}")


def require(prepared: Prepared, *, policy: bool) -> None:
    """Raise PerlError where `--model` is a reward model and a policy is needed, or the other way round."""
    source = prepared.source
    if policy and source.is_classifier:
        raise PerlError(f"--model {source.name} is a reward model, not a policy", "give a causal LM or its adapter")
    if not policy and source.adapter and not source.is_classifier:
        hint = f"train the reward on its base: --model {source.base}"
        raise PerlError(f"--model {source.name} is a policy's adapter", hint)


def preview(prepared: Prepared, config: Any = None) -> None:
    """Print what a run would do, for `--dry-run`."""
    found, values = prepared.source, prepared.settings
    if values.recipe.recipe is not None:
        say(f"recipe: {values.recipe.recipe}")
    say(f"model: {found.name} (base {found.base_name}, {device.precision(values.model)} on {device.kind()})")
    if hasattr(values, "lora"):
        say(_training_line(prepared))
    if config is not None:
        length = f"{config.max_steps} steps" if config.max_steps > 0 else f"{config.num_train_epochs:g} epoch(s)"
        schedule = getattr(config.lr_scheduler_type, "value", config.lr_scheduler_type)
        size = config.per_device_train_batch_size * config.gradient_accumulation_steps
        say(f"training: {length} of {size} rows, learning rate {config.learning_rate:g} ({schedule})")
    say(f"output: {values.run.output}\nDry run: nothing was loaded, trained or written.")


def _training_line(prepared: Prepared) -> str:
    lora, source = prepared.settings.lora, prepared.source
    model = base.skeleton(source, trust_remote_code=prepared.settings.model.trust_remote_code)
    if lora.full:
        count = f"{base_size(model):,} " if model is not None else ""
        return f"full tuning: all {count}parameters train"
    line = f"adapter: {adapters.words(prepared.adapter)}"
    if source.adapter or model is None:
        return line
    total, config = base_size(model), adapters.on_model(lora, model, task_of(prepared.settings))
    names = config.target_modules if isinstance(config.target_modules, str) else ", ".join(config.target_modules)
    trained = adapters.try_on(lora, model, task_of(prepared.settings))
    return f"{line} on {names}; {trained:,} parameters train, {total:,} stay frozen"


def base_size(model: Any) -> int:
    """The parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())
