"""Each fault of transformers that is worked around, with and without."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from perlcli.model import faults

ALTUP: dict[str, Any] = {
    "vocab_size": 64,
    "vocab_size_per_layer_input": 64,
    "hidden_size": 32,
    "hidden_size_per_layer_input": 8,
    "intermediate_size": [32, 32],
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "laurel_rank": 4,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_kv_shared_layers": 0,
    "altup_num_inputs": 2,
    "pad_token_id": 0,
}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [0, 0, 0, 8, 9, 10]])  # padded on the left, as prompts are


@pytest.fixture
def altup() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3n_text", **ALTUP)).train()


def gradients(model: Any) -> tuple[torch.Tensor, bool]:
    """The logits of the last three tokens, and whether all gradients of their loss are finite."""
    logits = model(input_ids=IDS, attention_mask=(IDS != 0).long(), use_cache=False).logits[:, 3:]
    model.zero_grad()
    logits.logsumexp(-1).mean().backward()
    return logits, all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_padding_on_the_left_has_gradients_in_gemma_3n(altup: Any) -> None:
    logits, is_finite = gradients(altup)
    assert not is_finite  # or transformers no longer needs this
    faults.mend(altup)
    mended, is_finite = gradients(altup)
    assert is_finite
    assert torch.allclose(logits, mended, atol=1e-6)


def test_gemma_3n_clips_no_packed_weight(altup: Any) -> None:
    altup.is_quantized = True
    faults.mend(altup)
    for layer in altup.model.layers:
        weight = layer.altup.prediction_coefs.weight
        weight.requires_grad_(False)
        weight.data.fill_(1000.0)
    altup(input_ids=IDS, use_cache=False)
    assert all(layer.altup.prediction_coefs.weight.min() == 1000 for layer in altup.model.layers)


def test_other_models_stay_as_they_are() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes, num_attention_heads=2))
    faults.mend(model)
    assert not model.get_input_embeddings()._forward_hooks
