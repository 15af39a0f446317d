"""The code in a model card that loads what a run saved, with plain transformers and peft."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from perlcli import coffee
from perlcli.run import files, lineage
from perlcli.run.record import RunRecord

CAUSAL_HEAD = "causal_head"  # in a record's `model`: the class that loads the causal model, and its decoder's name
POLICIES = ("sft", "rl")  # commands that make one
HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")

POLICY = """\
tokenizer = AutoTokenizer.from_pretrained(folder{trust})
{load}
{prompt}
batch = batch.to(model.device)
written = model.generate(**batch, do_sample=True, temperature={temperature}, max_new_tokens={length})
print(tokenizer.decode(written[0, batch["input_ids"].shape[1]:], skip_special_tokens=True))
"""
CHAT = """\
messages = [{{"role": "user", "content": "..."}}]
batch = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True{kwargs}
)"""
TEXT = 'batch = tokenizer("...", return_tensors="pt")'

CLASSIFIER = """\
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right"{trust})
{load}
texts = ["..."]  # prompt and answer, rendered as in samples.jsonl
batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt").to(model.device)
with torch.no_grad():
    scores = model(**batch).logits[:, 0]
"""

OF_ADAPTER = """\
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right"{trust})
model = {class}.from_pretrained(base{options})
model.score = torch.nn.Linear(
    model.config.get_text_config().hidden_size, 1, bias=False, dtype=model.dtype, device=model.device
)
PeftModel.from_pretrained(model, folder).eval()  # puts the adapter and the head's weight into `model`
head = model.score.weight
"""
OF_MODEL = """\
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right"{trust})
model = {class}.from_pretrained(folder{options}).eval()
for file in glob(f"{{folder}}/model*.safetensors"):
    with safe_open(file, "pt") as weights:
        if "score.weight" in weights.keys():
            head = weights.get_tensor("score.weight")
"""
SCORES = """\
texts = ["..."]  # prompt and answer, rendered as in samples.jsonl
batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt").to(model.device)
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
    """The paragraphs of a card that say how to load what the run saved; none for a run that saved no model."""
    head: Mapping[str, str] | None = record.model.get(CAUSAL_HEAD)
    if head is not None:
        found = [WHY, _fenced(_head_code(record, head))]
    elif is_reward(record):
        found = [_fenced(_classifier_code(record))]
    elif record.model.get("auto_class") and record.command in (*POLICIES, files.MERGE):
        found = [_fenced(_policy_code(record))]
    else:
        return []
    if quantised(record):
        found.append(
            f"It was trained on its base in {record.device.get('precision')}: pass the same `quantization_config`, or "
            "its outputs shift."
        )
    return found


def is_reward(record: RunRecord) -> bool:
    """Whether a run made a reward model: by training, or by merging one."""
    return record.command == "reward" or (record.command == files.MERGE and "score_range" in record.metrics)


def is_adapter(record: RunRecord) -> bool:
    """Whether a run saved an adapter, not a complete model."""
    return record.command != files.MERGE and not record.settings.get("full")


def quantised(record: RunRecord) -> str:
    """The option of transformers by which the base of a run's adapter was quantised; empty if it was not."""
    bits = str(record.device.get("precision", "")).removesuffix("-bit")
    return f"load_in_{bits}bit" if bits in ("4", "8") and is_adapter(record) else ""


def _head_code(record: RunRecord, names: Mapping[str, str]) -> str:
    values = {**names, "options": _options(record), "trust": _trust(record)}
    if is_adapter(record):
        imports = _imports(record, "AutoTokenizer", names["class"], is_torch=True)
        return imports + _places(record) + (OF_ADAPTER + SCORES).format(**values)
    imports = (
        f"import torch\nfrom safetensors import safe_open\nfrom transformers import AutoTokenizer, {names['class']}"
    )
    return f"from glob import glob\n\n{imports}\n\n" + _places(record) + (OF_MODEL + SCORES).format(**values)


def _classifier_code(record: RunRecord) -> str:
    kind = "AutoModelForSequenceClassification"
    options = f"{_options(record)}, num_labels=1, pad_token_id=tokenizer.pad_token_id"
    code = CLASSIFIER.format(load=_load(record, kind, options), trust=_trust(record))
    return _imports(record, kind, "AutoTokenizer", is_torch=True) + _places(record) + code


