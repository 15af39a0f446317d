"""`perl reward`: a reward model from pairs (chosen, rejected) or thumbs up / down, by LoRA and a scalar head."""

from __future__ import annotations

import gc
import json
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import set_seed
from trl import RewardConfig, RewardTrainer

from perlcli import device, settings, stats
from perlcli.errors import PerlError, RunFailed
from perlcli.model import adapters, dropout, heads, loading, roles, scorers, sources
from perlcli.model.shared_prompts import Sharer
from perlcli.model.tokenizers import padded
from perlcli.run import files, plots
from perlcli.run.lifecycle import recording
from perlcli.run.record import RunRecord
from perlcli.training import auto_batch, guards, reward_model, sharing
from perlcli.training.dry_run import lengths_of, preview
from perlcli.training.lending import Lent
from perlcli.training.loop import describe, train
from perlcli.training.prepare import Prepared, loaded, prepare, require
from perlcli.training.rows import load_sides
from perlcli.training.trl_config import trl_config

PROOF_ROWS, KEPT = 8, 4  # training rows that the proof scores, and token rows of them that the folder keeps
WINDOW, RUNNING = 256, "running_auc"  # training rows whose AUC is shown, and its name in the metrics of a step
RUNNING_FILE = "running_auc.json"  # in a checkpoint: the rows of the window
Batch = dict[str, torch.Tensor]
Proof = tuple[list[list[int]], list[float]]  # rows of token ids with the scores that the trained model gives them


def run(given: settings.Reward) -> RunRecord | None:
    """Train a reward model and prove that its folder gives the same scores; None for a dry run."""
    prepared = prepare(given)
    require(prepared, policy=False)
    reward_model.note_head(prepared)
    config = trainer_args(prepared.settings)
    rows, held_out = load_sides(prepared, "reward")
    train_set = reward_model.table(rows, prepared, "train")
    eval_rows = reward_model.tokens(held_out, prepared, "eval") if held_out else None
    weight = pos_weight(prepared, config, train_set)
    lengths = lengths_of(train_set)
    prepared = auto_batch.settled(prepared, trainer_args, lengths.longest)
    config = trainer_args(prepared.settings)
    if prepared.is_dry:
        preview(prepared, config, lengths)
        return None
    with recording(prepared.run) as run:
        proof = learn(prepared, config, train_set, weight)
        scorer = prove(prepared, proof)
        run.record.metrics |= reward_model.measure(prepared, scorer, eval_rows, held_out)
        if eval_rows:
            count = len(eval_rows)
            run.record.metrics |= reward_model.measure_trained(prepared, scorer, train_set, rows, count)
        reward_model.conclude(run)
        with run.extra("The plots"):
            plots.curves("reward", run.folder / files.METRICS, run.folder / "plots" / "training.png")
    return run.record


def trainer_args(given: settings.Reward) -> RewardConfig:
    """The TRL config of these settings."""
    return trl_config(RewardConfig, given, {"max_length": given.data.max_length})


def pos_weight(prepared: Prepared[settings.Reward], config: RewardConfig, rows: Dataset) -> float | None:
    """The weight of thumbs-up rows in the loss, noted with the balance that it corrects; None for pairs. Raises
    PerlError if all rows have the same label, and for a TRL setting that only applies to pairs."""
    wanted = prepared.settings.thumbs.pos_weight
    if "label" not in rows.column_names:
        margin = " - margin" if "margin" in rows.column_names else ""
        prepared.run.note(f"loss on pairs: -log sigmoid(score of chosen - score of rejected{margin})")
        return None
    up = int(sum(rows["label"]))
    down = len(rows) - up
    if not up or not down:
        problem = f"All {len(rows):,} rows are thumbs {'up' if up else 'down'}: a reward model needs both labels"
        raise PerlError(problem, "add rows with the other label")
    weight = {"auto": down / up, "none": 1.0}.get(str(wanted)) or float(wanted)
    balance = f"{up:,} up, {down:,} down ({up / len(rows):.1%} up)"
    prepared.run.note(f"loss on thumbs: binary cross-entropy; {balance}; --pos-weight {wanted}: {weight:.4g}")
    prepared.run.record.metrics |= {"train_share_thumbs_up": up / len(rows), "pos_weight": weight}
    if config.center_rewards_coefficient is not None:
        problem = "--set center_rewards_coefficient only applies to pairs: the labels of thumbs centre the scores"
        raise PerlError(problem)
    return weight


