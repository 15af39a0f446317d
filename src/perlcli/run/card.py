"""A run's model card: what it is, data, training, results with verdicts, how to load it, limits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perlcli import coffee
from perlcli.redaction import hidden
from perlcli.run import files, lineage, loaders, setup, summary
from perlcli.run.loaders import HUB_NAME
from perlcli.run.record import RunRecord
from perlcli.text import counted, inline, markdown_table

PAPER = "https://arxiv.org/abs/2403.10704"
NAMES = {"sft": "SFT policy", "reward": "Reward model", "rl": "RL policy"}
TAGS = {"sft": ["sft"], "reward": ["reward-model"], "rl": ["rlhf"]}
DOES = {
    "sft": "A language model fine-tuned on demonstrations (SFT).",
    "reward": "A reward model: it gives a text one score, higher for answers that people would prefer.",
    "rl": "A policy trained by reinforcement learning (RLHF) on a reward, with a KL penalty to its anchor.",
}
# A source of rows with this end was a file, also if it has the form of a Hub id.
FILE = re.compile(r"(?i)\.(jsonl?|csv|tsv|parquet|arrow|xlsx?|txt|ya?ml|gz|zst|zip)$")
PATH = re.compile(r"(?<![\w/:.~])(?:~|\.{1,2})?/(?:[^\s/,;:'\"()]+/)*([^\s/,;:'\"()]+)/?")
CITATION = """\
```bibtex
@article{sidahmed2024perl,
  title   = {Parameter Efficient Reinforcement Learning from Human Feedback},
  author  = {Sidahmed, Hakim and others},
  journal = {arXiv preprint arXiv:2403.10704},
  year    = {2024}
}
```"""


def text(record: RunRecord) -> str:
    """The run's model card in Markdown, which replaces peft's template. It names no folder of the user's: of a local
    path only the last part is shown."""
    trained = _trained(record)
    stage = trained.command if trained is not None else ""
    base = _public(str(record.model.get("base", "")), record)
    sections = {
        "": _introduction(record, trained),
        "Data": _data(trained),
        "Training": _training(record, trained),
        "Results": _results(record),
        "How to load it": "\n\n".join(loaders.paragraphs(record)),
        "Limits": _limits(record, trained),
        "How to repeat it": _repeat(record),
        "Citation": CITATION,
    }
    title = NAMES.get(stage) or ("Reward model" if loaders.is_reward(record) else "Policy")
    merged = ", merged" if record.command == files.MERGE else ""
    on_base = f" on {Path(base).name}" if base else ""
    parts = [_front(record, stage), f"# {inline(title + on_base + merged)}"]
    for name, content in sections.items():
        if content:
            parts.append(f"## {name}\n\n{content}" if name else content)
    return hidden("\n\n".join(parts) + "\n")


def _trained(record: RunRecord) -> RunRecord | None:
    """The record of the training: of a merged model that of the adapter's run, if it is still there."""
    if record.command != files.MERGE:
        return record
    return lineage.record_of(record.settings.get("adapter"))


def _front(record: RunRecord, stage: str) -> str:
    """The metadata that the Hub reads."""
    import yaml

    base, is_adapter = str(record.model.get("base", "")), loaders.is_adapter(record)
    trained = _trained(record)
    found: dict[str, Any] = {"library_name": "peft" if is_adapter else "transformers"}
    if HUB_NAME.fullmatch(base):
        found |= {"base_model": base, "base_model_relation": "adapter" if is_adapter else "finetune"}
    found["pipeline_tag"] = "text-classification" if loaders.is_reward(record) else "text-generation"
    datasets = sorted(_hub_data(trained)) if trained is not None else []
    found |= {"datasets": datasets} if datasets else {}
    found["tags"] = ["perl", *(["lora"] if is_adapter else []), "trl", *TAGS.get(stage, [])]
    return f"---\n{yaml.safe_dump(found, sort_keys=False)}---"


def _hub_data(record: RunRecord) -> set[str]:
    """The data sets of a run that are on the Hub."""
    names = {str(record.settings.get(name) or "") for name in ("data", "eval_data")} - {"", "coffee"}
    return {name for name in names if _is_hub_name(name)}


def _is_hub_name(name: str) -> bool:
    """Whether a name that a user gave leads to the Hub, and to no file of the user's."""
    return HUB_NAME.fullmatch(name) is not None and not FILE.search(name) and not Path(name).expanduser().exists()


def _public(words: str, record: RunRecord) -> str:
    """A sentence with only the last part of each local path."""
    for place in sorted(_places(record), key=len, reverse=True):
        words = words.replace(place, Path(place).name)
    return PATH.sub(r"\1", words)


def _places(record: RunRecord) -> set[str]:
    """The local paths that a record names."""
    named: set[str] = set()
    for value in [*record.settings.values(), *record.model.values(), *record.model.get("rewards", {})]:
        named |= {item for item in (value if isinstance(value, list | tuple) else (value,)) if isinstance(item, str)}
    named |= {str(data.get("source", "")) for data in record.data.values()}
    return {name for name in named if "/" in name and "://" not in name and not _is_hub_name(name) and Path(name).name}


def _introduction(record: RunRecord, trained: RunRecord | None) -> str:
    name, version = record.model.get("base", ""), record.versions.get("perlcli", "")
    what = DOES.get(trained.command if trained is not None else "", "")
    if record.command == files.MERGE:
        adapter = _public(str(record.model.get("name", "")), record)
        how = f"The adapter {adapter} added to the weights of its base"
        what = f"{what} " if what else ""
        kind = "" if loaders.CAUSAL_HEAD in record.model else ": an ordinary model of transformers"
        said = f"{what}{how}, {_public(name, record)}{kind}."
    else:
        said = f"{what} Trained with {_method(record)} from the base {_public(name, record)}.".strip()
    return f"{inline(said)} Made by `perl {record.command}` (perlcli {version}), after the paper [PERL]({PAPER})."


