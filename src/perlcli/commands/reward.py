"""`perl reward`: a reward model from pairs (chosen, rejected) or thumbs up / down, by LoRA and a scalar head."""

from __future__ import annotations

from functools import partial

from datasets import Dataset
from trl import RewardConfig

from perlcli import settings
from perlcli.errors import PerlError
from perlcli.model import roles
from perlcli.run import plots
from perlcli.run.files import METRICS
from perlcli.run.lifecycle import recording
from perlcli.run.record import RunRecord
from perlcli.training import guards, reward_model, reward_trainer
from perlcli.training.loop import describe, train
from perlcli.training.prepare import Prepared, prepare, preview, require
from perlcli.training.reward_trainer import Proof
from perlcli.training.rows import load_sides
from perlcli.training.trl_config import trl_config


def run(given: settings.Reward) -> RunRecord | None:
    """Train a reward model and prove that its folder gives the same scores; None for a dry run."""
    prepared = prepare(given)
    require(prepared, policy=False)
    config = trainer_args(prepared.settings)
    rows, held_out = load_sides(prepared, "reward")
    train_set = reward_model.table(rows, prepared, "train")
    eval_rows = reward_model.tokens(held_out, prepared, "eval") if held_out else None
    weight = pos_weight(prepared, config, train_set)
    if prepared.is_dry:
        preview(prepared, config)
        return None
    with recording(prepared.run) as run:
        proof = learn(prepared, config, train_set, weight)
        scorer = reward_trainer.prove(prepared, proof)
        run.record.metrics |= reward_model.measure(prepared, scorer, eval_rows)
        plots.curves("reward", run.folder / METRICS, run.folder / "plots" / "training.png")
    return run.record


def trainer_args(given: settings.Reward) -> RewardConfig:
    """The TRL config of these settings."""
    return trl_config(RewardConfig, given, {"max_length": given.data.max_length})


def pos_weight(prepared: Prepared[settings.Reward], config: RewardConfig, rows: Dataset) -> float | None:
    """The weight of thumbs-up rows in the loss, noted with the balance that it corrects; None for pairs. Raises
    PerlError if all rows have the same label, and for a TRL setting that only applies to pairs."""
    wanted = prepared.settings.thumbs.pos_weight
    if "label" not in rows.column_names:
        prepared.run.note("loss on pairs: -log sigmoid(score of chosen - score of rejected)")
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
        raise PerlError(
            "--set center_rewards_coefficient only applies to pairs: the labels of thumbs centre the scores"
        )
    return weight


def learn(prepared: Prepared[settings.Reward], config: RewardConfig, rows: Dataset, weight: float | None) -> Proof:
    """Train and save; gives some rows with the scores of the trained model, which is freed when this returns."""
    trainer = reward_trainer.build_trainer(prepared, config, rows, weight)
    describe(trainer, prepared.run)
    role, name = ("", "reward model") if prepared.settings.lora.full else (roles.POLICY, "reward adapter")
    weights = guards.Watch(lambda: {name: guards.checksum(trainer.model, role)}, trained=(name,))
    train(trainer, prepared.run, weights.before_saving(partial(reward_trainer.save, prepared)))
    weights.check()
    return reward_trainer.score_proof(prepared, trainer, rows)
