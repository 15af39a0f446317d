"""`perl quickstart`: the complete pipeline on the embedded default, narrated, with what it gained at the end."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perlcli import data, device, settings
from perlcli.commands import evaluate, reward, rl, sft
from perlcli.errors import Interrupted
from perlcli.run import next_steps, plots
from perlcli.run.lifecycle import Run, recording
from perlcli.run.output_folder import check_output
from perlcli.run.record import RunRecord, find_record
from perlcli.terminal import say
from perlcli.text import plain_table

STORY = """\
A language model learns to take coffee orders, in the three stages of RLHF, with LoRA on one frozen base.
A program counts the successes: does the call that the model writes match the order?"""
DATA = {
    "demonstrations": ("sft", "train"),
    "preferences": ("reward", "train"),
    "prompts": ("rl", "train"),
    "test-preferences": ("reward", "test"),
    "test-prompts": ("rl", "test"),
}
TITLES = {
    "sft": "1. SFT: imitate 2,000 calls by a trainee barista, who forgets details",
    "reward": "2. Reward: learn from 4,000 pairs which of two calls is better; 8 % of the labels are wrong",
    "rl": "3. RL: write calls and learn only from that reward, anchored to the SFT policy; all roles share one base",
    "eval": "4. Evaluation: 400 orders that no stage has seen",
}
POLICIES = {"base": "base", "sft": "SFT", "rl": "RL"}
Values = dict[str, Any]  # settings by name


def run(given: settings.Quickstart) -> RunRecord | None:
    """SFT, reward, RL and evaluation on the embedded default; None for a dry run."""
    given = settings.resolve(given, {})
    settings.check(given)
    check_output(given)
    out = Path(str(given.run.output)).expanduser()
    say(STORY)
    pipeline = Run(given)
    device.spare_threads()
    pipeline.note_device(settings.ModelSettings(), takes_dtype=False)  # it has no --dtype
    if given.run.dry_run:
        say(f"Would run sft, reward, rl and eval on the embedded coffee base and data, into {out}.")
        return None
    with recording(pipeline):
        write_data(out / "data")
        try:
            records = run_stages(out, given)
        except Interrupted as stopped:
            # not how the stage is resumed: the pipeline keeps the stages that have finished
            stopped.problem, stopped.hint, stopped.is_saved = "Stopped", pipeline.resume_command, True
            raise
        pipeline.record.metrics = figures(records)
        pipeline.record.peak_memory_mb = max(record.peak_memory_mb for record in records.values())
        golds = [records[f"eval-{name}"].metrics["gold"] for name in POLICIES]
        plots.bars(tuple(POLICIES.values()), golds, "Orders taken right, held-out", out / "plots" / "success.png")
    say(conclusion(pipeline.record, records, out))
    return pipeline.record


def write_data(folder: Path) -> None:
    """Write the embedded rows as JSONL, the way a user would bring them."""
    folder.mkdir(exist_ok=True)
    for name, key in DATA.items():
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in data.EMBEDDED_ROWS[key]())


@dataclass(frozen=True)
class Pipeline:
    """Runs stages into folders of `out`, and keeps their records by name."""

    out: Path
    given: settings.Quickstart
    records: dict[str, RunRecord] = field(default_factory=dict)

    def stage(self, name: str, run: Callable[[Any], RunRecord | None], kind: type, values: Values) -> str:
        """Run a stage with these settings, unless it is finished already; gives how long it took, in words."""
        folder = str(self.out / name)
        before = find_record(folder) if self.given.quickstart.resume else None
        if before is not None and before.status == "finished":
            self.records[name] = before
            return "already done"
        more: Values = {"output": folder, "seed": self.given.run.seed}
        if before is None:
            shutil.rmtree(folder, ignore_errors=True)  # interrupted before it had a record
        else:  # interrupted: training resumes, an evaluation starts again
            more |= {"resume": settings.LATEST} if "resume" in settings.names(kind) else {"overwrite": True}
        with contextlib.redirect_stdout(io.StringIO()):  # a stage's own notes are in its record
            record = run(settings.build(kind, values | more))
        assert record is not None  # only a dry run has none
        self.records[name] = record
        return f"{record.elapsed_seconds:.0f} s"


def run_stages(out: Path, given: settings.Quickstart) -> dict[str, RunRecord]:
    """Run every stage with the settings that its command would take, and print a line on each; gives their records."""
    pipeline = Pipeline(out, given)
    records, steps = pipeline.records, given.quickstart.max_steps
    length: Values = {"max_steps": steps} if steps is not None else {}
    policy, judge = str(out / "sft"), str(out / "reward")
    say(f"\n{TITLES['sft']}")
    took = pipeline.stage("sft", sft.run, settings.Sft, length)
    say(f"   loss on held-out calls {records['sft'].metrics['eval_loss']:.3f} ({took})")
    say(f"\n{TITLES['reward']}")
    took = pipeline.stage("reward", reward.run, settings.Reward, length)
    say(f"   picks the better of two held-out calls {records['reward'].metrics['accuracy']:.1%} of the time ({took})")
    say(f"\n{TITLES['rl']}")
    took = pipeline.stage("rl", rl.run, settings.Rl, {"model": policy, "reward": judge, **length})
    metrics = records["rl"].metrics
    say(f"   reward {metrics['first_reward']:.2f} -> {metrics['reward']:.2f} ({took})")
    say(f"\n{TITLES['eval']}")
    for name, model in (("base", None), ("sft", policy), ("rl", str(out / "rl"))):
        took = pipeline.stage(f"eval-{name}", evaluate.run, settings.Eval, {"reward": judge, "model": model})
        say(f"   {POLICIES[name]:<4} {records[f'eval-{name}'].metrics['gold']:.1%} right ({took})")
    return records


def figures(records: Mapping[str, RunRecord]) -> dict[str, float]:
    """The pipeline's key figures, in one flat dictionary."""
    metrics = {"reward_accuracy": records["reward"].metrics["accuracy"]}
    for name in POLICIES:
        measured = records[f"eval-{name}"].metrics
        metrics |= {f"{name}_gold": measured["gold"], f"{name}_mean_reward": measured["mean_reward"]}
    return metrics


def conclusion(record: RunRecord, records: Mapping[str, RunRecord], out: Path) -> str:
    """The table of base, SFT and RL, where the picture is, and what to type next."""
    rows = [row_of(name, records[f"eval-{stage}"].metrics) for stage, name in POLICIES.items()]
    table = plain_table(("", "orders right", "95 % interval", "mean reward", "KL to anchor", "tokens"), rows)
    picture = f"Picture: {out}/plots/success.png · {record.elapsed_seconds:.0f} s in all"
    return f"\n{table}\n\n{picture}\n\n{next_steps.after_quickstart(out)}"


def row_of(name: str, metrics: Mapping[str, float]) -> tuple[str, ...]:
    """A policy's row in the table; a base has no anchor and so no KL."""
    interval = f"{metrics['gold_low']:.1%} to {metrics['gold_high']:.1%}"
    kl = metrics.get("kl_k1_per_sequence")
    distance = "-" if kl is None else f"{round(kl, 2) + 0.0:.2f}"  # + 0.0: not -0.00
    reward_mean, length = f"{metrics['mean_reward']:.2f}", f"{metrics['mean_length']:.1f}"
    return name, f"{metrics['gold']:.1%}", interval, reward_mean, distance, length