def _method(record: RunRecord) -> str:
    """How the weights were trained, in words."""
    values = record.settings
    if values.get("full"):
        return "full tuning"
    if values.get("peft"):
        return "an adapter by --peft"
    return "DoRA" if values.get("use_dora") else "LoRA"


def _data(record: RunRecord | None) -> str:
    if record is None:
        return ""
    described = setup.described(record)
    lines = [
        f"- {name}: {inline(_public(described[name], record))}" for name in setup.ROLES.values() if name in described
    ]
    for role, data in record.data.items():
        lengths = data.get("tokens") or {}
        if "max" in lengths:
            lines.append(f"- tokens per row, {role}: median {lengths.get('p50', '?')}, longest {lengths['max']}")
        lines += [
            f"- {role}: {_left_out(dropped)} left out: {inline(reason)}"
            for reason, dropped in data.get("dropped", {}).items()
        ]
        up_down = data.get("labels") or {}
        if up_down:
            lines.append(
                f"- labels, {role}: " + ", ".join(f"{count:,} {inline(str(k))}" for k, count in up_down.items())
            )
    if "rendering" in described:
        lines.append(f"- rendering: {inline(described['rendering'])}")
    return "\n".join(lines)


def _left_out(dropped: Mapping[str, Any]) -> str:
    """How many rows were left out for a reason, as the data report has it."""
    return counted(int(dropped.get("count", 0)), "row")


def _training(record: RunRecord, trained: RunRecord | None) -> str:
    if trained is None:
        return ""
    values, described = trained.settings, setup.described(trained)
    rank = values.get("lora_r")
    has_lora = rank and not values.get("full") and not values.get("peft")
    rate = values.get("learning_rate")
    known = {
        "adapter": f"{_method(trained)}, r={rank}, alpha={values.get('lora_alpha')}" if has_lora else _method(trained),
        "modules": str(values.get("lora_target_modules") or "") if has_lora else "",
        "precision of the base": str(trained.device.get("precision") or ""),
        "steps": f"{trained.steps:,}" if trained.steps else "",
        "learning rate": f"{rate:g}" if isinstance(rate, int | float) else "",
        **{name: words for name, words in described.items() if name not in {*setup.ROLES.values(), "rendering"}},
        "seed": str(trained.seed),
        "trained parameters": f"{trained.trainable_parameters:,} of {trained.total_parameters:,}"
        if trained.trainable_parameters
        else "",
    }
    rows = [(name, inline(_public(words, trained))) for name, words in known.items() if words]
    table = markdown_table(("setting", "value"), rows)
    if record is not trained:
        return f"Of the adapter that was merged:\n\n{table}"
    return table


def _results(record: RunRecord) -> str:
    """The verdicts, the figures with their intervals, and what is known of the rewards."""
    lines = [f"- {inline(_public(verdict, record))}" for verdict in record.verdicts]
    for name, reward in lineage.rewards_unsaid(record).items():
        lines += [f"- {inline(_public(f'The reward {name}: {line}', record))}" for line in summary.judged(reward)]
    rows = [(inline(_public(name, record)), inline(value)) for name, value in summary.figures(record)]
    parts = ["\n".join(lines), markdown_table(("metric", "value"), rows) if rows else ""]
    if record.command == "rl" and rows:
        parts.append("Figures of RL are means over the last ten steps, on training prompts.")
    trained = _trained(record)
    if record.command == files.MERGE and trained is not None and trained is not record:
        judged = [f"- {inline(_public(verdict, trained))}" for verdict in summary.judged(trained)]
        parts.insert(0, "\n".join(judged))
        parts.insert(len(parts) - 1, "The merged model compared with the adapter:" if rows else "")
    return "\n\n".join(filter(None, parts))


def _limits(record: RunRecord, trained: RunRecord | None) -> str:
    """What the figures don't show, and what to know before others get the folder."""
    lines = ["It has the limits, the biases and the licence terms of its base and its data. Its safety was not tested."]
    if trained is not None and trained.command in NAMES and "eval" not in trained.data:
        lines.append("No held-out rows were measured in training: the figures say nothing about new texts.")
    if loaders.is_reward(record):
        is_thumbs = trained is not None and any(data.get("labels") for data in trained.data.values())
        zero = (
            "A score above 0 means a thumbs up"
            if is_thumbs
            else "Scores have no scale and no zero: compare answers to one prompt"
        )
        lines.append(f"{zero}. Texts must be rendered as in training.")
    if trained is not None and trained.command == "rl":
        lines.append(
            "The reward only imitates people's judgement: a policy can raise it without getting better. Read samples."
        )
    if trained is not None and trained.model.get("base") == coffee.NAME:
        lines.append("The base is a toy that only knows coffee orders.")
    published = {"reward": "`samples.jsonl` and `proof.json` contain rows", "sft": "`samples.jsonl` contains rows"}
    if record.command in published:
        lines.append(f"{published[record.command]} of the data: look at them before you publish this folder.")
    return "\n".join(f"- {line}" for line in lines)


def _repeat(record: RunRecord) -> str:
    words = f"```console\n$ perl {record.command} --config settings.yaml --output DIR\n```"
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    parts = [words, f"Versions: {inline(versions)}." if versions else ""]
    parts.append("`settings.yaml` has every option as resolved, `record.json` also the results, versions and checks.")
    return "\n\n".join(filter(None, parts))
