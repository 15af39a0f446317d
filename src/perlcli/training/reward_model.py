"""A reward model: the rows it reads, how its folder is loaded, and how good its scores are on held-out rows."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset

from perlcli import device, settings, stats
from perlcli.data import Data
from perlcli.data.render import of_preference
from perlcli.errors import PerlError, RunFailed
from perlcli.model import loading, roles, scorers, sources, tokenizers
from perlcli.model.scorers import Scorer
from perlcli.run import plots
from perlcli.run.files import PROOF, SAMPLES, write_json
from perlcli.run.lifecycle import Run
from perlcli.run.progress import Progress
from perlcli.run.record import RunRecord, package_versions
from perlcli.training.origin import trained_in
from perlcli.training.prepare import Prepared
from perlcli.training.rows import dataset, fit

SAMPLED, BATCH = 20, 16
ROUNDING, COARSE = 1e-3, 0.1  # how far rounding may move a score, as a share of the largest: float32, fewer bits
DECIDING = ("torch", "transformers", "peft", "bitsandbytes")
Stage = settings.Reward | settings.Eval


def tokens(rows: Data, prepared: Prepared[Stage], role: str) -> list[dict[str, Any]]:
    """The columns that the trainers read: chosen_ids and rejected_ids, or input_ids and label."""
    return fit(prepared, role, rows, partial(of_preference, prepared.renderer))


def table(rows: Data, prepared: Prepared[Stage], role: str) -> Dataset:
    """The same as a table, to train on."""
    return dataset(prepared, role, rows, partial(of_preference, prepared.renderer))


def id_lists(row: dict[str, Any]) -> list[list[int]]:
    """The token ids of a training row: chosen and rejected, or the completion that got a thumb."""
    return [row["chosen_ids"], row["rejected_ids"]] if "chosen_ids" in row else [row["input_ids"]]


def load(source: sources.Source, values: settings.ModelSettings) -> scorers.ClassifierScorer:
    """The scorer of a saved reward model, an adapter or a classifier, loaded by plain transformers and peft. Raises
    PerlError if it can't be loaded."""
    pad_token_id = tokenizers.score_pad(source, trust_remote_code=values.trust_remote_code)
    model: Any = loading.load_classifier(source, values, pad_token_id)
    if source.adapter:
        model = roles.load_adapter(model, source.adapter, trainable=False)
    return scorers.ClassifierScorer(model, pad_token_id)


def precision_of(source: sources.Source, values: settings.ModelSettings) -> settings.ModelSettings:
    """How to load a reward model on a separate base: as its record says that it was trained, otherwise unquantised."""
    trust = values.trust_remote_code
    own = trained_in(source, trust_remote_code=trust)
    return own or settings.ModelSettings(dtype=values.dtype, trust_remote_code=trust)


def write_proof(folder: Path, rows: list[list[int]], scores: list[float]) -> None:
    """Keep some token rows and their scores in a reward model's folder, so that every later use can be checked."""
    write_json(folder / PROOF, {"rows": rows, "scores": scores})


def check_proof(source: sources.Source, scorer: Scorer, run: Run, values: settings.ModelSettings) -> None:
    """Score the proof rows in a reward model's folder again, if it has any, and note how far the scores moved.

    With the precision, device and libraries of its training only rounding may move them (another CPU may have the same
    name). Otherwise a note says how far they moved. `values` is how the base is loaded.

    Raises PerlError if they moved further than rounding explains, or the proof can't be read.
    """
    trained, path = source.record, Path(source.place) / PROOF
    if trained is None or not path.exists():
        return
    try:
        proof = json.loads(path.read_text(encoding="utf-8"))
        rows, wanted = proof["rows"], [float(score) for score in proof["scores"]]
        shift = max(abs(a - b) for a, b in zip(wanted, scorer(rows), strict=True))
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise PerlError(f"{path} can't be read: {error}", "train the reward again, or delete this file") from error
    used, learned = device.precision(values), trained.device.get("precision")
    run.record.guards[f"shift of {source.name}"] = shift
    where = _elsewhere(trained, device.describe(values)["name"])
    if used == learned and not where:
        limit = (ROUNDING if used == "float32" else COARSE) * max(1.0, *map(abs, wanted))
        if not shift <= limit:  # NaN is over any limit
            raise PerlError(
                f"The reward {source.name} scores its own proof rows differently than after its training: "
                f"rewards moved by up to {shift:.3g}",
                "its files or its base's have changed since then: train it again",
            )
        return
    spread = max(wanted) - min(wanted)
    how = f"in {learned}, used in {used}" if used != learned else where
    run.note(
        f"The reward {source.name} was trained {how}: on {len(rows)} rows its scores shift by up to {shift:.2g} "
        f"(they spread over {spread:.2g})."
    )


