"""A trial of a run, in a process that `training.trial` starts: builds the trainer, takes some steps, measures them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import SaveStrategy

from perlcli import settings, upstream
from perlcli.commands import reward, rl, sft
from perlcli.comparison.processes import end_with_parent
from perlcli.errors import PerlError
from perlcli.run import claim, files, out_of_memory
from perlcli.run.out_of_memory import OutOfMemory
from perlcli.settings.yaml import parse, read_config
from perlcli.training import policies, reward_model
from perlcli.training.dry_run import IDS
from perlcli.training.loop import clocks, without_casts
from perlcli.training.prepare import Prepared, prepare
from perlcli.training.rewards import find_all
from perlcli.training.rows import load_sides
from perlcli.training.trial import RESULT, SETTINGS, TASK


def main(folder: Path) -> None:
    """Read the task in a folder, and write what was measured next to it."""
    upstream.hush()
    result = measured(folder, json.loads((folder / TASK).read_text(encoding="utf-8")))
    files.write_whole(folder / RESULT, [json.dumps(result)])


def measured(folder: Path, task: Mapping[str, Any]) -> dict[str, Any]:
    """What the trial of a task found: its steps' seconds, that memory ran out, or an error that the user can fix."""
    begin, kind = time.perf_counter(), settings.COMMANDS[task["stage"]]
    try:
        given: Any = settings.build(kind, read_config(kind, folder / SETTINGS))
        trainer = TRAINERS[task["stage"]](prepare(given), longest=task["longest"])
        stopwatch = Stopwatch()
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(stopwatch)
        with without_casts(trainer):
            trainer.train()
    except Exception as error:
        if isinstance(error, OutOfMemory) or out_of_memory.failure(error) is not None:
            return {"fits": False, "seconds": [], "loading_seconds": 0.0}
        if isinstance(error, PerlError):
            return {"problem": error.problem, "hint": error.hint}
        raise
    finally:
        claim.release_all()
    return {"fits": True, "seconds": stopwatch.seconds[1:], "loading_seconds": stopwatch.starts[0] - begin}


class Stopwatch(TrainerCallback):
    """The seconds that each step takes."""

    def __init__(self) -> None:
        self.starts: list[float] = []
        self.seconds: list[float] = []

    def on_step_begin(self, *_: object, **__: object) -> None:
        self.starts.append(clocks()[0])

    def on_step_end(self, *_: object, **__: object) -> None:
        self.seconds.append(clocks()[0] - self.starts[-1])


def _of_sft(prepared: Prepared[settings.Sft], *, longest: bool) -> Any:  # noqa: ANN401
    config = _quiet(sft.trainer_args(prepared.settings), longest=longest)
    rows = sft.tokens(load_sides(prepared, "sft")[0], prepared, "train")
    return sft.build_trainer(prepared, config, _longest(rows, config) if longest else rows)


def _of_reward(prepared: Prepared[settings.Reward], *, longest: bool) -> Any:  # noqa: ANN401
    config = _quiet(reward.trainer_args(prepared.settings), longest=longest)
    rows = reward_model.table(load_sides(prepared, "reward")[0], prepared, "train")
    weight = reward.pos_weight(prepared, config, rows)
    return reward.build_trainer(prepared, config, _longest(rows, config) if longest else rows, weight)


def _of_rl(prepared: Prepared[settings.Rl], *, longest: bool) -> Any:  # noqa: ANN401
    config = _quiet(rl.trainer_args(prepared.settings), longest=False)
    rewards, anchor = find_all(prepared), policies.find_anchor(prepared)
    prompts = rl.load_prompts(prepared, config, load_sides(prepared, "rl")[0])
    if longest:  # and completions that never end early
        needed = int(config.generation_batch_size or 1) // int(config.num_generations or 1)
        prompts = sorted(prompts, key=lambda prompt: len(prompt[1]), reverse=True)[:needed]
        own = config.generation_kwargs or {}
        own = parse(own, "--set") if isinstance(own, str) else own
        config.generation_kwargs = {**own, "min_new_tokens": config.max_completion_length}  # type: ignore[dict-item]
    return rl.build_trainer(prepared, config, rewards, anchor, [row for row, _ in prompts])[0]


TRAINERS: dict[str, Callable[..., Any]] = {"sft": _of_sft, "reward": _of_reward, "rl": _of_rl}


def _quiet(config: Any, *, longest: bool) -> Any:  # noqa: ANN401
    """The config for a trial: nothing is saved. For the `longest` rows at most two passes per step, since more take no
    more memory."""
    config.save_strategy = SaveStrategy.NO
    if longest:
        config.gradient_accumulation_steps = min(config.gradient_accumulation_steps, 2)
    return config


def _longest(rows: Any, config: Any) -> Any:  # noqa: ANN401
    """The longest rows, as many as a step takes; all rows if TRL packs them."""
    if getattr(config, "packing", False):
        return rows
    names = [name for name in IDS if name in rows.column_names]
    lengths = [max(map(len, texts)) for texts in zip(*(rows[name] for name in names), strict=True)]
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    return rows.select(order[: config.per_device_train_batch_size * config.gradient_accumulation_steps])


if __name__ == "__main__":
    end_with_parent()
    main(Path(sys.argv[1]))
