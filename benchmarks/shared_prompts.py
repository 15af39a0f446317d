"""What shared prompts save in learning, over lengths of prompts and completions and completions per prompt.

    python benchmarks/shared_prompts.py --model FOLDER

Each cell is a forward and backward pass of the policy's log-probabilities, as `perl rl` computes them: CPU seconds, and
the most bytes of tensors that it holds at once next to the weights, with and without sharing, in one process and in
turns. Writes a table into results/ and a picture into docs/.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from statistics import median
from typing import Any

import measured
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer import add_fused_lm_head

from perlcli import upstream
from perlcli.memory.tracking import Live
from perlcli.model.shared_prompts import Sharer
from perlcli.run import plots
from perlcli.training.logits import OnlyCompletions

HERE = Path(__file__).resolve().parent
PROMPTS, COMPLETIONS, GENERATIONS = (32, 128, 512), (32, 128), (2, 4, 8)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def policy(name: str, layers: int | None) -> Any:
    """The model, cut to its first layers, with the adapter of `perl rl`'s default."""
    config = AutoConfig.from_pretrained(name)
    config.num_hidden_layers = layers or config.num_hidden_layers
    model = AutoModelForCausalLM.from_pretrained(name, config=config, dtype=torch.float32)
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    return get_peft_model(model, LoraConfig(r=16, target_modules=TARGETS, task_type="CAUSAL_LM")).train()


def step(model: Any, sharer: Sharer, ids: torch.Tensor, width: int) -> None:
    """A forward and backward pass over the log-probabilities of completions, the last `width` columns."""
    labels = ids.clone()
    labels[:, :-width] = -100
    called = OnlyCompletions(model, width)
    with sharer.columns(ids.shape[1] - width):
        found = called(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, fused_lm_head=True)
    found.log_probs.sum(1).mean().backward()
    model.zero_grad()


def cell(model: Any, rows: int, prompt: int, width: int, generations: int, repeats: int) -> dict[str, Any]:
    """CPU seconds and bytes of one cell, with (True) and without sharing (False)."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 500, (rows // generations, prompt), generator=generator)
    written = torch.randint(3, 500, (rows, width), generator=generator)
    ids = torch.cat([prompts.repeat_interleave(generations, 0), written], dim=1)
    sharers = {is_on: Sharer(model, is_on=is_on) for is_on in (True, False)}
    sharers[True].try_out()
    found: dict[str, Any] = {"prompt": prompt, "completion": width, "generations": generations}
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _, (is_on, sharer) in itertools.product(range(repeats), sharers.items()):
        start = time.process_time()
        step(model, sharer, ids, width)
        seconds[is_on].append(time.process_time() - start)
    for is_on, sharer in sharers.items():
        name = "shared" if is_on else "separate"
        live = Live()
        live.ignore([*model.parameters(), *model.buffers()])
        with live:
            step(model, sharer, ids, width)
        most = max(itertools.accumulate(size for _, size, _ in live.events))
        found[name] = {"seconds": median(seconds[is_on]), "mb": most / 1e6}
    return found | {name: found["shared"][name] / found["separate"][name] for name in ("seconds", "mb")}


def table(cells: list[dict[str, Any]]) -> str:
    """The cells as Markdown."""
    heads = ["prompt", "completion", "completions per prompt", "CPU s", "shared", "ratio", "MB", "shared", "ratio"]
    rows = []
    for one in cells:
        place = [str(one[name]) for name in ("prompt", "completion", "generations")]
        own, other = one["separate"], one["shared"]
        rows.append([*place, f"{own['seconds']:.2f}", f"{other['seconds']:.2f}", f"{one['seconds']:.2f}"])
        rows[-1] += [f"{own['mb']:,.0f}", f"{other['mb']:,.0f}", f"{one['mb']:.2f}"]
    return measured.markdown(heads, rows)


def draw(cells: list[dict[str, Any]], target: Path) -> None:
    """The ratios by prompt length, a line for each number of completions and their length."""
    figure, panels = plots.new_figure(2)
    for axis, (name, title) in zip(panels, (("seconds", "CPU time"), ("mb", "memory")), strict=True):
        for width, generations in itertools.product(COMPLETIONS, GENERATIONS):
            line = [one for one in cells if (one["completion"], one["generations"]) == (width, generations)]
            style = "-" if width == COMPLETIONS[0] else "--"
            color = f"C{GENERATIONS.index(generations)}"
            label = f"{generations} x {width} tokens"
            axis.plot([one["prompt"] for one in line], [one[name] for one in line], style, color=color, label=label)
        axis.set_xscale("log", base=2)
        axis.set_xticks(PROMPTS, [str(prompt) for prompt in PROMPTS])
        axis.set_ylim(0, 1.05)
        plots.label_axis(axis, f"{title}, shared / separate", "tokens of the prompt", False)
        axis.legend(fontsize="small")
    plots.save(figure, target)


def main() -> None:
    """Measures, saves and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="folder of a model whose decoder has q_proj, k_proj, v_proj and o_proj")
    add("--layers", type=int, help="cut the model to so many layers, to save time (default: all)")
    add("--rows", type=int, default=8, help="completions in a pass")
    add("--repeats", type=int, default=3, help="timed passes of each kind")
    add("--output", type=Path, default=HERE / "results" / "cpu-shared-prompts", help="path without extension")
    add("--picture", type=Path, default=HERE.parent / "docs" / "shared-prompts.png")
    given = parser.parse_args()
    upstream.hush_bars()
    model = policy(given.model, given.layers)
    cells = []
    for prompt, width, generations in itertools.product(PROMPTS, COMPLETIONS, GENERATIONS):
        cells.append(cell(model, given.rows, prompt, width, generations, given.repeats))
        one = cells[-1]
        print(prompt, width, generations, f"time {one['seconds']:.2f}, memory {one['mb']:.2f}", flush=True)
    about = measured.described("benchmarks/shared_prompts.py", threads=torch.get_num_threads())
    measured.write(given.output, {"about": about, "cells": cells}, table(cells))
    draw(cells, given.picture)


if __name__ == "__main__":
    main()