def _policy_code(record: RunRecord) -> str:
    kind, source = str(record.model["auto_class"]), record
    found = lineage.trainer(record) if record.command == files.MERGE else None
    if found is not None:
        source = found[1]  # which knows how it samples and renders
    rendering = record.model.get("rendering") or source.model.get("rendering") or {}
    variables = rendering.get("chat_template_kwargs") or {}
    prompt = CHAT.format(kwargs=f", **{dict(variables)!r}" if variables else "") if rendering.get("chat") else TEXT
    code = POLICY.format(
        load=_load(record, kind, _options(record)),
        prompt=prompt,
        temperature=float(source.settings.get("temperature") or 0.7),  # transformers refuses an int
        length=source.settings.get("max_completion_length") or 128,
        trust=_trust(record),
    )
    return _imports(record, kind, "AutoTokenizer", is_torch=bool(quantised(record))) + _places(record) + code


def _load(record: RunRecord, kind: str, options: str) -> str:
    """The lines that load the model, an adapter on its base."""
    if not is_adapter(record):
        return f"model = {kind}.from_pretrained(folder{options}).eval()"
    load = f"model = {kind}.from_pretrained(base{options})"
    if len(load) > 100:
        load = f"model = {kind}.from_pretrained(\n    base{options}\n)"
    return f"{load}\nmodel = PeftModel.from_pretrained(model, folder).eval()"


def _options(record: RunRecord) -> str:
    """How `from_pretrained` loads the base in the precision of the run."""
    precision = str(record.device.get("precision", ""))
    if quantised(record):
        return f', quantization_config=quantization, dtype=torch.{_compute_dtype(record)}, device_map="auto"' + _trust(
            record
        )
    return (f', dtype="{precision}"' if precision else "") + _trust(record)


def _compute_dtype(record: RunRecord) -> str:
    dtype = record.settings.get("dtype")
    return str(dtype) if dtype not in (None, "auto") else "bfloat16"


def _trust(record: RunRecord) -> str:
    return ", trust_remote_code=True" if record.settings.get("trust_remote_code") else ""


def _imports(record: RunRecord, *names: str, is_torch: bool) -> str:
    """The imports of a snippet, the names from transformers sorted."""
    peft = ["PeftModel"] if is_adapter(record) else []
    if is_adapter(record) and not _is_known(record):
        peft.insert(0, "PeftConfig")
    wanted = sorted({*names, *(["BitsAndBytesConfig"] if quantised(record) else [])})
    lines = ["import torch"] if is_torch else []
    lines += [f"from peft import {', '.join(peft)}"] if peft else []
    lines.append(f"from transformers import {', '.join(wanted)}")
    if is_adapter(record) and record.model.get("base") == coffee.NAME:
        lines.append("from perlcli.coffee import BASE")
    return "\n".join(lines) + "\n\n"


def _is_known(record: RunRecord) -> bool:
    """Whether others can find the base of an adapter: on the Hub, or in this package."""
    base = str(record.model.get("base", ""))
    return base == coffee.NAME or HUB_NAME.fullmatch(base) is not None


def _places(record: RunRecord) -> str:
    """Where the files are: this folder, and the base by its Hub id, or as the adapter's config names it."""
    lines = ['folder = "."  # where this file is']
    base = str(record.model.get("base", ""))
    if is_adapter(record):
        if base == coffee.NAME:
            lines.append("base = str(BASE)")
        elif _is_known(record):
            lines.append(f"base = {json.dumps(base)}")
        else:
            lines.append("base = PeftConfig.from_pretrained(folder).base_model_name_or_path  # or your copy of it")
    if kind := quantised(record):
        compute = f"torch.{_compute_dtype(record)}"
        four = f', bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype={compute}'
        config = f"{kind}=True{four if '4' in kind else ''}"
        lines.append(f"quantization = BitsAndBytesConfig({config})")
    return "\n".join(lines) + "\n"


def _fenced(code: str) -> str:
    return f"```python\n{code}```"


def example() -> str:
    """The code for an adapter on a base of the Hub, for the documentation."""
    base = "ibm-granite/granite-3.3-2b-base"
    head = {"class": "GraniteForCausalLM", "decoder": "model"}
    model = {"base": base, CAUSAL_HEAD: head}
    return _fenced(_head_code(RunRecord(command="reward", model=model, device={"precision": "bfloat16"}), head))
