"""Every family does what docs/models.md says, and a dozen give the figures of plain transformers and peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import family_runs
import pytest
from families import FAMILIES, KINDS
from family_runs import OK, STAGES, Outcome

BY_NAME = {family.name: family for family in FAMILIES}
# A dozen of all kinds, whose figures are computed again without perlcli.
COMPARED = (
    *("llama", "qwen3", "gemma2", "gpt2", "granite", "cohere2", "qwen3_moe", "olmoe", "falcon_h1", "lfm2"),
    *("mamba", "gemma3", "qwen3_5"),
)
IN_4_BITS = ("llama", "qwen3_moe", "granite", "gemma3")
# How far they may differ: first losses, scores and merges. In bfloat16, training computes some sums in float32
# (autocast) that plain inference rounds; two bfloat16 numbers of the size of the losses differ by more than the limit.
TOLERANCE = {"float32": (1e-5, 4e-8, 1e-5), "bfloat16": (1e-2, 4e-8, 0), "4-bit": (1e-2, 4e-8, 0)}
FLAGS = {"float32": (), "bfloat16": ("--dtype", "bfloat16"), "4-bit": ("--load-in-4bit",)}
# A library's warning is not an outcome, and the command line shows it.
pytestmark = [pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    family_runs.write_data(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_NAME)
def test_a_family_does_what_the_page_says(name: str, data: Path, tmp_path: Path) -> None:
    outcomes = family_runs.run_family(BY_NAME[name], data, tmp_path)
    assert family_runs.entry(outcomes) == family_runs.read_page()["families"][name]
    if name in COMPARED:
        compare(tmp_path, data, "float32", outcomes)


CASES = [(name, "bfloat16") for name in COMPARED] + [(name, "4-bit") for name in IN_4_BITS]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "precision"), CASES)
def test_figures_are_those_of_plain_libraries(name: str, precision: str, data: Path, tmp_path: Path) -> None:
    stages = ("sft", "reward", "merge")
    outcomes = family_runs.run_family(BY_NAME[name], data, tmp_path, stages, FLAGS[precision])
    assert {outcome.stage: outcome.text for outcome in outcomes if outcome.result != OK} == {}
    compare(tmp_path, data, precision, outcomes)


def test_the_page_has_every_family_and_no_failure() -> None:
    entries = family_runs.read_page()["families"]
    assert list(entries) == list(BY_NAME)
    assert len(entries) >= 45
    assert {family.kind for family in FAMILIES} == {*KINDS}
    assert [name for name, entry in entries.items() if family_runs.FAILED in json.dumps(entry)] == []
    assert [name for name, entry in entries.items() if tuple(entry) != STAGES] == []


def test_the_page_was_made_with_the_versions_of_the_constraints() -> None:
    text = (Path(__file__).parents[1] / "constraints.txt").read_text(encoding="utf-8")
    wanted = dict(line.split("==") for line in text.splitlines() if "==" in line and not line.startswith("#"))
    assert family_runs.read_page()["versions"] == {name: wanted[name] for name in family_runs.LIBRARIES}


# The same figures, without perlcli


def compare(folder: Path, data: Path, precision: str, outcomes: list[Outcome]) -> None:
    """First loss, scores and merged logits of runs in this precision next to those of the plain libraries."""
    good = {outcome.stage for outcome in outcomes if outcome.result == OK}
    tolerances = dict(zip(("sft", "reward", "merge"), TOLERANCE[precision], strict=True))
    figures = {"sft": losses, "reward": scores, "merge": merges}
    differences = {stage: figures[stage](folder, data, precision) for stage in figures if stage in good}
    print(folder.name, precision, differences)
    assert {stage: value for stage, value in differences.items() if value > tolerances[stage]} == {}


def losses(folder: Path, data: Path, precision: str) -> float:
    """The difference between the loss of the first step and that of the base in plain transformers."""
    import torch

    rows = [json.loads(line) for line in (data / "demonstrations.jsonl").read_text(encoding="utf-8").splitlines()]
    tokenizer = tokenizer_of(folder)
    texts, labels = [], []
    for row in rows:
        prompt = encoded(tokenizer, row["prompt"], add_generation_prompt=True)
        ids = encoded(tokenizer, row["prompt"] + row["completion"])
        end = len(ids) - ids[::-1].index(tokenizer.eos_token_id)  # what follows it is the template's, and not learned
        texts.append(ids)
        labels.append([-100] * len(prompt) + ids[len(prompt) : end] + [-100] * (len(ids) - end))
    length = max(map(len, texts))
    mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in texts])
    padded = torch.tensor([ids + [tokenizer.pad_token_id] * (length - len(ids)) for ids in texts])
    targets = torch.tensor([row + [-100] * (length - len(row)) for row in labels])
    model = plain(folder / "base", precision)
    # Training adds the loss that balances a router's experts, as transformers does where it is asked for it.
    weight = getattr(model.config.get_text_config(), "router_aux_loss_coef", None)
    with torch.no_grad():
        output = model(
            input_ids=padded, attention_mask=mask, **({} if weight is None else {"output_router_logits": True})
        )
    logits = output.logits.float()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
    loss += (weight or 0) * getattr(output, "aux_loss", 0)
    first = json.loads((folder / "sft" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    return abs(float(loss) - first["loss"])


def encoded(tokenizer: Any, messages: Any, **options: Any) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "base")


def scores(folder: Path, data: Path, precision: str) -> float:
    """The largest difference between the scores in the reward's folder and those of the backbone, adapter and head."""
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file

    proof = json.loads((folder / "reward" / "proof.json").read_text(encoding="utf-8"))
    length = max(map(len, proof["rows"]))
    pad = tokenizer_of(folder).pad_token_id
    ids = torch.tensor([row + [pad] * (length - len(row)) for row in proof["rows"]])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in proof["rows"]])
    model = PeftModel.from_pretrained(plain(folder / "base", precision), folder / "reward").eval()
    saved = load_file(folder / "reward" / "adapter_model.safetensors")
    head = next(value for name, value in saved.items() if name.endswith(("score.weight", "classifier.weight")))
    inner = model.get_base_model()
    with torch.no_grad():
        hidden = inner.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        values = torch.nn.functional.linear(hidden.float(), head.to(inner.dtype).float())[..., 0]
    last = torch.tensor([len(row) - 1 for row in proof["rows"]])
    ours = torch.tensor(proof["scores"])
    return float((values[torch.arange(len(last)), last] - ours).abs().max())


