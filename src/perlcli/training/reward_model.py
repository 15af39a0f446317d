"""A reward model's scores: the rows it reads, how its folder is loaded, how good it is on held-out rows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset

from perlcli import device, settings, stats
from perlcli.data import Data
from perlcli.data.tokens import of_preference
from perlcli.errors import PerlError, RunFailed
from perlcli.model import loading, roles, scorers, sources, tokenizers
from perlcli.run import plots
from perlcli.run.files import PROOF, SAMPLES, write_json
from perlcli.run.lifecycle import Run
from perlcli.run.progress import Progress
from perlcli.run.record import RunRecord, find_record, package_versions
from perlcli.training.origin import trained_in
from perlcli.training.rows import dataset, fit

SAMPLED, BATCH = 20, 16
ROUNDING, COARSE = 1e-3, 0.1  # how far a score may move by rounding, as a share of the largest: float32, fewer bits
DECIDING = ("torch", "transformers", "peft", "bitsandbytes")
Scorer = Callable[[Sequence[list[int]]], list[float]]


def tokens(rows: Data, prepared: Any, role: str) -> list[dict[str, Any]]:
    """The columns that the trainers read: chosen_ids and rejected_ids, or input_ids and label."""
    return fit(prepared, role, rows, partial(of_preference, prepared.renderer))


def table(rows: Data, prepared: Any, role: str) -> Dataset:
    """The same as a table, to train on."""
    return dataset(prepared, role, rows, partial(of_preference, prepared.renderer))


def id_lists(row: dict[str, Any]) -> list[list[int]]:
    """The token rows of a training row: chosen and rejected, or the one that got a thumb."""
    return [row["chosen_ids"], row["rejected_ids"]] if "chosen_ids" in row else [row["input_ids"]]


def load(source: sources.Source, values: settings.ModelSettings) -> scorers.ClassifierScorer:
    """The scorer of a saved reward model: adapter on its base, or whole classifier, by plain transformers and peft."""
    pad_token_id = tokenizers.score_pad(source, trust_remote_code=values.trust_remote_code)
    model: Any = loading.load_classifier(source, values, pad_token_id)
    if source.adapter:
        model = roles.load_adapter(model, source.adapter, trainable=False)
    return scorers.ClassifierScorer(model, pad_token_id)


def precision_of(source: sources.Source, values: settings.ModelSettings) -> settings.ModelSettings:
    """How to load a reward model on a base of its own: as it was trained, where its record tells, else unquantised."""
    trust = values.trust_remote_code
    own = trained_in(source, trust_remote_code=trust)
    return own or settings.ModelSettings(dtype=values.dtype, trust_remote_code=trust)


def write_proof(folder: Path, rows: list[list[int]], scores: list[float]) -> None:
    """Keep some token rows with their scores in a reward model's folder, so that any later use can be held to them."""
    write_json(folder / PROOF, {"rows": rows, "scores": scores})


def check_proof(source: sources.Source, scorer: Scorer, run: Run, values: settings.ModelSettings) -> None:
    """Score a reward folder's proof rows again, and say how far the scores moved; without a proof there is no telling.

    In the precision, on the device and with the libraries of its training only rounding may move them (another CPU may
    bear the same name); raises PerlError where more does. Elsewhere it is noted how far they moved.
    """
    trained, path = find_record(source.adapter or source.base), Path(source.adapter or source.base) / PROOF
    if trained is None or not path.exists():
        return
    try:
        proof = json.loads(path.read_text(encoding="utf-8"))
        rows, wanted = proof["rows"], [float(score) for score in proof["scores"]]
        found = scorer(rows)
        shift = max(abs(a - b) for a, b in zip(wanted, found, strict=True))
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise PerlError(f"{path} can't be read: {error}", "train the reward again, or delete this file") from error
    used, learned = device.precision(values), trained.device.get("precision")
    run.record.guards[f"shift of {source.name}"] = shift
    where = _elsewhere(trained, device.describe(values)["name"])
    if used == learned and not where:
        if not shift <= (ROUNDING if used == "float32" else COARSE) * max(1.0, *map(abs, wanted)):
            raise PerlError(
                f"The reward {source.name} scores its own proof rows otherwise than after its training: rewards moved "
                f"by up to {shift:.3g}",
                "its files or its base's have changed since: train it again",
            )
        return
    spread = max(wanted) - min(wanted)
    how = f"in {learned}, used in {used}" if used != learned else where
    run.note(
        f"The reward {source.name} was trained {how}: on {len(rows)} rows its scores shift by up to {shift:.2g} "
        f"(they spread over {spread:.2g})."
    )


def _elsewhere(trained: RunRecord, name: str) -> str:
    """What differs from a training, of all that decides rounding: the device, or the libraries; empty for nothing."""
    if trained.device.get("name") != name:
        return "on another device"
    now = package_versions()
    changed = [key for key in DECIDING if trained.versions.get(key) != now.get(key)]
    return f"with another {' and '.join(changed)}" if changed else ""


def is_same(shift: float, scores: list[float]) -> bool:
    """Whether scores that moved this far are the same but for rounding in another place."""
    return shift <= 1e-4 * max(1.0, *map(abs, scores))


def measure(prepared: Any, scorer: Any, rows: list[dict[str, Any]] | None, held_out: Data | None) -> dict[str, float]:
    """The reward model's figures on held-out rows; writes samples and the picture of its scores."""
    if not rows or held_out is None:
        return {}
    lists = [id_lists(row) for row in rows]
    size = settings.flat(prepared.settings).get("per_device_eval_batch_size") or BATCH
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
    prepared: Any, lists: list[list[list[int]]], scores: list[float], rows: list[dict[str, Any]]
) -> None:
    width = len(lists[0])
    for index in range(min(SAMPLED, len(lists))):
        texts = [prepared.tokenizer.decode(ids) for ids in lists[index]]
        found = scores[index * width : (index + 1) * width]
        if width == 2:
            sample = {"chosen": texts[0], "rejected": texts[1], "chosen_score": found[0], "rejected_score": found[1]}
        else:
            sample = {"text": texts[0], "label": bool(rows[index]["label"]), "score": found[0]}
        prepared.run.append(SAMPLES, sample)
