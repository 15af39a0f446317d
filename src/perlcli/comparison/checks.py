"""What is refused before a comparison starts: its own options, and what its stages would refuse."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any

from perlcli import device, settings
from perlcli.comparison.jobs import Planned, Values, is_adapter
from perlcli.data import COFFEE
from perlcli.errors import PerlError
from perlcli.model import sources

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
    """The settings of an arm's run, with a stand-in for each input that only the comparison itself will make.

    `is_chained` says that reward model and RL build on the stages before. Full tuning gets adapters merged: until then
    their base takes their place.
    """
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
