"""Bases that are stored quantised: recorded as what they are, and refused where they can't be trained."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig

from perlcli.errors import PerlError
from perlcli.model import loading, quantised
from perlcli.model.sources import Source, locate
from perlcli.run.record import read_record
from perlcli.settings import ModelSettings

Perl = Callable[..., Any]
STORED: dict[int, Any] = {4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, 8: {"load_in_8bit": True}}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> dict[int, Path]:
    """The tiny Llama, stored in 4 and in 8 bits."""
    folders = {}
    for bits, how in STORED.items():
        folders[bits] = tmp_path_factory.mktemp("models") / f"llama-{bits}bit"
        config = BitsAndBytesConfig(**how)
        model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=config, device_map="cpu")
        model.save_pretrained(folders[bits])
        AutoTokenizer.from_pretrained(llama).save_pretrained(folders[bits])
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_a_stored_base_is_recorded_as_what_it_is(
    perl: Perl, stored: dict[int, Path], rows: dict[str, Path], bits: int
) -> None:
    words = ("--model", stored[bits], "--data", rows["demonstrations"], "--max-steps", "1", "--lora-r", "2")
    out = perl("sft", *words, "--output", "run", "--max-length", "128", "--per-device-train-batch-size", "2").output
    record = read_record(Path("run"))
    assert record.device["precision"] == f"{bits}-bit"
    assert record.settings[f"load_in_{bits}bit"]
    assert f"is stored in {bits} bits, and is used as it is stored" in " ".join(out.split())
    model = loading.load_causal(locate(str(stored[bits])), ModelSettings())
    held = sum(p.untyped_storage().nbytes() for p in model.parameters() if p.dtype in (torch.uint8, torch.int8))
    assert 0 < held <= record.model["held_bytes"][f"{bits}-bit"]


def test_what_can_not_be_done_with_a_stored_base(perl: Perl, stored: dict[int, Path]) -> None:
    def refused(bits: int, *words: str) -> str:
        given = ("sft", "--model", stored[bits], "--data", "coffee", "--output", "run", "--dry-run", *words)
        return str(perl(*given, code=2).output)

    assert "--full can't train" in refused(4, "--full")
    assert "is DoRA, which does not work on a base in 8 bits" in refused(8, "--use-dora")
    assert "--load-in-8bit: " in refused(4, "--load-in-8bit")
    assert "is stored in 4 bits" in perl("estimate", "sft", "--model", stored[4], "--arms", "lora", code=2).output


def named(**values: Any) -> Source:
    config = LlamaConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=16)
    config.quantization_config = values
    return Source("x", "x", config)


@pytest.mark.parametrize(
    "values",
    [
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
        {"quant_method": "awq", "bits": 4, "group_size": 128},
        {"quant_method": "unheard-of"},
    ],
    ids=lambda values: values["quant_method"],
)
def test_methods_that_keep_weights_quantised_are_refused(values: dict[str, Any]) -> None:
    said = f"--model x is stored quantised by {values['quant_method']}, and can't be converted to 16 bits here: "
    with pytest.raises(PerlError, match=said):
        quantised.check(named(**values), ModelSettings())


def test_a_base_in_fp8_is_held_in_the_dtype_asked_for(llama: Path, tmp_path: Path) -> None:
    weights, scaled = load_file(llama / "model.safetensors"), {}
    for name, weight in weights.items():
        scaled[name] = weight
        if name.endswith("proj.weight"):
            scale = weight.abs().max() / 448
            scaled[name], scaled[f"{name}_scale_inv"] = (weight / scale).to(torch.float8_e4m3fn), scale.reshape(1, 1)
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    save_file(scaled, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((llama / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = loading.load_causal(locate(str(tmp_path)), ModelSettings(dtype="bfloat16"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.float(), weights[name], atol=0.05 * float(weights[name].abs().max()))


@pytest.mark.parametrize("method", ["mxfp4", "fp8"])
def test_methods_that_transformers_converts_are_loaded_without_them(method: str) -> None:
    source = named(quant_method=method)
    assert "its weights are converted while it loads" in str(quantised.check(source, ModelSettings(), full=True))
    assert quantised.load_options(source, ModelSettings(), torch.bfloat16)["quantization_config"].dequantize
    with pytest.raises(PerlError, match=f"--load-in-4bit: x is stored quantised by {method}"):
        quantised.check(source, ModelSettings(load_in_4bit=True))
