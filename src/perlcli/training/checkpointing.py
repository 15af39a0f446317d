"""Decides `--gradient-checkpointing auto`: whether activations are kept, or computed again in the backward pass."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from perlcli import settings
from perlcli.errors import PerlError, line
from perlcli.memory import plans, prediction
from perlcli.run.lifecycle import Run
from perlcli.run.record import find_record
from perlcli.text import size

Given = TypeVar("Given", bound=settings.Training | settings.Eval)
FIELD = "gradient_checkpointing"


def decided(given: Given, run: Run) -> Given:
    """The settings with `auto` replaced by true or false: as before if the run resumes; false on a CPU, where memory is
    rarely short; on a GPU false if the run is predicted to fit without it. Notes the choice on a GPU."""
    if isinstance(given, settings.Eval) or given.train.gradient_checkpointing != "auto":
        return given
    free, before = prediction.free_bytes(), _before(given, run)
    if before is not None:
        is_on, why = before, "as before"
    elif free is None:
        is_on, why = False, ""
    else:
        is_on, why = _for(given, free)
    if free is not None:
        run.note(f"Gradient checkpointing is {'on' if is_on else 'off'}: {why}.")
    return replace(given, train=replace(given.train, gradient_checkpointing="true" if is_on else "false"))


def _before(given: settings.Training, run: Run) -> bool | None:
    """What the run that is resumed had; None for a new run, and for one that ended before it was known."""
    old = find_record(str(run.folder)) if given.keep.resume else None
    value = None if old is None else old.trl_settings.get(FIELD)
    return value if isinstance(value, bool) else None


def _for(given: settings.Training, free: int) -> tuple[bool, str]:
    """Whether a run on a GPU with so many free bytes needs it, and why."""
    try:
        model = plans.Model(given.model.model, trust_remote_code=given.model.trust_remote_code)
        if isinstance(given, settings.Rl) and not all(map(model.counts, given.sampling.reward)):
            return True, "a reward with a base of its own isn't predicted"
        plan = replace(model.plan(given, model.arm_of(given), on_gpu=True), checkpointing=False)
        needed = prediction.takes(prediction.predict(model.shape, plan), plan)
    except PerlError as error:
        return True, f"memory can't be predicted ({line(error)})"
    without = "without it, " if needed > free else ""
    return needed > free, f"{without}{size(needed)} predicted, {size(free)} free"
