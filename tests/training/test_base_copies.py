"""What is in memory, counted from the live tensors."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from perlcli.model import loading, roles, scorers
from perlcli.model.sources import locate
from perlcli.settings import LoraSettings, ModelSettings
from perlcli.training import base_copies

LORA = LoraSettings(lora_r=4, lora_alpha=8, lora_dropout=0.0, lora_target_modules="attention")
PRECISIONS = {
    "float32": ModelSettings(),
    "bfloat16": ModelSettings(dtype="bfloat16"),
    "4-bit": ModelSettings(load_in_4bit=True),
    "8-bit": ModelSettings(load_in_8bit=True),
}
WIDTHS = (4 * 64 + 2 * 64 + 2 * 32) * 2 * 4  # parameters of an adapter of rank 4 on the tiny Llama's two layers


@pytest.fixture
def copies(llama: Path) -> Iterator[Any]:
    """Loads a model and counts its copies, without those that other tests left in memory."""

    def load(settings: ModelSettings = PRECISIONS["float32"]) -> Any:
        return roles.new_adapter(loading.load_causal(locate(str(llama)), settings), LORA, "CAUSAL_LM")

    gc.collect()
    model = load()
    before = base_copies.base_copies(model) - 1
    del model
    yield load, lambda model: base_copies.base_copies(model) - before


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_base_with_its_roles_is_one_copy(precision: str, copies: Any, reward_run: Path) -> None:
    load, count = copies
    model = load(PRECISIONS[precision])
    assert count(model) == 1
    roles.attach_reward(model, str(reward_run))
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    optimizer.step()
    assert count(model) == 1


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_second_base_counts_in_any_precision(precision: str, copies: Any) -> None:
    load, count = copies
    model, other = load(), load(PRECISIONS[precision])
    assert count(model) == count(other) == 2


def test_weights_outside_any_module_count(copies: Any) -> None:
    load, count = copies
    model = load()
    kept = [parameter.detach().clone() for name, parameter in model.named_parameters() if "base_layer" in name]
    assert 1 < count(model) < 2
    assert len(kept) == 8


def test_gradients_and_optimiser_states_of_full_tuning_do_not_count(copies: Any, llama: Path) -> None:
    _, count = copies
    model = loading.load_causal(locate(str(llama)), ModelSettings()).requires_grad_(True)
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    assert count(model) == 1
    assert optimizer.state


def test_adapters_shaped_like_a_base_matrix_are_not_a_copy(llama: Path, copies: Any) -> None:
    lora = LoraSettings(lora_r=32, lora_alpha=8, lora_dropout=0.0, lora_target_modules="attention")  # k_proj: (32, 64)
    model = roles.new_adapter(loading.load_causal(locate(str(llama)), ModelSettings()), lora, "CAUSAL_LM")
    assert copies[1](model) == 1


def test_roles_are_reported_in_megabytes(copies: Any, reward_run: Path) -> None:
    model = copies[0]()
    head = roles.attach_reward(model, str(reward_run))
    size = scorers.SharedScorer(model, head, 0).bytes
    assert size == 4 * (WIDTHS + 64)
    parts = base_copies.of_roles(model, None, {"reward": size, "function": 0}, value=0)
    own = sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name) * 4
    wanted = {"base": own, "policy": 4 * WIDTHS, "anchor": 0, "reward reward": size}
    assert parts == {name: round(size / 1e6, 3) for name, size in wanted.items()}


def test_four_rewards_cost_three_adapters_more_than_one(copies: Any, reward_run: Path) -> None:
    model = copies[0]()
    before = roles.bytes_of(model.parameters())
    for index in range(4):
        roles.attach_reward(model, str(reward_run), f"reward{index}")
    assert roles.bytes_of(model.parameters()) == before + 4 * 4 * WIDTHS
    assert copies[1](model) == 1


def test_roles_of_full_tuning_are_models(copies: Any, llama: Path) -> None:
    models = [loading.load_causal(locate(str(llama)), ModelSettings()) for _ in range(2)]
    whole = round(roles.bytes_of(models[0].parameters()) / 1e6, 3)
    assert base_copies.of_roles(models[0], models[1], {}, value=0) == {"policy": whole, "anchor": whole}


def test_quantised_state_counts_as_bytes(copies: Any) -> None:
    model = copies[0](PRECISIONS["4-bit"])
    weight = next(p for p in model.parameters() if getattr(p, "quant_state", None) is not None)
    assert roles.bytes_of([weight]) > weight.numel() * weight.element_size()


def test_the_line_shows_small_and_large_sizes() -> None:
    parts = {"base": 271.4, "policy": 3.7, "anchor": 0.0, "reward": 0.05}
    assert (
        base_copies.line(1.0, parts) == "base copies resident: 1 (271 MB); policy 3.70 MB, anchor 0 B, reward 50.0 kB"
    )
    assert base_copies.line(2.5, {"policy": 0.5}) == "base copies resident: 2.5; policy 500 kB"
