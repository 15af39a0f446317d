"""What the arms of a comparison will take, as `perl estimate` predicts it from the model's config alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from perlcli import settings
from perlcli.comparison.arms import Values, Way
from perlcli.errors import PerlError
from perlcli.memory import plans as estimate
from perlcli.memory.prediction import device_bytes

Plans = Mapping[str, Sequence[tuple[Way, Values]]]


def text(plans: Plans, gpu: str | None) -> str:
    """A table for each stage and model: which arms fit on a GPU of this size, or on the one at hand, and with which
    batch. Raises PerlError for a model whose memory can't be predicted."""
    limit = estimate.parse_gpu(gpu) if gpu else device_bytes()
    parts = []
    for stage, found in plans.items():
        for model in dict.fromkeys(way.model for way, _ in found):
            rows = [row(stage, way, values, limit, gpu=gpu is not None) for way, values in found if way.model == model]
            head = f"{stage}, {model}" if model else stage
            parts.append(f"{head}\n{estimate.table(rows, limit)}")
    return "\n\n".join(parts)


def row(stage: str, way: Way, values: Values, limit: int | None = None, *, gpu: bool = False) -> estimate.Row:
    """The prediction of one arm; `gpu` predicts for a GPU wherever this runs. Raises PerlError."""
    model = _model(way.model, trust_remote_code=bool(values.get("trust_remote_code")))
    given = settings.resolve(settings.build(settings.COMMANDS[stage], values), {})
    asked = model.asked(given)
    return replace(model.row(replace(asked, on_gpu=True) if gpu else asked, limit), name=way.name)


def peak_mb(stage: str, way: Way, values: Values, longest: int | None) -> float | None:
    """The predicted peak of an arm whose longest row has `longest` tokens, in MB; None where there is no prediction."""
    shorter = {} if longest is None else {"max_length": min(longest, values.get("max_length") or longest)}
    try:
        return row(stage, way, {**values, **shorter}).peak / 1e6
    except PerlError:
        return None


_MODELS: dict[tuple[str | None, bool], estimate.Model] = {}


def _model(name: str | None, *, trust_remote_code: bool) -> estimate.Model:
    """A model by its name, read once."""
    key = name, trust_remote_code
    if key not in _MODELS:
        _MODELS[key] = estimate.Model(name, trust_remote_code=trust_remote_code)
    return _MODELS[key]
