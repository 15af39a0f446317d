"""The loss of a policy on held-out answers, and that of its anchor on the same ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from perlcli import data, paired, settings
from perlcli.data.checks import prompt_digest
from perlcli.data.dialogs import LossOn
from perlcli.data.render import IGNORED, Columns, of_demonstration
from perlcli.model import log_probs
from perlcli.model.roles import Model
from perlcli.text import counted
from perlcli.training.policy_metrics import Opponent
from perlcli.training.prepare import Prepared, filled
from perlcli.training.rows import fit

ROLE = "answers"  # of the rows in the record's `data`
Answers = tuple[data.Data, list[Columns]]  # held-out demonstrations, and their token columns
Losses = list[tuple[float, int]]  # of each row: the sum of its tokens' losses, and how many tokens that are


def columns(prepared: Prepared[settings.Eval], rows: data.Data) -> list[Columns]:
    """The token columns of held-out demonstrations; the loss is on the tokens that the policy's own training learned
    from, else on the assistant's. Raises PerlError for rows that can't be used."""
    record = prepared.source.record
    own: LossOn = (record.settings.get("loss_on") if record is not None else None) or "assistant"
    return fit(prepared, ROLE, rows, partial(of_demonstration, prepared.renderer, loss_on=own))


def measure(
    prepared: Prepared[settings.Eval], model: Model, opponent: Opponent | None, answers: Answers
) -> tuple[dict[str, float], list[str]]:
    """Loss per token and perplexity, those of the anchor, and the paired difference with its verdict."""
    size, (rows, tokens) = filled(prepared.settings.eval.per_device_eval_batch_size), answers
    mine = losses(model, tokens, size)
    metrics: dict[str, float] = {"answers": len(tokens), **_figures(mine, "")}
    if opponent is None:
        return metrics, []
    with opponent.model() as reference:
        theirs = losses(reference, tokens, size)
    metrics |= _figures(theirs, "anchor_")
    gaps = [one - other for (one, _), (other, _) in zip(mine, theirs, strict=True)]
    groups, counts = [prompt_digest(row) for row in rows.rows], [float(count) for _, count in mine]
    difference = paired.mean_difference(gaps, groups, counts)
    if difference is None:
        return metrics, []
    count = counted(len(tokens), "held-out answer")
    reply = {-1: "yes", 0: f"can't say from {count}", 1: "no, it is worse"}[difference.sign]
    figures = f"{difference.value:.3g} per token (95 % interval {difference.low:.3g} to {difference.high:.3g})"
    question = f"Predicts held-out answers better than its anchor ({opponent.words})"
    verdict = f"{question}: {reply}; loss difference {figures}."
    return metrics | difference.named("loss_difference"), [verdict]


def losses(model: Model, rows: Sequence[Columns], size: int) -> Losses:
    """The losses of the labelled tokens of each row, in nats; a first token is never predicted."""
    starts = [_start(row["labels"]) for row in rows]
    prompts = [row["input_ids"][:start] for row, start in zip(rows, starts, strict=True)]
    written = [row["input_ids"][start:] for row, start in zip(rows, starts, strict=True)]
    found = []
    for row, start, values in zip(rows, starts, log_probs.log_probs(model, prompts, written, 1.0, size), strict=True):
        learned = [value for value, label in zip(values, row["labels"][start:], strict=True) if label != IGNORED]
        found.append((-sum(learned), len(learned)))
    return found


def _start(labels: Sequence[int]) -> int:
    return next((place for place, label in enumerate(labels) if place and label != IGNORED), len(labels))


def _figures(found: Losses, prefix: str) -> dict[str, float]:
    loss = sum(total for total, _ in found) / max(1, sum(count for _, count in found))
    return {f"{prefix}loss": loss, f"{prefix}perplexity": math.exp(min(loss, 700.0))}
