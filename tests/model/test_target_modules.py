"""The modules that get an adapter: every attention projection of any architecture, or those that are named."""

import dataclasses
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig

from perlcli.errors import PerlError
from perlcli.model import adapters, loading, roles
from perlcli.model.sources import Source, locate, skeleton
from perlcli.model.target_modules import expression_fault, read_directly, target_modules
from perlcli.settings import LoraSettings, ModelSettings

LORA = LoraSettings(lora_r=2, lora_alpha=4, lora_dropout=0.0, lora_target_modules="attention")

SPLIT = ["k_proj", "o_proj", "q_proj", "v_proj"]

OUT = ["k_proj", "out_proj", "q_proj", "v_proj"]

FUSED = ["dense", "query_key_value"]

GPT2 = ["attn.c_proj", "c_attn"]

ATTENTION: dict[str, list[str]] = {
    "llama": SPLIT,
    "mistral": SPLIT,
    "mixtral": SPLIT,
    "qwen2": SPLIT,
    "qwen2_moe": SPLIT,
    "qwen3": SPLIT,
    "gemma": SPLIT,
    "gemma2": SPLIT,
    "cohere": SPLIT,
    "olmo": SPLIT,
    "olmo2": SPLIT,
    "starcoder2": SPLIT,
    "stablelm": SPLIT,
    "smollm3": SPLIT,
    "granite": SPLIT,
    "gpt_oss": SPLIT,
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "opt": OUT,
    "gptj": OUT,
    "gpt_neo": OUT,
    "gpt_neox": FUSED,
    "falcon": FUSED,
    "bloom": FUSED,
    "persimmon": FUSED,
    "phi": ["dense", "k_proj", "q_proj", "v_proj"],
    "phi3": ["o_proj", "qkv_proj"],
    "codegen": ["out_proj", "qkv_proj"],
    "mpt": ["Wqkv", "out_proj"],
    "deepseek_v3": ["kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj"],
}


def named(config: Any) -> nn.Module:
    return skeleton(Source("x", "x", config))


@pytest.mark.parametrize("kind", ATTENTION)
def test_attention_is_found(kind: str) -> None:
    assert target_modules(named(AutoConfig.for_model(kind)), "attention") == ATTENTION[kind]


@pytest.mark.parametrize("kind", ["gpt2", "falcon", "bloom", "gpt_neox", "phi", "opt", "mpt", "qwen2_moe"])
def test_attention_reaches_every_layer_and_nothing_else(kind: str) -> None:
    config = AutoConfig.for_model(kind)
    model = named(config)
    names = target_modules(model, "attention")
    reached = [n for n, _ in model.named_modules() if any(n == tail or n.endswith(f".{tail}") for tail in names)]
    assert len(reached) == len(names) * config.num_hidden_layers
    assert all("attn" in name or "attention" in name for name in reached)


def test_gpt2_adapter_lies_on_attention_and_not_on_the_mlp(gpt2: Path) -> None:
    model = roles.new_adapter(loading.load_causal(locate(str(gpt2)), ModelSettings()), LORA, "CAUSAL_LM")
    adapted = {name.split(".lora_A")[0][-11:] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == {"attn.c_attn", "attn.c_proj"}
    assert model.peft_config["default"].fan_in_fan_out


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba"])
def test_state_spaces_are_adapted_where_every_kernel_calls_the_module(kind: str) -> None:
    model = named(AutoConfig.for_model(kind))
    assert target_modules(model, "attention") == target_modules(model, "all-linear") == ["in_proj"]
    with pytest.raises(
        PerlError, match=r"out_proj is .*, whose weight the model's code reads itself.*\nHint: .*in_proj$"
    ):
        target_modules(model, "out_proj")
    assert adapters.try_on(LORA, model, "CAUSAL_LM")


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    "config",
    [
        AutoConfig.for_model("nemotron_h", **SMALL, layers_block_type=["mamba", "attention"]),
        AutoConfig.for_model("recurrent_gemma", **SMALL, lru_width=32, block_types=["recurrent", "attention"]),
    ],
    ids=lambda config: config.model_type,
)
def test_attention_is_known_by_its_class_where_no_name_says_so(config: Any) -> None:
    assert target_modules(named(config), "attention") == SPLIT


