"""The code in a model card that loads a reward model whose head is on the causal model, without perlcli."""

from __future__ import annotations

import json
from collections.abc import Mapping

from perlcli.run import files
from perlcli.run.record import RunRecord

CAUSAL_HEAD = "causal_head"  # in a record's `model`: the class that loads the causal model, and its decoder's name

OF_ADAPTER = """\
import torch
from peft import PeftModel
from transformers import AutoTokenizer, {class}

folder, base = ".", {base}
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
model = {class}.from_pretrained(base{options})
model.score = torch.nn.Linear(model.config.get_text_config().hidden_size, 1, bias=False, dtype=model.dtype)
PeftModel.from_pretrained(model, folder).eval()  # puts the adapter and the head's weight into `model`
head = model.score.weight
"""
OF_MODEL = """\
from glob import glob

import torch
from safetensors import safe_open
from transformers import AutoTokenizer, {class}

folder = "."
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
model = {class}.from_pretrained(folder).eval()
for file in glob(f"{{folder}}/model*.safetensors"):
    with safe_open(file, "pt") as weights:
        if "score.weight" in weights.keys():
            head = weights.get_tensor("score.weight")
"""
SCORES = """\
texts = ["..."]  # prompt and answer, rendered as in samples.jsonl
batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
with torch.no_grad():
    hidden = model.{decoder}(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    last = batch["attention_mask"].sum(dim=1) - 1
    scores = torch.nn.functional.linear(hidden[range(len(last)), last].float(), head.float())[:, 0]
"""
WHY = (
    "The score is a linear layer, `score.weight`, that reads a text's last token. transformers has no class for it: "
    "load the causal language model and the layer."
)


def paragraphs(record: RunRecord) -> list[str]:
    """The paragraphs of a card that say how to load a head on the causal model; none for any other model."""
    names: Mapping[str, str] | None = record.model.get(CAUSAL_HEAD)
    if names is None:
        return []
    is_adapter = record.command != files.MERGE and not record.settings.get("full")
    precision = record.device.get("precision", "")
    options = f', dtype="{precision}"' if "bit" not in precision else ""
    start = OF_ADAPTER if is_adapter else OF_MODEL
    found = [WHY, _block(start, {**names, "base": str(record.model.get("base", "")), "options": options})]
    if is_adapter and "bit" in precision:
        found.append(
            f"It was trained on its base in {precision}: pass the same `quantization_config`, or scores shift."
        )
    return found


def example() -> str:
    """The code for an adapter on a base of the Hub, for the documentation."""
    base = "ibm-granite/granite-3.3-2b-base"
    values = {"class": "GraniteForCausalLM", "decoder": "model", "base": base, "options": ', dtype="bfloat16"'}
    return _block(OF_ADAPTER, values)


def _block(start: str, values: Mapping[str, str]) -> str:
    values = {**values, "base": json.dumps(values["base"])}
    return f"```python\n{start.format(**values)}{SCORES.format(**values)}```"
