"""A reward model: the rows it reads, how its folder is loaded, and how good its scores are on held-out rows."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn

from perlcli import device, settings
from perlcli.data import Data, Preference, dependence
from perlcli.data.render import Columns, of_preference
from perlcli.errors import PerlError, RunFailed
from perlcli.model import heads, labels, loading, roles, scorers, sources, tokenizers
from perlcli.model.scorers import Scorer
from perlcli.run import disk, loaders, plots
from perlcli.run.files import PROOF, SAMPLES, write_json
from perlcli.run.lifecycle import Run
from perlcli.run.progress import Progress
from perlcli.run.record import RunRecord, package_versions
from perlcli.text import counted
from perlcli.training import reward_metrics
from perlcli.training.origin import trained_in
from perlcli.training.prepare import Prepared
from perlcli.training.reward_metrics import Figures
from perlcli.training.rows import dataset, fit

SAMPLED, BATCH = 20, 16
MOST_TRAINED = 256  # training rows that are scored, to compare with the held-out ones
UNMEASURED = (
    "Warning: no rows were held out, so nothing shows whether this reward model is better than chance "
    "(--eval-fraction 0.1, --eval-data, or perl eval)."
)
ROUNDING, COARSE = 1e-3, 0.1  # how far rounding may move a score, as a share of the largest: float32, fewer bits
DECIDING = ("torch", "transformers", "peft", "bitsandbytes")
Stage = settings.Reward | settings.Eval


def tokens(rows: Data, prepared: Prepared[Stage], role: str) -> list[Columns]:
    """The columns that the trainers read: chosen_ids and rejected_ids, or input_ids and label."""
    return fit(prepared, role, rows, partial(of_preference, prepared.renderer))


def table(rows: Data, prepared: Prepared[Stage], role: str) -> Dataset:
    """The same as a table, to train on; pairs with a margin have a column for it, as TRL's loss reads it."""
    render = partial(of_preference, prepared.renderer)
    margins = [row.margin for row in rows.rows if isinstance(row, Preference)]
    missing = margins.count(None)
    if missing == len(margins):
        return dataset(prepared, role, rows, render)
    if missing:
        prepared.run.note(f"{counted(missing, 'pair')} without a margin, of {len(margins):,}: their margin is 0.")
    return dataset(prepared, role, rows, lambda row: {**render(row), "margin": row.margin or 0.0})


def note_head(prepared: Prepared[settings.Reward]) -> None:
    """Note if the head is trained on the causal model. Raises PerlError if this family can be no reward model, or if
    the model is a classifier of several labels."""
    source, values = prepared.source, prepared.settings
    if source.is_classifier and len(names := labels.names_of(source)) != 1:
        problem = f"--model {source.name} is a classifier with {len(names)} labels, and a reward is a single score"
        raise PerlError(problem, "start from a language model, or from a reward model")
    trust = values.model.trust_remote_code
    if heads.is_on_causal(source, full=values.lora.full, trust_remote_code=trust):
        prepared.run.note("The score's head is on the causal model; the model card shows how to load it.")


def keep_head(run: Run, model: nn.Module) -> None:
    """Keep in the record how to load a head on the causal model; the model card shows it."""
    described = heads.described(model)
    if described is not None:
        run.record.model[loaders.CAUSAL_HEAD] = described


def id_lists(row: Columns) -> list[list[int]]:
    """The token ids of a training row: chosen and rejected, or the completion that got a thumb."""
    return [row["chosen_ids"], row["rejected_ids"]] if "chosen_ids" in row else [row["input_ids"]]


def load(source: sources.Source, values: settings.ModelSettings, label: int = 0) -> scorers.ClassifierScorer:
    """The scorer of a saved reward model, by plain transformers and peft: of one of its labels. Raises PerlError if it
    can't be loaded."""
    pad_token_id = tokenizers.score_pad(source, trust_remote_code=values.trust_remote_code)
    model: Any = loading.load_classifier(source, values, pad_token_id)
    if source.adapter:
        model = roles.load_adapter(model, source.adapter, trainable=False)
    return scorers.ClassifierScorer(model, pad_token_id, label)


def precision_of(source: sources.Source, values: settings.ModelSettings) -> settings.ModelSettings:
    """How to load a reward model on a separate base: as its record says that it was trained, otherwise unquantised."""
    trust = values.trust_remote_code
    own = trained_in(source, trust_remote_code=trust)
    return own or settings.ModelSettings(dtype=values.dtype, trust_remote_code=trust)


def write_proof(folder: Path, rows: list[list[int]], scores: list[float]) -> None:
    """Keep some token rows and their scores in a reward model's folder, so that every later use can be checked."""
    write_json(folder / PROOF, {"rows": rows, "scores": scores})


