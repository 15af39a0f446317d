"""How far a merged model is from the adapted one, in figures."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from perlcli.errors import PerlError
from perlcli.model.sources import locate
from perlcli.training import merging


def test_figures_of_hand_made_logits() -> None:
    some = [torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
    others = [torch.tensor([[1.5, 2.0], [3.0, 5.0]]), torch.tensor([[0.0, 1.0]])]
    assert merging.largest_difference(some, others) == 5
    assert merging.share_same_token(some, others) == pytest.approx(2 / 3)
    ours, theirs = ([torch.tensor([value]) for value in values] for values in ((1.0, 2.0, 3.0), (5.0, 7.0, 6.0)))
    assert merging.share_same_order(ours, theirs) == pytest.approx(2 / 3)
    assert merging.share_same_order(ours[:1], theirs[:1]) == 1
    nan = [torch.tensor([[1.0, float("nan")], [0.0, 0.0]]), others[1]]
    assert not merging.largest_difference(some, nan) < float("inf")


def test_layers_that_share_a_weight_are_refused(tmp_path: Path) -> None:
    """Zamba 2 has one transformer at several places, to each of which peft adds an adapter of its own."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    places = {"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid"] * 2, "hybrid_layer_ids": [1, 3]}
    mamba = {"mamba_d_state": 8, "n_mamba_heads": 4, "mamba_headdim": 16, "use_mamba_kernels": False}
    config = AutoConfig.for_model("zamba2", **sizes, **places, **mamba)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lora = LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")
    get_peft_model(base, lora).save_pretrained(tmp_path / "a")
    with pytest.raises(PerlError, match=r"layers.1.* and .*layers.3.* share a weight"):
        merging.check_unshared(locate(str(tmp_path / "a")))
