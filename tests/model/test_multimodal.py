"""Multimodal checkpoints, as the Hub has them: loaded completely, adapted where text arrives, saved for everyone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PAD, SHORT
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig

from perlcli.errors import PerlError
from perlcli.model import adapters, auto_classes, loading, roles, sources
from perlcli.model.sources import locate, skeleton
from perlcli.model.target_modules import target_modules, without_text
from perlcli.run.record import read_record
from perlcli.settings import LoraSettings, ModelSettings

Perl = Callable[..., Any]
TEXT: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": PAD,
    "initializer_range": 0.2,
}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE = {"image_size": 32, "patch_size": 16}
QWEN = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
BOTH = ["linear_attention", "full_attention"]
SLIDING = ["sliding_attention", "full_attention"]
GEMMA4 = {"global_head_dim": 8, "vocab_size_per_layer_input": 400, "hidden_size_per_layer_input": 8}
LLAMA4 = {"intermediate_size_mlp": 64, "num_local_experts": 2, "moe_layers": []}
LLAMA4_TOWER = {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3": {"text_config": TEXT, "vision_config": TOWER | IMAGE, "mm_tokens_per_image": 4},
    "gemma4": {
        "text_config": TEXT | GEMMA4 | {"layer_types": SLIDING},
        "vision_config": TOWER | {"num_key_value_heads": 4, "head_dim": 8, "position_embedding_size": 64},
        "audio_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "output_proj_dims": 32},
    },
    "qwen3_5": {"text_config": TEXT | LINEAR | {"layer_types": BOTH}, "vision_config": QWEN},
    "qwen3_vl": {"text_config": TEXT, "vision_config": QWEN | {"deepstack_visual_indexes": [0]}},
    "mistral3": {"text_config": TEXT | {"model_type": "mistral"}, "vision_config": TOWER | IMAGE | {"head_dim": 8}},
    "llama4": {"text_config": TEXT | LLAMA4, "vision_config": TOWER | IMAGE | LLAMA4_TOWER},
    "llava": {"text_config": TEXT | {"model_type": "llama"}, "vision_config": TOWER | IMAGE},
    "idefics3": {"text_config": TEXT | {"model_type": "llama"}, "vision_config": TOWER | IMAGE, "scale_factor": 1},
    "qwen2_audio": {
        "text_config": TEXT | {"model_type": "qwen2"},
        "audio_config": {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 64},
    },
}
READERS = {"idefics3": "model.text_model", "llama4": "language_model.model"}
OF_THE_HUB = {"qwen3_5": "Qwen3_5ForConditionalGeneration", "llama4": "Llama4ForConditionalGeneration"}
LORA = LoraSettings(lora_r=2, lora_alpha=4, lora_dropout=0.0, lora_target_modules="attention")
IDS = torch.tensor([[10, 20, 30, 40, 2]])
# peft's own, while it loads an adapter
quiet = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def config_of(family: str) -> PreTrainedConfig:
    config: PreTrainedConfig = AutoConfig.for_model(family, **CONFIGS[family])
    config.architectures = [OF_THE_HUB[family]] if family in OF_THE_HUB else None
    return config


def bare(family: str) -> nn.Module:
    model = skeleton(sources.Source(family, family, config_of(family)))
    assert model is not None
    return model


def adapted(model: nn.Module) -> list[str]:
    """The modules that got an adapter."""
    names = [name for name, _ in model.named_parameters() if "lora_A" in name]
    return [name.split(".lora_A")[0].removeprefix("base_model.model.") for name in names]


def is_adapted_in(model: nn.Module, part: str) -> bool:
    """Whether an adapter lies on a part of the model, and on no other."""
    names = adapted(model)
    return bool(names) and all(name.startswith(f"{part}.") for name in names)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Callable[[str], Path]:
    """Writes a tiny multimodal checkpoint of a family, with random weights and the tiny Llama's tokenizer."""
    top, made = tmp_path_factory.mktemp("multimodal"), {}

    def of(family: str) -> Path:
        if family not in made:
            folder = made[family] = top / family
            torch.manual_seed(4)
            AutoModelForImageTextToText.from_config(config_of(family)).save_pretrained(folder)
            for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                shutil.copy(llama / file, folder)
            (folder / "preprocessor_config.json").write_text('{"size": 32}')
        return made[family]

    return of


# The class


def test_the_class_is_the_one_that_the_checkpoint_names() -> None:
    """Qwen3.5 and Llama 4 have a causal class too, which names modules differently and has no towers."""
    for family in OF_THE_HUB:
        config = config_of(family)
        assert auto_classes.causal_class(config) is AutoModelForImageTextToText
        assert auto_classes.causal_class(config.get_text_config()) is AutoModelForCausalLM
        config.architectures = None
        assert auto_classes.causal_class(config) is AutoModelForCausalLM


