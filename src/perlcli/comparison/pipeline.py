"""The policies of a pipeline next to each other: base, SFT, RL, as evaluations measured them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from perlcli.comparison.results import PolicyFigures
from perlcli.run import lineage
from perlcli.run.record import RunRecord

ORDER = ("base", "SFT", "RL")
IN_TRAINING = "RL, in training"
KL = ("kl_k1_per_sequence", "kl_k1_per_token")


def policies(runs: Mapping[str, RunRecord]) -> list[PolicyFigures]:
    """The figures of every policy that the runs measured, base first; `runs` by their names. An evaluation of a policy
    also measures its anchor, which counts where no run evaluates that itself. RL that nothing evaluates has the
    figures of its training."""
    evals = {name: record for name, record in runs.items() if _is_of_policy(record)}
    found = [_measured(record, name) for name, record in evals.items()]
    known = {policy.name for policy in found}
    for name, record in evals.items():
        anchor = _of_anchor(record, name)
        if anchor is not None and anchor.name not in known:
            found.append(anchor)
            known.add(anchor.name)
    if "RL" not in known:
        found += [_trained(record, name) for name, record in runs.items() if record.command == "rl" and record.metrics]
    return sorted(found, key=lambda policy: ORDER.index(policy.name) if policy.name in ORDER else len(ORDER))


def _is_of_policy(record: RunRecord) -> bool:
    return record.command == "eval" and record.status == "finished" and "prompts" in record.metrics


def _measured(record: RunRecord, name: str) -> PolicyFigures:
    """What an evaluation measured of its policy."""
    kl = next((record.metrics[key] for key in KL if record.metrics.get(key) is not None), None)
    figures = _kept(record, "")
    return PolicyFigures(
        lineage.policy_of(record), name, record.metrics["prompts"], figures, kl, lineage.opponent(record)
    )


def _of_anchor(record: RunRecord, name: str) -> PolicyFigures | None:
    """What an evaluation measured of the policy's anchor; None if it has none, or nothing was measured of it."""
    figures, found = _kept(record, "anchor_"), lineage.trainer(record)
    if not figures or found is None:
        return None
    wanted, start = found[1].settings.get("anchor"), lineage.trainer(found[1])
    if found[1].command == "rl" and wanted in (None, "sft") and start is not None:
        policy = lineage.POLICIES[start[1].command]
    else:
        policy = "base" if wanted in (None, "sft", "base") else str(wanted)
    return PolicyFigures(policy, name, record.metrics["prompts"], figures)


def _trained(record: RunRecord, name: str) -> PolicyFigures:
    """The figures of RL's last steps, on training prompts."""
    names: Iterable[tuple[str, str]] = (
        ("gold", "gold"),
        ("mean_reward", "reward"),
        ("mean_length", "completion_length"),
    )
    figures = {ours: record.metrics[theirs] for ours, theirs in names if record.metrics.get(theirs) is not None}
    kl = record.metrics.get("kl_per_token")
    length = figures.get("mean_length")
    per_sequence = kl * length if kl is not None and length is not None else None
    return PolicyFigures(IN_TRAINING, name, None, figures, per_sequence, lineage.opponent(record))


def _kept(record: RunRecord, prefix: str) -> dict[str, float]:
    """The figures of a policy or its anchor, with the bounds of their intervals, by the names of the policy's."""
    names = ("gold", "mean_reward", "net_win_rate", "mean_length", "eval_loss", "loss")
    keys = [f"{name}{bound}" for name in names for bound in ("", "_low", "_high")]
    found = {key: record.metrics.get(f"{prefix}{key}") for key in keys}
    return {key: float(value) for key, value in found.items() if isinstance(value, int | float)}
