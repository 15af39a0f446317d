"""Loading the base in each precision, and its gradients in 4 bits."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from perlcli.errors import PerlError
from perlcli.model import loading, roles
from perlcli.model.sources import locate
from perlcli.settings import LoraSettings, ModelSettings

LORA = LoraSettings(lora_r=2, lora_alpha=4, lora_dropout=0.0, lora_target_modules="attention")
HAS_AVX512_BF16 = Path("/proc/cpuinfo").exists() and "avx512_bf16" in Path("/proc/cpuinfo").read_text()


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        (ModelSettings(), torch.float32),
        (ModelSettings(dtype="bfloat16"), torch.bfloat16),
        (ModelSettings(load_in_4bit=True), torch.uint8),
        (ModelSettings(load_in_8bit=True), torch.int8),
    ],
)
def test_base_is_held_frozen_in_the_precision_asked_for(llama: Path, settings: ModelSettings, kind: Any) -> None:
    model = loading.load_causal(locate(str(llama)), settings)
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == kind
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_model_that_cannot_be_loaded_is_an_error(llama: Path, tmp_path: Path) -> None:
    shutil.copy(llama / "config.json", tmp_path)
    for content in (None, b"no safetensors"):
        if content:
            (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(PerlError, match=f"The model {tmp_path} can't be loaded"):
            loading.load_causal(locate(str(tmp_path)), ModelSettings())


FOUR_BIT = {"quant_method": "bitsandbytes", "load_in_4bit": True}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_hidden_layers": 3}, "its files lack model.layers.2.input_layernorm.weight and 8 more weights"),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "its files lack transformer.h.0.attn.c_attn"),
        ({"intermediate_size": 96}, "mlp.down_proj.weight is [64, 64] in its file, but [64, 96] by config.json"),
        ({"quantization_config": FOUR_BIT}, "self_attn.q_proj.weight is in 4 bits, but it is not"),
    ],
    ids=["layers", "family", "shapes", "bits"],
)
def test_weights_that_do_not_fit_the_config_are_named(
    values: dict[str, Any], words: str, llama: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    with pytest.raises(PerlError) as caught:
        loading.load_causal(locate(str(folder)), ModelSettings())
    assert words in caught.value.problem
    assert "config.json" in caught.value.hint


def test_a_gpu_that_is_too_small_is_not_called_a_fault_of_the_model(
    llama: Path, sft_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*words: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    base_model = loading.load_causal(locate(str(llama)), ModelSettings())
    monkeypatch.setattr(roles.PeftModel, "from_pretrained", full)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", full)
    with pytest.raises(torch.OutOfMemoryError):
        loading.load_causal(locate(str(llama)), ModelSettings())
    with pytest.raises(torch.OutOfMemoryError):
        roles.load_adapter(base_model, str(sft_run), trainable=False)


def test_quantising_says_what_went_wrong_with_the_first_weight(
    llama: Path, no_room: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers raises only that something did."""
    no_room("quantising")
    with pytest.raises(torch.OutOfMemoryError, match=r"CUDA out of memory\. Tried to allocate 112"):
        loading.load_causal(locate(str(llama)), ModelSettings(load_in_4bit=True))

    def broken(*_: Any, **__: Any) -> Any:
        raise ValueError("Blockwise 4bit quantization\nonly supports 16/32-bit floats")

    monkeypatch.setattr("bitsandbytes.functional.quantize_4bit", broken)
    with pytest.raises(PerlError, match="can't be loaded: only supports 16/32-bit floats"):
        loading.load_causal(locate(str(llama)), ModelSettings(load_in_4bit=True))


def gradient(model: Any) -> torch.Tensor:
    """The gradients of all LoRA weights for one batch, as one vector."""
    ids = torch.arange(3, 23).reshape(2, 10)
    model.zero_grad()
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    return torch.cat([p.grad.flatten().clone() for _, p in model.named_parameters() if p.grad is not None])


def evaluated(model: Any) -> None:
    """One forward in eval mode without grad, as an evaluation makes."""
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.arange(3, 23).reshape(2, 10))


@pytest.fixture
def four_bit(llama: Path) -> Any:
    """A 4-bit base with an adapter whose both factors are random, so that both have gradients."""
    model = roles.new_adapter(
        loading.load_causal(locate(str(llama)), ModelSettings(load_in_4bit=True)), LORA, "CAUSAL_LM"
    )
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def test_four_bit_gradients_survive_an_evaluation(four_bit: Any) -> None:
    before = gradient(four_bit)
    evaluated(four_bit)
    assert torch.equal(gradient(four_bit), before)


@pytest.mark.filterwarnings("ignore:bitsandbytes.*autograd kernel was not registered")  # the fault, in torch's words
@pytest.mark.skipif(not HAS_AVX512_BF16, reason="the fault shows on a CPU with AVX512-BF16")
def test_four_bit_gradients_do_not_survive_without_the_workaround(four_bit: Any) -> None:
    """Where this begins to fail, bitsandbytes is cured and `_keep_autograd` can go."""
    for module in four_bit.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True
    before = gradient(four_bit)
    evaluated(four_bit)
    assert torch.nn.functional.cosine_similarity(gradient(four_bit), before, dim=0) < 0.9