def merges(folder: Path, data: Path, precision: str) -> float:
    """How far the merged model's logits are from those of the adapted one, as a share of the largest. Merging rounds in
    16 bits: there, how far its weights are from those that peft merges."""
    import torch
    from peft import PeftModel

    merged = plain(folder / "merge", "as saved")
    adapter = next(folder / stage for stage in ("rl", "sft") if (folder / stage).exists())
    wanted: Any = PeftModel.from_pretrained(plain(folder / "base", str(merged.dtype).removeprefix("torch.")), adapter)
    if merged.dtype != torch.float32:
        theirs = wanted.merge_and_unload(safe_merge=True).state_dict()
        return max(float((weight - theirs[name]).abs().max()) for name, weight in merged.state_dict().items())
    ids = torch.arange(40, 72).unsqueeze(0)
    with torch.no_grad():
        ours, adapted = (model.eval()(input_ids=ids).logits for model in (merged, wanted))
    return float((ours - adapted).abs().max() / max(1.0, float(adapted.abs().max())))


def plain(folder: Path, precision: str) -> Any:
    """A model as transformers loads it, for inference."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig

    options: dict[str, Any] = {
        "dtype": "auto" if precision == "as saved" else getattr(torch, precision, torch.bfloat16)
    }
    if precision == "4-bit":
        kind = {
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16,
        }
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, **kind)
        options["device_map"] = "cpu"
    config = AutoConfig.from_pretrained(folder)
    kind = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    model = kind.from_pretrained(folder, **options).eval()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # see perlcli.model.loading
            module.support_avx512bf16_for_cpu = False
    return model
