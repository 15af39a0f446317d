"""Dropout and noise are off wherever a model's code takes them from."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import disable_dropout_in_model

from perlcli.model import adapters, dropout, roles
from perlcli.settings import LoraSettings

SIZE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
XGLM = {"vocab_size": 64, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64, "pad_token_id": 0}
WIDE = {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
FUNCTIONAL: dict[str, dict[str, Any]] = {
    "opt": {**SIZE, "ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.3},
    "xglm": {**XGLM, "dropout": 0.3},
    "biogpt": {**SIZE, "intermediate_size": 64, "attention_probs_dropout_prob": 0.3, "layerdrop": 0.5},
    "gpt_bigcode": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 64, "attn_pdrop": 0.4},
    "seed_oss": {**SIZE, **WIDE, "residual_dropout": 0.3},
}


def tiny(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **more))


@pytest.mark.parametrize("kind", FUNCTIONAL)
def test_functional_dropout_is_turned_off(kind: str, still_random: None) -> None:
    """In training mode, a model then gives the logits of evaluation mode."""
    state = torch.random.get_rng_state()
    model = tiny(kind, **FUNCTIONAL[kind])
    torch.random.set_rng_state(state)
    assert dropout.has_any(model.config)
    disable_dropout_in_model(model)
    assert "still differ by" in str(dropout.remains(model))  # why TRL's own is not enough
    dropout.turn_off(model)
    assert not dropout.has_any(model.config)
    assert dropout.remains(model) is None


def test_modes_stay_as_they_are() -> None:
    model = tiny("opt", **FUNCTIONAL["opt"]).eval()
    model.model.train()
    modes = [module.training for module in model.modules()]
    dropout.remains(model)
    assert [module.training for module in model.modules()] == modes
    assert len(set(modes)) == 2


def test_configs_inside_of_a_config_count() -> None:
    config = AutoConfig.for_model("gemma3", text_config={"attention_dropout": 0.2})
    assert dropout.has_any(config)
    assert not dropout.has_any(AutoConfig.for_model("gemma3"))


class Noisy(nn.Module):
    """A remote model's layer: other modules of dropout, noise, a flag and a width that are none."""

    def __init__(self) -> None:
        super().__init__()
        self.holes = nn.Dropout2d(0.5)
        self.jitter_noise, self.router_jitter_noise = 0.1, 0.1  # the second is read in evaluation too
        self.drop_path_rate, self.token_dropout, self.backdrop = 0.2, True, None
        self.width = 0.5


def test_every_module_of_dropout_and_noise_is_turned_off() -> None:
    module = Noisy()
    dropout.turn_off(module)
    assert (module.holes.p, module.jitter_noise, module.drop_path_rate, module.router_jitter_noise) == (0, 0, 0, 0.1)
    assert (module.token_dropout, module.backdrop, module.width) == (True, None, 0.5)


def test_a_router_that_draws_experts_chooses_as_in_evaluation() -> None:
    """Phi-MoE's does in training; its router_jitter_noise is a limit by which it chooses in evaluation too."""
    sizes = {**WIDE, "num_local_experts": 4, "router_jitter_noise": 0.3, "initializer_range": 0.2}
    model = tiny("phimoe", **SIZE, **sizes).eval()
    ids = torch.arange(4, 40).unsqueeze(0)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        assert dropout.remains(model) is not None
        dropout.turn_off(model)
        assert dropout.remains(model) is None
        assert torch.equal(model(input_ids=ids).logits, before)


def test_an_adapter_s_own_dropout_can_be_set_again() -> None:
    model: Any = tiny("opt", **FUNCTIONAL["opt"])
    lora = LoraSettings(lora_r=2, lora_alpha=2, lora_dropout=0.5, lora_target_modules="attention")
    adapted = roles.new_adapter(model, lora, "CAUSAL_LM")
    roles.set_adapter_dropout(adapted, 0.5)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    dropout.turn_off(adapted)
    assert dropout.remains(adapted) is None
    roles.set_adapter_dropout(adapted, adapters.dropout_of(lora, "CAUSAL_LM"))
    assert dropout.remains(adapted) is not None
