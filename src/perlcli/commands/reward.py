"""`perl reward`: a reward model from pairs (chosen, rejected) or thumbs up / down, by LoRA and a head of one score."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import set_seed
from trl import RewardConfig, RewardTrainer

from perlcli import device, settings
from perlcli.errors import PerlError, RunFailed
from perlcli.model import adapters, loading, roles, scorers, sources
from perlcli.model.batches import padded
from perlcli.run import plots
from perlcli.run.files import METRICS, PROOF
from perlcli.run.lifecycle import recording
from perlcli.run.record import RunRecord
from perlcli.training import guards, reward_model
from perlcli.training.loop import train
from perlcli.training.prepare import Prepared, loaded, prepare, require
from perlcli.training.preview import preview
from perlcli.training.rows import load_sides
from perlcli.training.trl_config import trl_config

PROOF_ROWS, PROOF_KEPT = 8, 4


def run(given: settings.Reward) -> RunRecord | None:
    """Train a reward model and prove that its folder gives the same scores; None for a dry run."""
    prepared = prepare(given)
    require(prepared, policy=False)
    config = trainer_args(prepared.settings)
    rows, held_out = load_sides(prepared, "reward")
    train_set = reward_model.table(rows, prepared, "train")
    eval_rows = reward_model.tokens(held_out, prepared, "eval") if held_out else None
    weight = pos_weight(prepared, train_set)
    if weight is not None and config.center_rewards_coefficient is not None:
        raise PerlError("--set center_rewards_coefficient is for pairs: the loss of thumbs is centred by its labels")
    if prepared.is_dry:
        preview(prepared, config)
        return None
    with recording(prepared.run) as run:
        trainer = build_trainer(prepared, config, train_set, weight)
        run.record.trl_settings = trainer.args.to_dict()
        run.record.trainable_parameters, run.record.total_parameters = roles.count_parameters(trainer.model)
        role, what = ("", "The reward model") if prepared.settings.lora.full else (roles.POLICY, "The reward adapter")
        before, after = guards.checksum(trainer.model, role), ""

        def finish(model: Any, folder: Path) -> None:
            nonlocal after
            after = guards.checksum(model, role)  # first: saving rounds the head, or after full tuning the weights
            save(prepared, model, folder)

        train(trainer, run, finish)
        guards.assert_moved(before, after, what)
        proof = [
            ids
            for row in train_set.select(range(min(PROOF_ROWS, len(train_set))))
            for ids in reward_model.id_lists(row)
        ]
        bare = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # without training's autocast
        wanted = scorers.ClassifierScorer(bare, prepared.tokenizer.pad_token_id)(proof)
        trainer.model = trainer.model_wrapped = None  # the proof loads a base of its own: make room for it
        del trainer, bare
        gc.collect()
        scorer = prove(prepared, proof, wanted)
        run.record.metrics |= reward_model.measure(prepared, scorer, eval_rows, held_out)
        plots.curves("reward", run.folder / METRICS, run.folder / "plots" / "training.png")
    return run.record


def trainer_args(given: settings.Reward) -> RewardConfig:
    """The TRL config of these settings."""
    return trl_config(RewardConfig, given, {"max_length": given.data.max_length})


def pos_weight(prepared: Prepared[settings.Reward], rows: Dataset) -> float | None:
    """The weight of thumbs-up rows in the loss, said with the balance it answers; None for pairs."""
    wanted = prepared.settings.thumbs.pos_weight
    if "label" not in rows.column_names:
        prepared.run.note("kind: pairs, loss -log sigmoid(score of chosen - score of rejected)")
        return None
    up = int(sum(rows["label"]))
    down = len(rows) - up
    if not up or not down:
        raise PerlError(
            f"All {len(rows):,} rows have a thumbs {'up' if up else 'down'}: there is nothing to tell apart",
            "add rows with the other label",
        )
    weight = {"auto": down / up, "none": 1.0}.get(str(wanted)) or float(wanted)
    balance = f"{up:,} up, {down:,} down ({up / len(rows):.1%} up)"
    prepared.run.note(f"kind: thumbs, binary cross-entropy; {balance}; --pos-weight {wanted}: {weight:.4g}")
    prepared.run.record.metrics |= {"train_share_thumbs_up": up / len(rows), "pos_weight": weight}
    return weight


def build_trainer(
    prepared: Prepared[settings.Reward], config: RewardConfig, rows: Dataset, weight: float | None
) -> Any:
    """TRL's trainer on the base with a head, an adapter that trains, or under --full everything."""
    source, values, tokenizer = prepared.source, prepared.settings, prepared.tokenizer
    set_seed(values.run.seed)  # head and adapter begin at random
    model: Any = loading.load_classifier(source, values.model, tokenizer.pad_token_id)
    loaded(prepared)
    if values.lora.full:
        model.float().requires_grad_(True)  # bfloat16 weights would round small updates away
    elif source.adapter:
        model = roles.load_adapter(model, source.adapter, trainable=True)
    else:
        model = roles.new_adapter(model, values.lora, "SEQ_CLS")
    options: dict[str, Any] = {"train_dataset": rows, "processing_class": tokenizer}
    trainer: Any
    with roles.unrounded(model):
        if weight is None:
            trainer = RewardTrainer(model, config, **options)
        else:
            trainer = ThumbsTrainer(model, config, data_collator=ThumbsCollator(tokenizer.pad_token_id), **options)
            trainer.pos_weight = weight
    roles.as_float32(trainer.model)
    roles.set_adapter_dropout(trainer.model, adapters.dropout_of(values.lora, "SEQ_CLS"))
    return trainer


