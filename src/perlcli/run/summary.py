"""A record as text: a summary for the terminal, and the run's model card."""

from __future__ import annotations

import re
from typing import Any

from perlcli.run import files, loaders, metrics, next_steps
from perlcli.run.record import RunRecord
from perlcli.terminal import say
from perlcli.text import counted, inline, markdown_table, megabytes

SECONDS = "seconds_"
POLICIES = ("sft", "rl")  # commands that make one
HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


def show(record: RunRecord | None) -> None:
    """Print the summary of a finished run and what to type next; nothing for a dry run."""
    if record is not None:
        say("\n".join(filter(None, (text(record), next_steps.text(record)))))


def text(record: RunRecord) -> str:
    """A few lines with the record's figures and the run's folder."""
    merged = _merged(record.metrics)
    lines = [
        f"{metrics.words(key)}: {figure(key, value)}" for key, value in merged.items() if not key.startswith(SECONDS)
    ]
    spent = {key.removeprefix(SECONDS): value for key, value in merged.items() if key.startswith(SECONDS)}
    if spent:
        total = sum(spent.values()) or 1
        parts = [f"{name} {value:.3g} ({value / total:.0%})" for name, value in spent.items()]
        lines.append(f"seconds per step: {total:.3g} = {' + '.join(parts)}")
    facts = [f"{record.elapsed_seconds:.0f} s", _memory(record)]
    if record.steps:
        facts = [counted(record.steps, "step"), f"{record.tokens:,} tokens", *facts]
    if record.trainable_parameters:
        share = record.trainable_parameters / record.total_parameters
        facts.append(f"trained {record.trainable_parameters:,} of {record.total_parameters:,} parameters ({share:.2%})")
    return "\n".join([*lines, " · ".join(facts), f"Saved in {record.settings.get('output')}"])


def _memory(record: RunRecord) -> str:
    """The peak memory; on a GPU also the peaks of loading and of training, which `perl estimate` predicts apart."""
    peak, memory = f"peak memory {megabytes(record.peak_memory_mb)}", record.memory
    if record.device.get("type") != "cuda" or not {"loading_mb", "training_mb"} <= set(memory):
        return peak
    return f"{peak} (loading {megabytes(memory['loading_mb'])}, training {megabytes(memory['training_mb'])})"


def _merged(metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics, with intervals joined to their figures."""
    merged = {}
    for key, value in metrics.items():
        if key.endswith(("_low", "_high")) or value is None:
            continue
        low, high = metrics.get(f"{key}_low"), metrics.get(f"{key}_high")
        merged[key] = value if low is None or high is None else (value, low, high)
    return merged


def figure(key: str, value: Any) -> str:
    """A metric's value for a person to read: shares in per cent, with the interval after the figure."""
    if isinstance(value, tuple):
        return f"{figure(key, value[0])} (95 % interval {figure(key, value[1])} to {figure(key, value[2])})"
    if isinstance(value, float):
        return f"{value:.1%}" if metrics.is_share(key) else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def card(record: RunRecord) -> str:
    """The run's model card, which replaces peft's template."""
    name, version = record.model.get("base", ""), record.versions.get("perlcli", "")
    header = ["library_name: peft", "tags: [perl, lora, trl]"]
    done = f"{record.steps} steps, seed {record.seed}"
    if record.command == files.MERGE:
        header = ["library_name: transformers", "tags: [perl, trl]"]
        adapter = inline(record.model["name"])
        done = f"the adapter {adapter} added to the base's weights"
        if loaders.CAUSAL_HEAD not in record.model:
            done += ": an ordinary model of transformers"
    if HUB_NAME.fullmatch(name):
        header.append(f"base_model: {name}")
    sources = [f"- {role}: {inline(data['source'])} ({data['kept']} rows)\n" for role, data in record.data.items()]
    figures = [(inline(key), f"{value:.4g}") for key, value in record.metrics.items() if isinstance(value, int | float)]
    paragraphs = [
        "\n".join(["---", *header, "---"]),
        f"# perl {record.command}",
        f"Made by `perl {record.command}` (perlcli {version}) on the base {inline(name)}.",
        f"{''.join(sources)}- {done}",
        *loaders.paragraphs(record),
        markdown_table(("metric", "value"), figures),
        *_loading(record, name),
        "`settings.yaml` repeats the run; `record.json` has every setting and version.\n",
    ]
    return "\n\n".join(paragraphs)


def _loading(record: RunRecord, base: str) -> list[str]:
    """How plain transformers and peft load a policy that the run made; nothing for other runs."""
    kind = record.model.get("auto_class")
    if not kind or record.command not in (*POLICIES, files.MERGE) or "score_range" in record.metrics:
        return []
    if record.command == files.MERGE or record.settings.get("full"):
        lines = [f"from transformers import {kind}\n", f'model = {kind}.from_pretrained("FOLDER")']
    else:
        place = base if HUB_NAME.fullmatch(base) else "BASE"
        lines = ["from peft import PeftModel", f"from transformers import {kind}\n"]
        lines += [f'base = {kind}.from_pretrained("{place}")', 'model = PeftModel.from_pretrained(base, "FOLDER")']
    return ["\n".join(["```python", *lines, "```"])]
