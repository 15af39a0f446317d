"""What a run came from and what it used: the records of earlier runs, as far as their folders are still there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from perlcli.errors import PerlError
from perlcli.run.record import RunRecord, find_record

DEPTH = 8  # steps back that are followed, as a record may name its own folder
POLICIES = {"sft": "SFT", "rl": "RL"}  # the stages that make a policy, as people name it
OPPONENT = ("opponent: ", "anchor: ")  # how the note begins that says what a policy is compared with


def record_of(folder: object) -> RunRecord | None:
    """The record in a run's folder; None for anything else, a damaged record included."""
    try:
        return find_record(folder) if isinstance(folder, str) else None
    except PerlError:
        return None


def origin(record: RunRecord, depth: int = DEPTH) -> str:
    """The model that a run started from; if that came from full tuning, the model that was tuned, and so on."""
    base = str(record.model.get("base") or record.settings.get("model") or "")
    earlier = record_of(base)
    return base if earlier is None or not depth else origin(earlier, depth - 1)


def rewards(record: RunRecord) -> dict[str, RunRecord]:
    """The records of the reward models that a run used, by the names it gave them."""
    named = record.settings.get("reward") or ()
    found = {str(name): record_of(name) for name in (named if isinstance(named, list | tuple) else ())}
    return {name: reward for name, reward in found.items() if reward is not None}


def rewards_unsaid(record: RunRecord) -> dict[str, RunRecord]:
    """Those of the reward models of which no verdict of the run itself says how good they are."""
    said = [name for name in rewards(record) if any(line.startswith(f"The reward {name}:") for line in record.verdicts)]
    return {name: reward for name, reward in rewards(record).items() if name not in said}


def opponent(record: RunRecord) -> str:
    """What a run's policy is compared with, or pulled to, in words; empty if it has none."""
    notes: Iterator[str] = (
        note.removeprefix(start) for note in record.notes for start in OPPONENT if note.startswith(start)
    )
    return next(notes, "")


def trainer(record: RunRecord, depth: int = DEPTH) -> tuple[str, RunRecord] | None:
    """The sft or rl run whose policy a run evaluates or merged, with its folder; None for a base."""
    model = record.settings.get("adapter" if record.command == "merge" else "model")
    earlier = record_of(model)
    if earlier is None or not depth:
        return None
    return (str(model), earlier) if earlier.command in POLICIES else trainer(earlier, depth - 1)


def policy_of(record: RunRecord) -> str:
    """What a run evaluates, as people name it: base, SFT or RL; of a chain of RL runs, the last."""
    found = trainer(record)
    return POLICIES[found[1].command] if found is not None else "base"


def folder_of(record: RunRecord) -> str:
    """The last part of a run's folder."""
    return Path(str(record.settings.get("output") or "")).name