class ThumbsCollator:
    """Pads rows of input_ids with their labels to one batch."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad = pad_token_id

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids, mask = padded([row["input_ids"] for row in rows], self.pad)
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([row["label"] for row in rows])}


class ThumbsTrainer(RewardTrainer):
    """TRL's reward trainer for thumbs: binary cross-entropy on sigmoid(score) (paper, section 3.1: pointwise)."""

    pos_weight = 1.0

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset  # rendered already, like TRL's own `chosen_ids` and `rejected_ids`

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns: Any = ["input_ids", "label"]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs, use_cache=False)
        logits = outputs.logits[:, 0].float()
        weight = torch.tensor(self.pos_weight, device=logits.device)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, labels, pos_weight=weight)
        self._count(inputs["attention_mask"], logits, labels)
        return (loss, outputs) if return_outputs else loss

    def _count(self, mask: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor) -> None:
        mode = "train" if scores.requires_grad else "eval"
        if mode == "train":
            self._total_train_tokens += int(self.accelerator.gather_for_metrics(mask.sum()).sum())
        found = self._metrics[mode]
        found["num_tokens"] = [self._total_train_tokens]
        right = ((scores > 0) == (labels > 0.5)).float()
        found["accuracy"].append(self.accelerator.gather_for_metrics(right).mean().item())
        found["mean_reward"].append(self.accelerator.gather_for_metrics(scores.detach()).mean().item())


def save(prepared: Prepared[settings.Reward], model: Any, folder: Path) -> None:
    """Write the adapter with its head, or the whole classifier after full tuning, and the tokenizer, into a folder."""
    if prepared.settings.lora.full:
        model.to(getattr(torch, device.dtype_name(prepared.settings.model)))
        model.save_pretrained(str(folder))
    else:
        roles.round_head(model, model.dtype)
        roles.save_adapter(model, folder)
    prepared.tokenizer.save_pretrained(str(folder))
    (prepared.run.folder / PROOF).unlink(missing_ok=True)  # of the weights before


def prove(prepared: Prepared[settings.Reward], rows: list[list[int]], wanted: list[float]) -> scorers.ClassifierScorer:
    """Load the saved folder afresh; raises RunFailed where its scores are not the trained model's."""
    run, trust = prepared.run, prepared.settings.model.trust_remote_code
    source = sources.locate(str(run.folder), trust_remote_code=trust)
    scorer = reward_model.load(source, prepared.settings.model)
    shift = max(abs(a - b) for a, b in zip(wanted, scorer(rows), strict=True))
    run.record.metrics["reload_shift"] = shift
    if not reward_model.is_same(shift, wanted):
        raise RunFailed(
            f"The saved reward model scores otherwise than the trained one: rewards move by up to {shift:.3g}"
        )
    kept = sorted(rows, key=len)[:PROOF_KEPT]  # short ones: every later use scores them again
    reward_model.write_proof(run.folder, kept, scorer(kept))
    run.note(f"Loaded afresh from {run.folder}: same scores on {len(rows)} rows (largest difference {shift:.2g}).")
    return scorer
