"""What the arms of a comparison will take, as `perl estimate` predicts it from the model's config."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace

from perlcli import settings
from perlcli.comparison.jobs import Planned
from perlcli.errors import PerlError
from perlcli.memory import plans
from perlcli.memory.prediction import device_bytes


def text(planned: Mapping[str, Sequence[Planned]], gpu: str | None) -> str:
    """A table for each stage and model: which arms fit, and with which batch, on a GPU of this size or on this one.
    Raises PerlError for a model whose memory can't be predicted."""
    limit = plans.parse_gpu(gpu) if gpu else device_bytes()
    on_gpu = True if gpu else None
    parts = []
    for stage, of_stage in planned.items():
        for model in dict.fromkeys(each.model for each in of_stage):
            rows = [row(stage, each, limit, on_gpu=on_gpu) for each in of_stage if each.model == model]
            head = f"{stage}, {model}" if model else stage
            parts.append(f"{head}\n{plans.table(rows, limit)}")
    return "\n\n".join(parts)


def row(stage: str, planned: Planned, limit: int | None = None, *, on_gpu: bool | None = None) -> plans.Row:
    """The prediction for one arm; `on_gpu` is None for the machine that this runs on. Raises PerlError."""
    model = _model(planned.model, bool(planned.values.get("trust_remote_code")))
    given = settings.resolve(settings.build(settings.COMMANDS[stage], planned.values), {})
    return replace(model.row(given, limit, on_gpu=on_gpu), name=planned.arm.name)


def peak_mb(stage: str, planned: Planned, longest: int | None) -> float | None:
    """The predicted peak of an arm in MB if its longest row has `longest` tokens; None if it can't be predicted."""
    if longest is not None:
        length = min(longest, planned.values.get("max_length") or longest)
        planned = replace(planned, values={**planned.values, "max_length": length})
    try:
        return row(stage, planned).peak / 1e6
    except PerlError:
        return None


@functools.cache
def _model(name: str | None, trust_remote_code: bool) -> plans.Model:
    """A model by its name, read once."""
    return plans.Model(name, trust_remote_code=trust_remote_code)