def test_a_family_without_a_causal_class_is_loaded_by_another() -> None:
    for family in ("mistral3", "qwen3_vl", "llava", "idefics3"):
        assert auto_classes.causal_class(config_of(family)) is AutoModelForImageTextToText
    assert auto_classes.causal_class(config_of("qwen2_audio")).__name__ == "AutoModelForMultimodalLM"
    for family in ("florence2", "t5"):  # an encoder-decoder doesn't continue a text
        assert auto_classes.causal_class(AutoConfig.for_model(family)) is AutoModelForCausalLM


def test_code_that_comes_with_a_model_names_its_class() -> None:
    own = PreTrainedConfig(auto_map={"AutoConfig": "a.B", "AutoModelForImageTextToText": "a.C"})
    assert auto_classes.causal_class(own) is AutoModelForImageTextToText


# The modules


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("wanted", ["attention", "all-linear"])
def test_an_adapter_lies_on_the_language_model_only(family: str, wanted: str) -> None:
    model = bare(family)
    settings = LoraSettings(lora_r=2, lora_alpha=4, lora_target_modules=wanted)
    adapters.try_on(settings, model, "CAUSAL_LM")
    assert is_adapted_in(model, READERS.get(family, "model.language_model"))


def test_layers_that_only_attend_to_images_get_no_adapter() -> None:
    text = TEXT | {"num_hidden_layers": 4, "cross_attention_layers": [1], "rope_parameters": {"rope_type": "default"}}
    del text["head_dim"]
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 4} | IMAGE
    config = AutoConfig.for_model("mllama", text_config=text, vision_config=vision | {"vision_output_dim": 64})
    config.architectures = ["MllamaForConditionalGeneration"]
    model = skeleton(sources.Source("x", "x", config))
    assert model is not None
    adapters.try_on(LoraSettings(lora_r=2, lora_alpha=4, lora_target_modules="all-linear"), model, "CAUSAL_LM")
    layers = {name.split(".layers.")[1].split(".")[0] for name in adapted(model)}
    assert layers == {"0", "2", "3"}
    assert is_adapted_in(model, "model.language_model")


