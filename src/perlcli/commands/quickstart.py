"""`perl quickstart`: the whole pipeline on the embedded default, narrated, ending with what was gained."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from perlcli import data, device, settings
from perlcli.commands import evaluate, reward, rl, sft
from perlcli.errors import Interrupted, RunFailed
from perlcli.run import plots
from perlcli.run.lifecycle import Run, recording
from perlcli.run.output_folder import check_output
from perlcli.run.record import RunRecord, find_record
from perlcli.terminal import say
from perlcli.text import plain_table

STORY = """\
A language model learns to take coffee orders, in the three phases of RLHF, by LoRA on one frozen base.
Success is counted by a program: does the call that the model writes match the order?"""
DATA = {
    "demonstrations": ("sft", "train"),
    "preferences": ("reward", "train"),
    "prompts": ("rl", "train"),
    "test-preferences": ("reward", "test"),
    "test-prompts": ("rl", "test"),
}
NEXT = """\
Next:
  perl eval --model {out}/rl --reward {out}/reward --output runs/eval      samples, policy against anchor
  perl rl --model {out}/sft --reward {out}/reward --beta 0.2 --output runs/rl     a stronger pull to the anchor
  perl reward --model HuggingFaceTB/SmolLM2-135M-Instruct --data pairs.jsonl      your own model and data"""


def run(given: settings.Quickstart) -> RunRecord | None:
    """SFT, reward, RL and evaluation on the embedded default; None for a dry run."""
    given = settings.resolve(given, {})
    settings.check(given)
    check_output(given)
    out = Path(str(given.run.output)).expanduser()
    say(STORY)
    if given.run.dry_run:
        say(f"Would run sft, reward, rl and eval on the embedded coffee base and data, into {out}.")
        return None
    whole = Run(given)
    with recording(whole):
        whole.record.device = device.describe(settings.ModelSettings())
        write_data(out / "data")
        try:
            found = stages(out, given)
        except Interrupted as stopped:
            stopped.hint = whole.resume_command  # not of the stage only
            raise
        whole.record.metrics = figures(found)
        whole.record.peak_memory_mb = device.peak_memory_mb()
        golds = [found[f"eval-{name}"].metrics["gold"] for name in ("base", "sft", "rl")]
        plots.bars(("base", "SFT", "RL"), golds, "Orders taken right, held-out", out / "plots" / "success.png")
    say(conclusion(whole.record, found, out))
    return whole.record


def write_data(folder: Path) -> None:
    """Write the world's rows as the JSONL that a user would bring."""
    folder.mkdir(exist_ok=True)
    for name, key in DATA.items():
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in data.EMBEDDED_ROWS[key]())


def stages(out: Path, given: settings.Quickstart) -> dict[str, RunRecord]:
    """Run every stage with the settings that its command would take, and say in a line what it gave."""
    found: dict[str, RunRecord] = {}
    steps = given.quickstart.max_steps
    length = {"max_steps": steps} if steps is not None else {}

    def stage(
        name: str, what: str, module: Any, kind: Any, said: Callable[[dict[str, Any]], str], **values: Any
    ) -> None:
        if what:
            say(f"\n{what}")
        values |= {"output": str(out / name), "seed": given.run.seed}
        before = find_record(str(out / name)) if given.quickstart.resume else None
        if before is not None and before.status == "finished":
            found[name] = before
            say(f"   {said(before.metrics)} (done before)")
            return
        with contextlib.redirect_stdout(io.StringIO()):  # a stage's own notes are in its record
            record = module.run(settings.build(kind, values | again(out / name, before, kind)))
        if record is None:
            raise RunFailed(f"The stage {name} gave no record")
        found[name] = record
        say(f"   {said(record.metrics)} ({record.elapsed_seconds:.0f} s)")

    policy, judge = str(out / "sft"), str(out / "reward")
    stage(
        "sft", "1. SFT: imitate 2,000 calls by a trainee barista, who forgets details", sft, settings.Sft,
        lambda m: f"loss on held-out calls {m['eval_loss']:.3f}", **length,
    )  # fmt: skip
    stage(
        "reward", "2. Reward: learn from 4,000 pairs which of two calls is better; 8 % of the labels are wrong",
        reward, settings.Reward, lambda m: f"picks the better of two held-out calls in {m['accuracy']:.1%}", **length,
    )  # fmt: skip
    stage(
        "rl", "3. RL: write calls and learn from that reward alone, anchored to SFT; one base serves all",
        rl, settings.Rl, lambda m: f"reward {m['first_reward']:.2f} -> {m['reward']:.2f}",
        model=policy, reward=judge, **length,
    )  # fmt: skip
    say("\n4. Evaluation: 400 orders that no stage has seen")
    for name, word, model in (("base", "base", None), ("sft", "SFT ", policy), ("rl", "RL  ", str(out / "rl"))):
        stage(f"eval-{name}", "", evaluate, settings.Eval, partial(_right, word), reward=judge, model=model)
    return found


def again(folder: Path, before: RunRecord | None, kind: Any) -> dict[str, Any]:
    """How a stage runs where an earlier call was stopped in it: training goes on, an evaluation starts over."""
    if before is None:
        shutil.rmtree(folder, ignore_errors=True)  # stopped before it had a record
        return {}
    return {"resume": settings.LATEST} if "resume" in settings.names(kind) else {"overwrite": True}


def _right(word: str, metrics: dict[str, Any]) -> str:
    return f"{word} {metrics['gold']:.1%} right"


def figures(found: dict[str, RunRecord]) -> dict[str, float]:
    """The pipeline's figures, one level deep."""
    metrics = {"reward_accuracy": found["reward"].metrics["accuracy"]}
    for name in ("base", "sft", "rl"):
        measured = found[f"eval-{name}"].metrics
        metrics |= {f"{name}_gold": measured["gold"], f"{name}_mean_reward": measured["mean_reward"]}
    return metrics


def conclusion(record: RunRecord, found: dict[str, RunRecord], out: Path) -> str:
    """The table base -> SFT -> RL, where the picture is, and what to type next."""
    rows = []
    for name, word in (("base", "base"), ("sft", "SFT"), ("rl", "RL")):
        m = found[f"eval-{name}"].metrics
        interval = f"{m['gold_low']:.1%} to {m['gold_high']:.1%}"
        divergence = f"{m['kl_k1_per_sequence']:.2f}" if "kl_k1_per_sequence" in m else "-"
        rows.append(
            (word, f"{m['gold']:.1%}", interval, f"{m['mean_reward']:.2f}", divergence, f"{m['mean_length']:.1f}")
        )
    header = ("", "orders right", "95 % interval", "mean reward", "KL to anchor", "tokens")
    table = plain_table(header, rows)
    picture = f"Picture: {out}/plots/success.png · {record.elapsed_seconds:.0f} s in all"
    return f"\n{table}\n\n{picture}\n\n{NEXT.format(out=out)}"
