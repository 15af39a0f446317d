"""What is known of a reward model before a policy learns from it: its verdict on held-out rows, by its own run or by an
evaluation next to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from perlcli import settings
from perlcli.errors import PerlError
from perlcli.model import weights
from perlcli.model.sources import Source
from perlcli.run import files, lineage
from perlcli.run.record import RunRecord
from perlcli.training import reward_metrics, reward_names
from perlcli.training.prepare import Prepared
from perlcli.training.rewards import Reward

MOST = 200  # folders next to a reward's that are searched for evaluations of it


def quote(prepared: Prepared[settings.Rl], rewards: Sequence[Reward]) -> None:
    """Note and record the held-out verdict of each reward model, with a warning where it is not known to be better than
    chance. Raises PerlError for that with --strict. Rewards from elsewhere get a note; functions need none."""
    run, is_strict = prepared.run, prepared.settings.model.strict
    for reward in rewards:
        if reward.source is None or reward.source.record is None:
            if reward.source is not None or reward_names.is_url(reward.name):
                run.note(f"The reward {reward.name} was not measured by perl.")
            continue
        found = measured(reward.source)
        known = "It was never measured on held-out rows." if found is None else said(found)
        answer = None if found is None else reward_metrics.better_than_chance(found.metrics)
        run.record.verdicts.append(f"The reward {reward.name}: {known}")
        if answer == "yes":
            run.note(run.record.verdicts[-1])
            continue
        problem = f"The reward {reward.name} was not shown to be better than chance"
        if is_strict:
            hint = f"measure it: perl eval --model {reward.name} --data HELD_OUT; or leave out --strict"
            raise PerlError(f"--strict: {problem[0].lower()}{problem[1:]}. {known}", hint)
        advice = f"measure it with perl eval --model {reward.name} --data HELD_OUT"
        run.note(f"Warning: {problem}, so the policy may learn nothing of use. {known} To be sure, {advice}.")


def said(record: RunRecord) -> str:
    """The verdict of a run that measured a reward model, with the data that it was measured on."""
    where = record.data.get("eval", {}).get("source")
    verdict = reward_metrics.verdict(record.metrics)
    return f"{verdict} Measured on {where}." if where else verdict


def measured(source: Source) -> RunRecord | None:
    """The run that measured a reward model on the most held-out rows: its own, or a `perl eval` of it whose folder is
    next to the model's; of a merged model, also those of the adapter. None if there is none."""
    found = [record for record in _records(source) if _counts(record)]
    return max(found, key=lambda record: record.metrics["rows"], default=None)


def _records(source: Source) -> Iterator[RunRecord]:
    mark = source.adapter_fingerprint if source.adapter else source.fingerprint
    yield from _of_place(source.place, mark)
    adapter, merged = source.record.model.get("adapter") if source.record else None, source.record
    if merged is not None and merged.command == files.MERGE and adapter and Path(adapter).is_dir():
        mark = weights.fingerprint(adapter)
        if mark == merged.model.get("adapter_fingerprint", mark):
            yield from _of_place(adapter, mark)


def _of_place(place: str, mark: str | None) -> Iterator[RunRecord]:
    """The record in a model's folder, and those of the finished evaluations of its weights next to it."""
    own = lineage.record_of(place)
    if own is not None and own.command == "reward":
        yield own
    for path in islice(sorted(Path(place).parent.glob(f"*/{files.RECORD}")), MOST):
        record = lineage.record_of(str(path.parent))
        if record is None or record.command != "eval" or record.status != "finished":
            continue
        name, digest = ("adapter", "adapter_fingerprint") if record.model.get("adapter") else ("base", "fingerprint")
        model = record.model.get(name)
        if model and Path(model).resolve() == Path(place).resolve() and record.model.get(digest) == mark:
            yield record


def _counts(record: RunRecord) -> bool:
    """Whether a run measured a reward model, mostly on prompts that it was not trained on."""
    rows = record.metrics.get("rows")
    overlap = record.data.get("eval", {}).get("overlap") or {}
    return bool(rows) and "accuracy" in record.metrics and 2 * overlap.get("count", 0) < rows
