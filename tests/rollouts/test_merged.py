"""Sampling with the adapter merged into copies beside the frozen base."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PRECISIONS, ROWS
from models import LORA, scramble
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from perlcli.data import Renderer
from perlcli.model import roles, sources, tokenizers
from perlcli.model.loading import load_causal
from perlcli.model.log_probs import log_probs
from perlcli.rollouts.how import Sampling
from perlcli.rollouts.merged import Merged, merged
from perlcli.run.record import read_record

Perl = Callable[..., Any]
HOW = Sampling(temperature=0.7, max_new_tokens=8, seed=3)
CLOSE = {"float32": 1e-4, "bfloat16": 0.05, "4-bit": 0.05, "8-bit": 0.1}


def adapted(model: Any) -> Any:
    policy = roles.new_adapter(model, LORA, "CAUSAL_LM")
    scramble(policy, 0)
    return policy.eval()


def renderer_of(folder: Path) -> Renderer:
    source = sources.locate(str(folder))
    return tokenizers.renderer(source, tokenizers.load_tokenizer(source))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad(), roles.casting(model, on=True):
        return model(input_ids=torch.tensor([ROWS[2]])).logits.float()


@pytest.mark.filterwarnings("ignore")  # bitsandbytes says that it casts inputs
@pytest.mark.parametrize("precision", PRECISIONS)
def test_copies_compute_what_base_and_adapter_do_and_leave_both_as_they_were(precision: str, llama: Path) -> None:
    model = adapted(load_causal(sources.locate(str(llama)), PRECISIONS[precision]))
    before = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    own = logits(model)
    with roles.switched(model, None):
        bare = logits(model)
    with merged(model) as size:
        found = logits(model)
    scale = (own - bare).norm()
    assert (found - own).norm() < CLOSE[precision] * max(scale, own.norm()) and scale > 0.1 * own.norm()
    assert size == sum(
        (2 if precision != "float32" else 4) * layer.in_features * layer.out_features
        for name, layer in model.named_modules()
        if name.endswith(("q_proj", "k_proj", "v_proj", "o_proj"))
    )
    assert torch.equal(own, logits(model))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_the_log_probabilities_are_those_of_training(llama: Path, gpt2: Path) -> None:
    for folder in (llama, gpt2):  # linear modules, and transposed ones
        model = adapted(load_causal(sources.locate(str(folder)), PRECISIONS["float32"]))
        prompts = [[5, 6, 7], [8, 9, 10, 11, 12], [5, 6, 7]]
        engine = Merged(renderer_of(folder))
        written = engine.sample(model, prompts, HOW)
        own = log_probs(model, prompts, [each.ids for each in written], 0.7)
        for each, wanted in zip(written, own, strict=True):
            assert each.log_probs == pytest.approx(wanted, abs=1e-4)
        assert engine.most


def test_only_plain_adapters_that_are_on_are_merged(llama: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    dora = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM"))
    with merged(dora) as size:
        assert size == 0
    model = adapted(AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32))
    with roles.switched(model, None), merged(model) as size:
        assert size == 0
    with pytest.raises(ZeroDivisionError), merged(model):
        1 / 0  # noqa: B018
    assert not any("forward" in vars(module) for module in model.modules())


def test_rl_samples_with_copies(perl: Perl, llama: Path, reward_run: Path, rows: dict[str, Path]) -> None:
    words = ("--max-length", "128", "--max-completion-length", "6", "--eval-fraction", "0", "--max-steps", "2")
    batch = ("--per-device-train-batch-size", "4", "--gradient-accumulation-steps", "1", "--learning-rate", "1e-2")
    given = ("--model", llama, "--reward", reward_run, "--data", rows["prompts"], "--output", "run")
    result = perl("rl", *given, *words, *batch, "--rollouts", "merged")
    assert "While completions were sampled, merged copies took " in result.stdout
    for line in Path("run/metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["sampler/diff_max"] < 1e-4 and row["sampler/importance"] == pytest.approx(1, abs=1e-3)
    found = read_record(Path("run"))
    assert found.guards["kl_at_start"] == 0 and found.status == "finished"
    refused = perl("rl", *given, "--full", "--rollouts", "merged", code=2)
    assert "--rollouts merged merges the adapter only, so it can't be combined with --full" in refused.output