def check_proof(source: sources.Source, scorer: Scorer, run: Run, values: settings.ModelSettings) -> None:
    """Score the proof rows in a reward model's folder again, if it has any. With the precision, device and libraries of
    its training only rounding may move the scores (another CPU may have the same name), otherwise a note says how far
    they moved. `values` is how the base is loaded.

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
            problem = f"The reward {source.name} scores its own proof rows differently than after its training"
            hint = "its files or its base's have changed since then: train it again"
            raise PerlError(f"{problem}: rewards moved by up to {shift:.3g}", hint)
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
    changed = [key for key in DECIDING if trained.versions.get(key) != package_versions().get(key)]
    return f"with another {' and '.join(changed)}" if changed else ""


def is_same(shift: float, scores: list[float]) -> bool:
    """Whether a shift this large is only rounding, for scores of this size."""
    return shift <= 1e-4 * max(1.0, *map(abs, scores))


def measure(
    prepared: Prepared[Stage], scorer: Scorer, columns: list[Columns] | None, rows: Data | None
) -> dict[str, float]:
    """A reward model's figures on held-out rows, which `columns` has as tokens; writes samples and a plot. Raises
    RunFailed if a score is not finite."""
    if not columns or rows is None:
        return {}
    scores = score(prepared, scorer, columns)
    groups = named(columns, scores)
    with prepared.run.extra("The plots"):
        plots.histogram(groups, "Held-out scores", "score", prepared.run.folder / "plots" / "scores.png")
    _write_samples(prepared, columns, scores)
    rendered = [[len(completion) for _, completion in prepared.renderer.rendered(row)] for row in rows.rows]
    return figures(columns, scores, rendered, dependence.groups(rows.rows))


def measure_trained(prepared: Prepared[Stage], scorer: Scorer, table: Dataset, rows: Data, count: int) -> Figures:
    """What decides about a reward model, on about `count` of its training rows, spread evenly; `rows` are the table's.
    Raises RunFailed if a score is not finite."""
    count = min(count, MOST_TRAINED, len(table))
    places = [index * len(table) // count for index in range(count)]
    columns: list[Columns] = [dict(table[place]) for place in places]
    groups = dependence.groups([rows.rows[place] for place in places])
    lengths = [[len(ids) for ids in id_lists(row)] for row in columns]
    return reward_metrics.of_training(figures(columns, score(prepared, scorer, columns), lengths, groups))


def score(prepared: Prepared[Stage], scorer: Scorer, columns: list[Columns]) -> list[float]:
    """The scores of rows: one of each thumb, two of each pair, the chosen one's first. Raises RunFailed if one is not
    finite."""
    values = prepared.settings
    size = (values.eval.per_device_eval_batch_size if isinstance(values, settings.Eval) else None) or BATCH
    flat = [ids for row in columns for ids in id_lists(row)]
    with Progress("eval", len(flat)) as progress:
        alike = [index for index, row in enumerate(columns) for _ in id_lists(row)]  # the answers of a pair
        together = alike if values.sharing.shared_prompts else None
        scores = scorer(flat, size, lambda count: progress.update(count, {}), together)
    if not all(map(math.isfinite, scores)):
        raise RunFailed("The reward model gives scores that are not finite numbers")
    return scores


def figures(
    columns: list[Columns], scores: list[float], lengths: list[list[int]], groups: Sequence[Hashable]
) -> Figures:
    """The figures of scored rows, with the lengths of each one's completions in tokens, and with their groups."""
    firsts = [own[0] for own in lengths]
    if "label" in columns[0]:
        return reward_metrics.of_thumbs(scores, [bool(row["label"] > 0.5) for row in columns], firsts, groups)
    return reward_metrics.of_pairs(scores[0::2], scores[1::2], firsts, [own[1] for own in lengths], groups)


def named(columns: list[Columns], scores: list[float]) -> dict[str, list[float]]:
    """The scores by kind: chosen and rejected, or thumbs up and down, as far as there are any."""
    if "chosen_ids" in columns[0]:
        return {"chosen": scores[0::2], "rejected": scores[1::2]}
    labelled = [(score, bool(row["label"] > 0.5)) for score, row in zip(scores, columns, strict=True)]
    groups = {"thumbs up": [s for s, up in labelled if up], "thumbs down": [s for s, up in labelled if not up]}
    return {name: part for name, part in groups.items() if part}


def conclude(run: Run) -> None:
    """Print and record what the figures of held-out rows show. A note says so if there are none."""
    if "rows" not in run.record.metrics:
        run.note(UNMEASURED)
        return
    run.record.verdicts = reward_metrics.verdicts(run.record.metrics)
    for verdict in run.record.verdicts:
        disk.tell(verdict)


def _write_samples(prepared: Prepared[Stage], rows: list[Columns], scores: list[float]) -> None:
    for index, row in enumerate(rows[:SAMPLED]):
        texts = [prepared.tokenizer.decode(ids) for ids in id_lists(row)]
        own = scores[index * len(texts) : (index + 1) * len(texts)]
        if "label" in row:
            sample = {"text": texts[0], "label": bool(row["label"]), "score": own[0]}
        else:
            sample = {"chosen": texts[0], "rejected": texts[1], "chosen_score": own[0], "rejected_score": own[1]}
        prepared.run.append(SAMPLES, sample)