# Training


def learn(prepared: Prepared[settings.Reward], config: RewardConfig, rows: Dataset, weight: float | None) -> Proof:
    """Train and save; gives the first training rows with the scores of the trained model as it is in memory. The model
    is freed when this returns."""
    trainer = build_trainer(prepared, config, rows, weight)
    describe(trainer, prepared.run)
    role, name = ("", "reward model") if prepared.settings.lora.full else (roles.POLICY, "reward adapter")
    weights = guards.Watch(lambda: {name: guards.checksum(trainer.model, role)}, trained=(name,))
    train(trainer, prepared.run, weights.before_saving(partial(save, prepared)))
    weights.check()
    if weight is None:
        sharing.conclude(trainer.sharer, prepared.run)
    first = rows.select(range(min(PROOF_ROWS, len(rows))))
    proof = [ids for row in first for ids in reward_model.id_lists(row)]
    trainer.lent.give_back()  # without training's autocast
    return proof, scorers.ClassifierScorer(trainer.model, prepared.tokenizer.pad_token_id)(proof)


def build_trainer(
    prepared: Prepared[settings.Reward], config: RewardConfig, rows: Dataset, pos_weight: float | None
) -> Any:
    """TRL's trainer for pairs, or with a `pos_weight` ours for thumbs, on the base with a head and what trains."""
    model, tokenizer = start(prepared), prepared.tokenizer
    lent = Lent(model)
    trainer: Any
    with roles.unrounded(model):
        if pos_weight is None:
            trainer = PairsTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
        else:
            collate = partial(thumbs_batch, tokenizer.pad_token_id)
            trainer = ThumbsTrainer(model, config, collate, train_dataset=rows, processing_class=tokenizer)
            trainer.pos_weight = pos_weight
    trainer.lent, trainer.sharer = lent, Sharer(model, is_on=prepared.settings.sharing.shared_prompts)
    roles.as_float32(trainer.model)
    if pos_weight is None:
        sharing.try_out(trainer.sharer, prepared.run)
    if config.disable_dropout and (left := dropout.left_in(trainer)):
        prepared.run.note(f"{left}.")
    roles.set_adapter_dropout(trainer.model, adapters.dropout_of(prepared.settings.lora, "SEQ_CLS"))
    return trainer


def start(prepared: Prepared[settings.Reward]) -> roles.Model:
    """The base with a scalar head, and the adapter that --model names or a new one; with --full everything trains."""
    source, values = prepared.source, prepared.settings
    set_seed(values.run.seed)  # head and adapter are initialised at random
    model = loading.load_classifier(source, values.model, prepared.tokenizer.pad_token_id)
    loaded(prepared)
    reward_model.keep_head(prepared.run, model)
    if values.lora.full:
        for parameter in heads.scored(model):
            parameter.requires_grad_(True)
        return model.float()  # bfloat16 weights would round small updates away
    if source.adapter:
        return roles.load_adapter(model, source.adapter, trainable=True)
    return roles.new_adapter(model, values.lora, "SEQ_CLS")


def thumbs_batch(pad: int, rows: list[dict[str, Any]]) -> Batch:
    """`input_ids` and `attention_mask`, (rows, longest), and `labels`, (rows,): 1 for a thumbs up, 0 for down."""
    ids, mask = padded([row["input_ids"] for row in rows], pad)
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([row["label"] for row in rows])}


