"""Before a comparison starts: what is refused, and what its arms will take as `perl estimate` predicts it."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from typing import Any

from perlcli import device, settings
from perlcli.comparison.jobs import Planned, Values, is_adapter
from perlcli.data import COFFEE
from perlcli.errors import PerlError
from perlcli.memory.plans import Model, Row, parse_gpu, table
from perlcli.memory.prediction import device_bytes, predict, settled, takes
from perlcli.model import sources

CHECKPOINTING, AUTO = "gradient_checkpointing", "auto"
STAND_IN = "perlcli.coffee:reward"  # for a reward model that an earlier stage has yet to train

Plans = Mapping[str, Sequence[Planned]]


def check(given: settings.CompareFull, plans: Plans) -> None:
    """Raises PerlError if the comparison's options or those of any run have values that can't be."""
    faults = list(_own_faults(given))
    if faults:
        raise PerlError("\n".join(faults), "perl compare-full --help lists the options")
    _for_each_arm(plans, _check_settings)


def _own_faults(given: settings.CompareFull) -> Iterator[str]:
    if given.compare.gpu is not None and not given.compare.estimate:
        yield "--gpu only applies with --estimate; a run takes the GPU of this machine"
    if "-" in (given.data.data, given.held_out.eval_data):
        yield "Standard input can only be read once, but every run reads the data: give a file"
    yield from settings.limit_faults(settings.options(type(given)), settings.flat(given))


def _check_settings(stage: str, planned: Planned) -> None:
    resolved = settings.resolve(settings.build(settings.COMMANDS[stage], planned.values), {})
    settings.check(resolved)
    device.check(resolved.model)


def dry_run(plans: Plans, output: str, commands: Mapping[str, Callable[[Any], object]]) -> None:
    """Dry-run every arm with its stage's command (`commands`, by stage); raises PerlError with all that is refused."""
    is_chained = len(plans) > 1

    def attempt(stage: str, planned: Planned) -> None:
        steering = {"output": f"{output}/{stage}/{planned.folder}", "dry_run": True, "overwrite": True}
        values = _startable(stage, planned, is_chained=is_chained)
        with redirect_stdout(io.StringIO()):
            commands[stage](settings.build(settings.COMMANDS[stage], {**values, **steering}))

    _for_each_arm(plans, attempt)


def _startable(stage: str, planned: Planned, *, is_chained: bool) -> Values:
    """The settings of an arm's run, with a stand-in for each input that the comparison itself will make: by earlier
    stages if `is_chained`; for full tuning, an adapter's base instead of the merged model."""
    values = dict(planned.values)
    if is_chained and stage != "sft":
        values.setdefault("data", COFFEE)
    if is_chained and stage == "rl":
        values["reward"] = (STAND_IN,)
    if stage == "rl" and planned.arm.is_full and is_adapter(planned.model):
        trust = bool(values.get("trust_remote_code"))
        values["model"] = sources.locate(planned.model, trust_remote_code=trust).base
    return values


def _for_each_arm(plans: Plans, attempt: Callable[[str, Planned], None]) -> None:
    """Call `attempt` with each stage and arm; raises one PerlError with every problem and the arms that have it."""
    arms_by_problem: dict[tuple[str, str], list[str]] = {}
    hints: list[str] = []
    for stage, of_stage in plans.items():
        has_models = len({planned.model for planned in of_stage}) > 1
        for planned in of_stage:
            try:
                attempt(stage, planned)
            except PerlError as error:
                name = f"{planned.model} {planned.arm.name}" if has_models else planned.arm.name
                arms_by_problem.setdefault((stage, error.problem), []).append(name)
                hints.append(error.hint)
    if arms_by_problem:
        lines = [
            f"{stage}, {', '.join(names)}: {line}"
            for (stage, problem), names in arms_by_problem.items()
            for line in problem.splitlines()
        ]
        raise PerlError("\n".join(lines), hints[0])


def predicted(planned: Plans, gpu: str | None) -> str:
    """A table for each stage and model: which arms fit, and with which batch, on a GPU of this size or on this one.
    Raises PerlError for a model whose memory can't be predicted."""
    limit = parse_gpu(gpu) if gpu else device_bytes()
    on_gpu = True if gpu else None  # None: as on this machine
    parts = []
    for stage, of_stage in planned.items():
        for model in dict.fromkeys(each.model for each in of_stage):
            rows = [_row(stage, each, limit, on_gpu=on_gpu) for each in of_stage if each.model == model]
            head = f"{stage}, {model}" if model else stage
            parts.append(f"{head}\n{table(rows, limit)}")
    return "\n\n".join(parts)


def _row(stage: str, planned: Planned, limit: int | None = None, *, on_gpu: bool | None = None) -> Row:
    model = _model(planned.model, bool(planned.values.get("trust_remote_code")))
    given = settings.resolve(settings.build(settings.COMMANDS[stage], planned.values), {})
    return replace(model.row(given, limit, on_gpu=on_gpu), name=planned.arm.name)


def same_checkpointing(plans: dict[str, list[Planned]]) -> dict[str, list[Planned]]:
    """The plans with `--gradient-checkpointing auto` decided alike for all arms of a stage on a model, whose memory and
    speed are compared: on if an arm needs it to fit on this machine's GPU. Without a GPU they stay as they are."""
    limit = device_bytes()
    if limit is None:
        return plans
    decided: dict[str, list[Planned]] = {}
    for stage, of_stage in plans.items():
        needed = {each.model: False for each in of_stage}
        for each in of_stage:
            needed[each.model] |= _needs_checkpointing(stage, each, limit, is_chained=len(plans) > 1)
        decided[stage] = [
            replace(each, values=each.values | {CHECKPOINTING: "true" if needed[each.model] else "false"})
            if each.values.get(CHECKPOINTING, AUTO) == AUTO
            else each
            for each in of_stage
        ]
    return decided


def _needs_checkpointing(stage: str, planned: Planned, limit: int, *, is_chained: bool) -> bool:
    """Whether an arm fits only with gradient checkpointing, or can't be predicted; not if it doesn't fit either way."""
    values = _startable(stage, planned, is_chained=is_chained)
    try:
        model = _model(planned.model, bool(values.get("trust_remote_code")))
        given = settings.resolve(settings.build(settings.COMMANDS[stage], values), {})
        plan = settled(model.shape, model.plan(given, planned.arm, on_gpu=True), limit)
        return bool(plan.checkpointing) and takes(predict(model.shape, plan), plan) <= limit
    except PerlError:
        return True


def training_mb(stage: str, planned: Planned, longest: int | None, *, checkpointing: bool | None) -> float | None:
    """What the arm's `training_mb` is predicted to be if its longest row has `longest` tokens; None if it can't be
    predicted. `checkpointing` is what its runs chose; None if none got so far."""
    if checkpointing is not None:
        chosen = "true" if checkpointing else "false"
        planned = replace(planned, values={**planned.values, CHECKPOINTING: chosen})
    if longest is not None:
        length = min(longest, planned.values.get("max_length") or longest)
        planned = replace(planned, values={**planned.values, "max_length": length})
    try:
        return _row(stage, planned).training / 1e6
    except PerlError:
        return None


@functools.cache
def _model(name: str | None, trust_remote_code: bool) -> Model:
    return Model(name, trust_remote_code=trust_remote_code)