def _elsewhere(trained: RunRecord, name: str) -> str:
    """How this machine differs from the training in what decides rounding, device or libraries; empty if it doesn't."""
    if trained.device.get("name") != name:
        return "on another device"
    now = package_versions()
    changed = [key for key in DECIDING if trained.versions.get(key) != now.get(key)]
    return f"with another {' and '.join(changed)}" if changed else ""


def is_same(shift: float, scores: list[float]) -> bool:
    """Whether a shift this large is only rounding, for scores of this size."""
    return shift <= 1e-4 * max(1.0, *map(abs, scores))


def measure(
    prepared: Prepared[Stage], scorer: Scorer, rows: list[dict[str, Any]] | None, held_out: Data | None
) -> dict[str, float]:
    """The reward model's figures on held-out rows; writes samples and a plot of its scores. Raises RunFailed if a score
    is not a finite number."""
    if not rows or held_out is None:
        return {}
    lists = [id_lists(row) for row in rows]
    values = prepared.settings
    size = (values.eval.per_device_eval_batch_size if isinstance(values, settings.Eval) else None) or BATCH
    flat = [ids for row in lists for ids in row]
    scores: list[float] = []
    with Progress("eval", len(flat)) as progress:
        for start in range(0, len(flat), size):
            scores += scorer(flat[start : start + size])
            progress.update(len(scores), {})
    if not all(map(math.isfinite, scores)):
        raise RunFailed("The reward model gives scores that are not finite numbers")
    pairs = "chosen_ids" in rows[0]
    first, second = (scores[0::2], scores[1::2]) if pairs else _by_label(scores, rows)
    names = ("chosen", "rejected") if pairs else ("thumbs up", "thumbs down")
    groups = {name: part for name, part in zip(names, (first, second), strict=True) if part}
    folder = prepared.run.folder
    plots.histogram(groups, "Held-out scores", "score", folder / "plots" / "scores.png")
    _write_samples(prepared, lists, scores, rows)
    if pairs:
        return stats.pair_metrics(first, second, [len(row[0]) for row in lists], [len(row[1]) for row in lists])
    return stats.thumb_metrics(scores, [row["label"] > 0.5 for row in rows], [len(row[0]) for row in lists])


def _by_label(scores: list[float], rows: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    up = [score for score, row in zip(scores, rows, strict=True) if row["label"] > 0.5]
    return up, [score for score, row in zip(scores, rows, strict=True) if row["label"] <= 0.5]


def _write_samples(
    prepared: Prepared[Stage], lists: list[list[list[int]]], scores: list[float], rows: list[dict[str, Any]]
) -> None:
    width = len(lists[0])
    for index in range(min(SAMPLED, len(lists))):
        texts = [prepared.tokenizer.decode(ids) for ids in lists[index]]
        own = scores[index * width : (index + 1) * width]
        if width == 2:
            sample = {"chosen": texts[0], "rejected": texts[1], "chosen_score": own[0], "rejected_score": own[1]}
        else:
            sample = {"text": texts[0], "label": bool(rows[index]["label"]), "score": own[0]}
        prepared.run.append(SAMPLES, sample)