class PairsTrainer(RewardTrainer):
    """TRL's reward trainer for pairs, whose answers share the forward pass of their prompt."""

    sharer: Sharer

    def compute_loss(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        """The mean loss over the pairs; the first half of the rows are chosen, the others rejected."""
        half = range(len(inputs["input_ids"]) // 2)
        with self.sharer.groups([*half, *half]):
            return super().compute_loss(model, inputs, *args, **kwargs)


class ThumbsTrainer(RewardTrainer):
    """TRL's reward trainer for thumbs: binary cross-entropy on sigmoid(score) (paper, section 3.1: pointwise)."""

    pos_weight = 1.0  # of thumbs-up rows in the loss

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.window: deque[tuple[float, bool]] = deque(maxlen=WINDOW)  # scores and labels of the latest rows

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset  # rendered already, like TRL's own `chosen_ids` and `rejected_ids`

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns: Any = ["input_ids", "label"]

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean loss over the rows; with the model's outputs if asked for."""
        labels = inputs.pop("labels")
        outputs = model(**inputs, use_cache=False)
        scores = outputs.logits[:, 0].float()  # (rows,)
        weight = torch.tensor(self.pos_weight, device=scores.device)
        loss = nn.functional.binary_cross_entropy_with_logits(scores, labels, pos_weight=weight)
        self._count(inputs["attention_mask"], scores, labels)
        return (loss, outputs) if return_outputs else loss

    def _count(self, mask: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor) -> None:
        """Log what TRL's reward trainer logs, as far as it applies to thumbs. In place of the accuracy, which says
        nothing on few rows, it is the AUC of the latest `WINDOW` rows, once they have both labels."""
        mode = "train" if scores.requires_grad else "eval"
        if mode == "train":
            self._total_train_tokens += int(self.accelerator.gather_for_metrics(mask.sum()).sum())
        metrics = self._metrics[mode]
        metrics["num_tokens"] = [self._total_train_tokens]
        self.window.extend(zip(scores.tolist(), (labels > 0.5).tolist(), strict=True))
        up, down = ([score for score, label in self.window if label is kind] for kind in (True, False))
        if up and down:
            metrics[RUNNING] = [stats.auc(up, down)]
        metrics["mean_reward"].append(self.accelerator.gather_for_metrics(scores.detach()).mean().item())

    # Checkpoints: a resumed run goes on with the same rows in the window.

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        files.write_json(Path(str(output_dir or self.args.output_dir)) / RUNNING_FILE, [*self.window])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = Path(resume_from_checkpoint) / RUNNING_FILE
        if path.exists():  # not in the checkpoints of earlier versions
            self.window.extend((score, label) for score, label in json.loads(path.read_text(encoding="utf-8")))


def save(prepared: Prepared[settings.Reward], model: Any, folder: Path) -> None:
    """Write the adapter with its head, or after full tuning the classifier, and the tokenizer into a folder."""
    if prepared.settings.lora.full:
        roles.round_weights(model, getattr(torch, device.dtype_name(prepared.settings.model)))
        model.save_pretrained(str(folder))
    else:
        roles.round_head(model, model.dtype)
        roles.save_adapter(model, folder)
    prepared.tokenizer.save_pretrained(str(folder))
    (prepared.run.folder / files.PROOF).unlink(missing_ok=True)  # it is of the weights before


def prove(prepared: Prepared[settings.Reward], proof: Proof) -> scorers.ClassifierScorer:
    """The scorer of the saved folder, loaded again on another base. Raises RunFailed if its scores are not the proof's.
    Keeps some rows with their scores in the folder, so that later uses can be checked as well."""
    gc.collect()  # the trained model, which its trainer refers to in a circle
    run, model, (rows, scores) = prepared.run, prepared.settings.model, proof
    source = sources.locate(str(run.folder), trust_remote_code=model.trust_remote_code)
    scorer = reward_model.load(source, model)
    shift = max(abs(a - b) for a, b in zip(scores, scorer(rows), strict=True))
    run.record.metrics["reload_shift"] = shift
    if not reward_model.is_same(shift, scores):
        differ = f"they differ by up to {shift:.3g}"
        raise RunFailed(f"The saved reward model doesn't give the trained one's scores: {differ}")
    kept = sorted(rows, key=len)[:KEPT]  # short ones: every later use scores them again
    reward_model.write_proof(run.folder, kept, scorer(kept))
    same = f"same scores on {len(rows)} rows (largest difference {shift:.2g})"
    run.note(f"Reloaded the reward model from {run.folder}: {same}.")
    return scorer
