"""A model comes back from a trainer as it was."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tokenizer_of
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig

from perlcli.run.record import read_record
from perlcli.training.lending import Lent

SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
MOE = {**SIZE, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE of two layers, whose config asks for router logits as TRL leaves it after training."""
    folder = tmp_path_factory.mktemp("models") / "moe"
    tokenizer = tokenizer_of(folder, chat=True)
    torch.manual_seed(1)
    config = AutoConfig.for_model("qwen3_moe", **MOE, vocab_size=len(tokenizer), max_position_embeddings=512)
    config.output_router_logits = True
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def state(model: Any) -> dict[str, Any]:
    """What a trainer may change, other than weights."""
    found = {name: (module.training, len(module._forward_hooks)) for name, module in model.named_modules()}
    own = {name: "forward" in vars(module) for name, module in model.named_modules()}
    checkpointed = {name: getattr(module, "gradient_checkpointing", None) for name, module in model.named_modules()}
    return {
        "modules": (found, own, checkpointed),
        "config": model.config.to_dict(),
        "of": vars(model.generation_config),
    }


def change(model: Any) -> None:
    """What transformers, accelerate and TRL do to a model."""
    text = model.config.get_text_config()
    model.config.use_cache = text.use_cache = False
    text.output_router_logits, text.pad_token_id, model.generation_config.pad_token_id = True, 5, 5
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.forward = lambda *args, **kwargs: None
    model.train()
    model.get_input_embeddings().register_forward_hook(lambda *_: None)


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **MOE, vocab_size=64)).eval()
    made.generation_config = GenerationConfig(temperature=0.5)
    return made


def test_everything_but_weights_is_put_back(model: Any) -> None:
    before, lent = state(model), Lent(model)
    ids = torch.tensor([[1, 2, 3]])
    logits = model(input_ids=ids).logits
    change(model)
    nn.init.zeros_(model.lm_head.weight)
    assert state(model) != before
    lent.give_back()
    assert state(model) == {**before, "of": vars(model.generation_config)}
    assert model.generation_config.pad_token_id is None
    assert model(input_ids=ids).logits.abs().max() == 0 < logits.abs().max()


def test_the_trainer_gets_its_model_again(model: Any) -> None:
    before, lent = state(model), Lent(model)
    change(model)
    changed, forward = state(model), model.forward
    with lent.given_back():
        assert (state(model)["modules"], state(model)["config"]) == (before["modules"], before["config"])
    assert state(model) == changed
    assert model.forward is forward


def test_configs_inside_of_a_config_are_put_back() -> None:
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("gemma3", text_config={**SIZE, "vocab_size": 64}, vision_config=vision)
    model = AutoModelForImageTextToText.from_config(config)
    lent = Lent(model)
    model.config.text_config.use_cache = model.config.vision_config.use_cache = False
    lent.give_back()
    assert model.config.text_config.use_cache
    assert "use_cache" not in vars(model.config.vision_config)


@pytest.mark.slow
@pytest.mark.parametrize("how", [("--lora-r", "4"), ("--full",)])
def test_mixture_of_experts_trains_and_writes_samples(
    how: tuple[str, ...], perl: Any, moe: Path, rows: dict[str, Path], tmp_path: Path
) -> None:
    """With `output_router_logits`, which TRL leaves on, sampling fails."""
    common = ("--max-steps", "1", "--per-device-train-batch-size", "4", "--max-length", "128")
    perl("sft", "-m", moe, "-d", rows["demonstrations"], "-o", tmp_path / "run", *common, *how)
    found = read_record(tmp_path / "run")
    assert (found.status, [note for note in found.notes if "could not" in note]) == ("finished", [])
    assert len((tmp_path / "run" / "samples.jsonl").read_text().splitlines()) == 4
    if how == ("--full",):
        saved, base = (AutoConfig.from_pretrained(folder) for folder in (tmp_path / "run", moe))
        assert (saved.output_router_logits, saved.use_cache) == (False, base.use_cache)
