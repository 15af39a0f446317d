"""The model card of a run."""

from __future__ import annotations

import re

from perlcli.run.files import MERGE
from perlcli.run.record import RunRecord
from perlcli.text import inline, markdown_table

HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
CARD_OF_ADAPTER = ["library_name: peft", "tags: [perl, lora, trl]"]


def card(record: RunRecord) -> str:
    """The run's model card, which replaces peft's template."""
    is_merge = record.command == MERGE
    name = record.model.get("base", "")
    is_of_hub = HUB_NAME.fullmatch(name) is not None
    kind = ["library_name: transformers", "tags: [perl, trl]"] if is_merge else CARD_OF_ADAPTER
    header = [*kind, *([f"base_model: {name}"] if is_of_hub else [])]
    done = f"{record.steps} steps, seed {record.seed}"
    if is_merge:
        done = (
            f"the adapter {inline(record.model['name'])} added to the base's weights: an ordinary model of transformers"
        )
    figures = [(inline(key), f"{value:.4g}") for key, value in record.metrics.items() if isinstance(value, int | float)]
    sources = [f"{role}: {inline(found['source'])} ({found['kept']} rows)" for role, found in record.data.items()]
    version = record.versions.get("perlcli", "")
    lines = [
        "---", *header, "---", "", f"# perl {record.command}", "",
        f"Made by `perl {record.command}` (perlcli {version}) on the base {inline(name)}.", "",
        *(f"- {source}" for source in sources), f"- {done}", "",
        markdown_table(("metric", "value"), figures), "",
        "`settings.yaml` repeats the run; `record.json` has every setting and version.", "",
    ]  # fmt: skip
    return "\n".join(lines)