def test_cross_attention_outside_of_the_layers_gets_no_adapter_either() -> None:
    vision = {"embed_dim": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    small = {name: TEXT[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}
    config = AutoConfig.for_model("idefics", **small, num_hidden_layers=2, vision_config=vision | IMAGE)
    model = skeleton(sources.Source("x", "x", config))
    assert model is not None
    assert target_modules(model, "attention") == ["k_proj", "o_proj", "q_proj", "v_proj"]
    adapters.try_on(LORA, model, "CAUSAL_LM")
    assert is_adapted_in(model, "model.layers")


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen3_5_text"])
def test_a_model_that_only_reads_text_has_no_towers(family: str) -> None:
    model = skeleton(sources.Source("x", "x", AutoConfig.for_model(family)))
    assert model is not None
    assert without_text(model) is None


def test_a_name_that_only_a_tower_has_is_refused() -> None:
    said = r": qkv is model\.visual\.blocks\.0\.attn\.qkv, where no text arrives: .*\nHint: linear modules .*q_proj"
    with pytest.raises(PerlError, match=said):
        target_modules(bare("qwen3_vl"), "q_proj,qkv")


def test_an_expression_that_matches_a_tower_is_refused(tmp_path: Path) -> None:
    model, file = bare("gemma3"), tmp_path / "adapter.json"
    wanted = {"peft_type": "LORA", "r": 2, "target_modules": r".*\.q_proj"}
    file.write_text(json.dumps(wanted))
    lora = LoraSettings(peft=str(file))
    said = r"target_modules '.*' matches model\.vision_tower.*q_proj, where no text arrives: .*\nHint: in the file: "
    with pytest.raises(PerlError, match=said) as caught:
        adapters.try_on(lora, model, "CAUSAL_LM")
    hint = json.loads("{" + str(caught.value.hint).removeprefix("in the file: ") + "}")
    for more in (hint, {"target_modules": r".*language_model.*\.q_proj"}):
        file.write_text(json.dumps(wanted | more))
        model = bare("gemma3")
        adapters.try_on(lora, model, "CAUSAL_LM")
        assert is_adapted_in(model, "model.language_model")


def test_modules_that_a_file_leaves_out_stay_left_out(tmp_path: Path) -> None:
    model, file = bare("gemma3"), tmp_path / "adapter.json"
    for own in (["layers.0.self_attn.q_proj"], r".*layers\.0\..*q_proj"):
        wanted = {"peft_type": "LOHA", "r": 2, "target_modules": ["q_proj"], "exclude_modules": own}
        file.write_text(json.dumps(wanted))
        model = bare("gemma3")
        adapters.try_on(LoraSettings(peft=str(file)), model, "CAUSAL_LM")
        trained = [name for name, _ in model.named_parameters() if "hada_w1_a" in name]
        assert [name.split(".q_proj")[0] for name in trained] == ["model.language_model.layers.1.self_attn"]


def test_full_tuning_leaves_the_towers_alone(checkpoint: Callable[[str], Path]) -> None:
    model = loading.train_all(loading.load_causal(locate(str(checkpoint("mistral3"))), ModelSettings(dtype="bfloat16")))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    model(input_ids=IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        is_read = name.startswith(("model.language_model", "lm_head"))
        assert parameter.requires_grad == is_read == (parameter.grad is not None), name


# Saved and loaded


@quiet
@pytest.mark.parametrize("family", ["gemma3", "qwen3_5", "mistral3"])
@pytest.mark.parametrize("bits", [{}, {"load_in_4bit": True}, {"load_in_8bit": True}])
def test_plain_peft_loads_the_adapter_on_the_class_of_the_hub(
    family: str, bits: dict[str, bool], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    base = str(checkpoint(family))
    model = roles.new_adapter(loading.load_causal(locate(base), ModelSettings(**bits)), LORA, "CAUSAL_LM")
    assert is_adapted_in(model, "model.language_model")
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    roles.save_adapter(model, tmp_path)
    assert not any("vision" in name or "visual" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    if bits:
        assert locate(str(tmp_path)).base == base
        return
    plain = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    before = logits(plain)
    after = logits(PeftModel.from_pretrained(plain, tmp_path))
    assert torch.equal(after, logits(model))
    assert not torch.equal(after, before)
    if family == "qwen3_5":  # transformers knows how the causal class names the modules
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)), after)


@quiet
@pytest.mark.parametrize("family", ["qwen3_5", "gemma3"])
def test_an_adapter_of_the_causal_class_fits_the_complete_model(
    family: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """As trl or an earlier perlcli left it for Qwen3.5; Gemma 3 has no such class."""
    base = str(checkpoint(family))
    torch.manual_seed(6)
    config = LoraConfig(r=2, target_modules=r".*layers\.1\.self_attn\.[qv]_proj", init_lora_weights=False)
    theirs: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    theirs.save_pretrained(tmp_path)
    source = locate(str(tmp_path))
    ours = roles.load_adapter(loading.load_causal(source, ModelSettings()), str(tmp_path), trainable=False)
    assert torch.equal(logits(ours), logits(theirs))
    roles.add_adapter(ours, str(tmp_path), roles.ANCHOR)
    with roles.switched(ours, roles.ANCHOR):
        assert torch.equal(logits(ours), logits(theirs))


@quiet
@pytest.mark.slow
def test_policy_and_reward_meet_on_one_base_and_merge(
    perl: Perl, checkpoint: Callable[[str], Path], rows: dict[str, Path]
) -> None:
    """Qwen3.5's causal class names modules differently from its sequence classifier."""
    base = checkpoint("qwen3_5")
    perl("sft", "-m", base, "-d", rows["demonstrations"], "-o", "sft", *SHORT)
    perl("reward", "-m", base, "-d", rows["pairs"], "-o", "reward", *SHORT)
    short = ("--max-steps", "2", "--per-device-train-batch-size", "4", "--max-length", "128")
    perl(
        "rl",
        "-m",
        "sft",
        "--reward",
        "reward",
        "-d",
        rows["prompts"],
        "-o",
        "rl",
        *short,
        "--max-completion-length",
        "6",
    )
    record = read_record(Path("rl"))
    assert record.guards["kl_at_start"] == record.guards["shift of reward"] == 0
    assert record.memory["base_copies"] == 1
    perl("merge", "rl", "-o", "merged")
    check_merged(base, "rl", "merged")


@quiet
@pytest.mark.slow
def test_a_family_without_a_causal_class_is_trained_and_merged(
    perl: Perl, checkpoint: Callable[[str], Path], rows: dict[str, Path]
) -> None:
    base = checkpoint("mistral3")
    perl("sft", "-m", base, "-d", rows["demonstrations"], "-o", "sft", *SHORT)
    assert "AutoModelForImageTextToText.from_pretrained" in Path("sft/README.md").read_text()
    perl("merge", "sft", "-o", "merged")
    check_merged(base, "sft", "merged")
    perl("sft", "-m", base, "-d", rows["demonstrations"], "-o", "full", "--full", "--max-steps", "2")
    check_towers(base, "full")


def check_merged(base: Path, adapter: str, merged: str) -> None:
    """The merged model's logits are those of the adapter on its base, and its towers are the base's."""
    plain = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    wanted = logits(PeftModel.from_pretrained(plain, adapter))
    assert torch.allclose(logits(AutoModelForImageTextToText.from_pretrained(merged)), wanted, atol=1e-4)
    check_towers(base, merged)


def check_towers(base: Path, made: str) -> None:
    before, after = load_file(base / "model.safetensors"), load_file(f"{made}/model.safetensors")
    assert set(before) == set(after)
    towers = [name for name in before if "visual" in name or "vision" in name or "projector" in name]
    assert towers
    assert all(torch.equal(before[name], after[name]) for name in towers)
    assert (Path(made) / "preprocessor_config.json").read_text() == '{"size": 32}'