@pytest.mark.parametrize("kind", ["bamba", "falcon_h1"])
def test_all_linear_of_a_hybrid_leaves_out_what_its_kernels_read(kind: str) -> None:
    layers = {"attn_layer_indices": [1], "mamba_n_heads": 4} if kind == "bamba" else {}
    model = named(AutoConfig.for_model(kind, **SMALL, **layers))
    names = target_modules(model, "all-linear")
    assert {"in_proj", *SPLIT} <= set(names)
    assert "out_proj" not in names
    assert adapters.try_on(dataclasses.replace(LORA, lora_target_modules="all-linear"), model, "CAUSAL_LM")


def test_the_output_head_is_neither_adapted_nor_proposed() -> None:
    model = named(AutoConfig.for_model("llama"))
    with pytest.raises(
        PerlError, match=r"lm_head is the output head, whose weight the loss reads itself.*\nHint: "
    ) as e:
        target_modules(model, "lm_head")
    assert "lm_head" not in e.value.hint
    with pytest.raises(PerlError) as missing:
        target_modules(model, "q")
    assert "lm_head" not in missing.value.hint


def test_a_part_of_a_weight_and_its_shape_are_not_the_weight() -> None:
    assert read_directly(named(AutoConfig.for_model("bloom"))) == set()


@pytest.mark.parametrize("kind", ["qwen2_moe", "qwen3_moe", "gpt_oss"])
def test_all_linear_reaches_the_experts(kind: str) -> None:
    model = named(AutoConfig.for_model(kind, **SMALL, head_dim=8, vocab_size=64))
    config = adapters.on_model(dataclasses.replace(LORA, lora_target_modules="all-linear"), model, "CAUSAL_LM")
    adapted = get_peft_model(model, config)
    assert any(".experts.lora_A." in name for name, _ in adapted.named_parameters())


def test_norm_named_after_attention_is_not_attention() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = {"self_attn": nn.ModuleDict({"q": nn.Linear(2, 2)})}
            layer |= {"post_attention_layernorm": nn.ModuleDict({"gate": nn.Linear(2, 2)})}
            self.model = nn.ModuleDict({"layer": nn.ModuleDict(layer)})

    assert target_modules(Model(), "attention") == ["q"]


def test_named_modules_are_taken_as_given() -> None:
    model = named(AutoConfig.for_model("llama"))
    assert target_modules(model, "q_proj, mlp.down_proj") == ["q_proj", "mlp.down_proj"]
    assert target_modules(model, "all-linear") == "all-linear"


@pytest.mark.parametrize(("wanted", "missing"), [("q_proj,q_prj,w", "q_prj, w"), ("proj", "proj"), (" , ", " , ")])
def test_missing_modules_are_an_error(wanted: str, missing: str) -> None:
    with pytest.raises(PerlError, match=f"the model has no module '{missing}'\nHint: its linear modules: down_proj, "):
        target_modules(named(AutoConfig.for_model("llama")), wanted)


def test_all_linear_leaves_out_the_output_head(llama: Path) -> None:
    settings = LoraSettings(lora_r=2, lora_alpha=4, lora_target_modules="all-linear")
    model = roles.new_adapter(loading.load_causal(locate(str(llama)), ModelSettings()), settings, "CAUSAL_LM")
    adapted = {name.split(".lora_A")[0].rsplit(".", 1)[1] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == {*SPLIT, "gate_proj", "up_proj", "down_proj"}


# Regular expressions

NAMES = [f"model.layers.{number}.self_attn.q_proj" for number in range(4)]


@pytest.mark.parametrize("expression", ["", r".*\.q_proj", r"model\.layers\.[01]\..*", "a|b"])
def test_an_ordinary_expression_is_in_order(expression: str) -> None:
    assert expression_fault([expression], NAMES) is None


@pytest.mark.parametrize("expression", ["(", "[", "*", "\\", "(?:", "a{99999999999999}"])
def test_an_invalid_expression_is_an_error(expression: str) -> None:
    assert str(expression_fault(["a", expression], NAMES)).startswith(
        f"{expression!r} is not a valid regular expression: "
    )


@pytest.mark.parametrize("expression", [r"(.*)*x", r"(\w+\.?)+!", ".*" * 12 + "x"])
def test_an_expression_that_takes_years_is_stopped(expression: str) -> None:
    before = signal.getsignal(signal.SIGVTALRM)
    fault = expression_fault([expression], NAMES, seconds=0.1)
    assert fault == f"the regular expression {expression!r} takes longer than 0.1 s to match module names"
    assert signal.getsignal(signal.SIGVTALRM) is before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_in_another_thread_there_is_no_timer() -> None:
    faults: list[str | None] = []
    thread = threading.Thread(target=lambda: faults.append(expression_fault(["a"], NAMES)))
    thread.start()
    thread.join()
    assert faults == [None]
