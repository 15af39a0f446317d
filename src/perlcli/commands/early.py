"""What can be refused before the libraries load, which takes seconds: plain mistakes in a command line. Each check is a
function that the command itself calls, too; none of them imports torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from perlcli import coffee, data, device, recipes, settings
from perlcli.data import loading, sources
from perlcli.errors import PerlError
from perlcli.model import places, weights
from perlcli.model.weights import ADAPTER_CONFIG
from perlcli.run import output_folder
from perlcli.run.files import RECORD
from perlcli.run.record import find_record, read_record
from perlcli.terminal import say
from perlcli.training import reward_names, trackers

PARTS = {"model": "rl", "adapter": "rl", "reward": "reward"}  # the run of a quickstart that is meant, by the option
Values = dict[str, Any]
Given = TypeVar("Given", bound=settings.Settings)


def check(given: Given) -> Given:
    """The settings of a command line, with runs of a quickstart in place of its folder. Raises PerlError for what is
    wrong whatever the files contain."""
    given = with_runs(given)
    values = settings.flat(given)
    if isinstance(given, settings.Sft | settings.Reward | settings.Rl | settings.Eval):
        _check_stage(given, values)
    elif isinstance(given, settings.Merge):
        adapter = adapter_name(given)
        place = _place(adapter, "The adapter")
        if place is not None and not place.is_adapter:
            raise nothing_to_merge(adapter)
        output = given.run.output or merged_folder(adapter)
        if place is not None:
            check_apart(output, base=place.base or adapter, adapter=place.where)
        _check_folder(given, {"output": output})
    elif isinstance(given, settings.CompareFull):
        _check_compared(given, values)
    elif isinstance(given, settings.Quickstart):
        _check_folder(given, {})
    elif isinstance(given, settings.OfData):
        _check_source(file_name(given))
    if isinstance(given, settings.Estimate | settings.DataCheck | settings.DataShow):
        _place(values["model"], "--model")
    return given


# Stages


def _check_stage(given: settings.Training | settings.Eval, values: Values) -> None:
    model, recipe = values["model"], values["recipe"]
    if recipe is not None:
        recipes.check_made(recipe, "--model", model)
    place = _place(model, "--model")
    if place is not None and place.base and not places.is_embedded(place.base):
        loading.check_given(values["data"], str(model))
    is_example = (
        recipe is None and data.is_embedded(values["data"]) and (place is None or places.is_embedded(place.base))
    )
    command = settings.command_of(given)
    proposed: Values = {"output": output_folder.of_eval(model)} if command == "eval" else {}
    resolved = settings.resolve(given, proposed, coffee.SETTINGS[command] if is_example else {})
    settings.check(resolved)
    device.check_installed(resolved.model)
    if not isinstance(resolved, settings.Eval):
        trackers.check(resolved.keep.report_to)
    if isinstance(given, settings.Rl):
        reward_names.check_given(given.sampling.reward)
    output_folder.check_early(resolved)
    rewards = () if place is not None and place.is_classifier else values.get("reward", ())  # it needs none
    for reward in rewards:
        _check_reward(reward, recipe)
    use = "rl" if command == "eval" else command
    if command != "eval":  # whose data is for a policy or a reward model, by what --model is
        loading.check_start(values["data"], use, "train", given.data)
    elif values["data"] is not None:
        _check_source(values["data"])
    held_out = values.get("eval_data")
    if held_out is not None and held_out != sources.STDIN:
        loading.check_start(held_out, use, "test", replace(given.data, split=None, subset=None))


def _check_reward(name: str, recipe: str | None) -> None:
    if reward_names.is_url(name):
        return
    if reward_names.names_function(name):
        reward_names.check_file(name)
        return
    if recipe is not None:
        recipes.check_made(recipe, "--reward", name)
    _place(name, "--reward")


def _place(name: str | None, option: str) -> places.Place | None:
    """Where a name leads; None for the embedded base, and for a Hub repository that is in the cache."""
    if name is None:
        return None
    is_folder = Path(name).expanduser().exists()
    return None if not is_folder and places.is_cached(name) else places.find(name, option)


def _check_folder(given: settings.Merge | settings.Quickstart, proposed: Values) -> None:
    resolved = settings.resolve(given, proposed)
    settings.check(resolved)
    output_folder.check_early(resolved)


# Other commands


def _check_compared(given: settings.CompareFull, values: Values) -> None:
    from perlcli.comparison import jobs

    jobs.stages(given)
    trackers.check(given.keep.report_to)
    for model in filter(None, map(str.strip, (values["model"] or "").split(","))):
        _place(model, "--model")
    if values["recipe"] is None:
        for source in filter(None, (values["data"], values["eval_data"])):
            _check_source(source)
    if not given.compare.estimate:
        folder = values["output"] or f"runs/compare-{given.compare.stage}"
        output_folder.check_early(replace(given, run=replace(given.run, output=folder)))


def file_name(given: settings.OfData) -> str:
    """The FILE argument. Raises PerlError if it is missing."""
    if given.file.file is None:
        command = f"perl {settings.command_of(given)}"
        raise PerlError("FILE is missing", f"{command} FILE, or {command} {data.COFFEE} for the embedded data")
    return given.file.file


def _check_source(name: str) -> None:
    if name != sources.STDIN and not data.is_embedded(name):
        sources.check_there(name)


def adapter_name(given: settings.Merge) -> str:
    """The ADAPTER argument. Raises PerlError if it is missing, for a value model, and for a run's folder without an
    adapter: it says what that has instead."""
    name = given.merge.adapter
    if not name:
        raise PerlError("ADAPTER is missing: nothing to merge", "perl merge FOLDER, of a run or of an adapter")
    folder = Path(name).expanduser()
    if (folder / weights.VALUE_HEAD).exists():
        raise PerlError(f"{name} is the value model of a run, not a policy", f"name the run: {folder.parent}")
    if not (folder / RECORD).exists() or (folder / ADAPTER_CONFIG).exists():
        return name
    record = read_record(folder)
    if record.command == "merge":
        raise PerlError(f"{name} is already merged: it is an ordinary model", "use it as it is")
    if record.settings.get("full"):
        raise PerlError(f"{name} was trained with --full: it is already an ordinary model", "use it as it is")
    problem = f"{name} is a run of `perl {record.command}` ({record.status}) and contains no adapter"
    raise PerlError(problem, "name a run of perl sft, reward or rl")


def nothing_to_merge(name: str) -> PerlError:
    """The error for a model where an adapter is needed."""
    hint = "name the folder of a run, or of a LoRA adapter"
    return PerlError(f"{name} is a model, not an adapter: there is nothing to merge", hint)


def check_apart(output: str, *, base: str, adapter: str) -> None:
    """Raises PerlError if the output would touch what is merged. A Hub id counts as a folder of that name: once such a
    folder exists, it would be taken for the base."""
    out = Path(output).expanduser().resolve()
    for what, place in (("base", base), ("adapter", adapter)):
        folder = Path(place).expanduser().resolve()
        overlaps = out.is_relative_to(folder) or folder.is_relative_to(out)
        if out == folder or (overlaps and folder.is_dir()):
            problem = f"--output {output} overlaps the {what} {place}: a merge never overwrites what it reads"
            raise PerlError(problem, "choose another folder")


def merged_folder(name: str) -> str:
    """Where the merged model goes by default: next to a local adapter, otherwise into `runs`."""
    place = Path(name).expanduser()
    if not place.is_dir():
        return str(Path("runs") / f"{place.name}-merged")
    place = place if place.name not in ("", "..") else place.resolve()
    return str(place.with_name(f"{place.name}-merged"))


# A quickstart


def with_runs(given: Given) -> Given:
    """The settings with the runs of a quickstart in place of its folder: its policy for --model and ADAPTER, its reward
    model for --reward, and all of its runs for `perl report`. A line says which."""
    values = settings.flat(given)
    chosen: Values = {}
    for name, part in PARTS.items():
        value = values.get(name)
        if isinstance(value, tuple):
            chosen[name] = tuple(_run_of(item, part) for item in value)
        elif value is not None:
            chosen[name] = _run_of(value, part)
    if isinstance(given, settings.Report):
        chosen["run"] = tuple(run for folder in given.runs.run for run in _runs_of(folder))
    changed = {name: value for name, value in chosen.items() if value != values[name]}
    return settings.build(type(given), values | changed) if changed else given


def _run_of(name: str, part: str) -> str:
    """A run in the folder of a quickstart; any other name as it is. Raises PerlError if it has no such run yet."""
    if not _is_quickstart(name):
        return name
    run = Path(name).expanduser() / part
    if not (run / ADAPTER_CONFIG).exists():
        raise PerlError(
            f"{name} is a quickstart that has no {part} run yet", f"perl quickstart --output {name} --resume"
        )
    what = {"rl": "the policy of its RL run", "reward": "its reward model"}[part]
    say(f"{name} is a quickstart: using {what}, {run}.")
    return str(run)


def _runs_of(folder: str) -> list[str]:
    """The runs in the folder of a quickstart, in the order that they ran; any other folder as it is."""
    if not _is_quickstart(folder):
        return [folder]
    paths = [path.parent for path in Path(folder).expanduser().glob(f"*/{RECORD}")]
    runs = [str(path) for path in sorted(paths, key=lambda path: read_record(path).started)]
    if not runs:
        raise PerlError(f"{folder} is a quickstart without runs yet", f"perl quickstart --output {folder} --resume")
    say(f"{folder} is a quickstart: reporting its runs {', '.join(Path(run).name for run in runs)}.")
    return runs


def _is_quickstart(name: str) -> bool:
    try:
        record = find_record(name)
    except (PerlError, OSError):  # damaged: the command says so where it reads it
        return False
    return record is not None and record.command == "quickstart"
