"""The base: where names lead, its tokenizer, its attention projections, its fingerprint, its gradients in 4 bits."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import nn
from transformers import AutoConfig, PreTrainedTokenizerFast

from perlcli import coffee
from perlcli.errors import PerlError
from perlcli.model import loading, roles, sources, tokenizers, weights
from perlcli.model.sources import Source, locate, skeleton
from perlcli.model.target_modules import target_modules
from perlcli.model.tokenizers import choose_pad
from perlcli.settings import LoraSettings, ModelSettings

LORA = LoraSettings(lora_r=2, lora_alpha=4, lora_dropout=0.0, lora_target_modules="attention")
HAS_AVX512_BF16 = Path("/proc/cpuinfo").exists() and "avx512_bf16" in Path("/proc/cpuinfo").read_text()


def adapter_folder(folder: Path, base_name: str | None, task: str = "CAUSAL_LM") -> Path:
    """An adapter's folder with nothing but its config."""
    folder.mkdir()
    config = {"peft_type": "LORA", "task_type": task, "base_model_name_or_path": base_name, "r": 2}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def cached(llama: Path) -> str:
    """The id of a model that an earlier call has brought into the hub cache."""
    return in_hub_cache("tiny", llama)


def in_hub_cache(name: str, folder: Path) -> str:
    """The id of a repository that holds what a folder does, as an earlier call would have brought it there."""
    top = Path(os.environ["HF_HOME"]) / "hub" / f"models--org--{name}"
    if not top.exists():
        revision = "1" * 40
        (top / "refs").mkdir(parents=True)
        (top / "refs" / "main").write_text(revision)
        shutil.copytree(folder, top / "snapshots" / revision)
    return f"org/{name}"


# Where a name leads


def test_no_name_leads_to_the_embedded_base() -> None:
    found = locate(None)
    assert (found.base, found.adapter, found.base_name) == (str(coffee.BASE), None, coffee.NAME)
    assert found.is_embedded


def test_folder_leads_to_itself_from_anywhere(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(llama.parent)
    found = locate("llama")
    assert (found.name, found.base, found.adapter) == ("llama", str(llama), None)
    assert not found.is_embedded
    assert not found.is_classifier
    assert found.base_name == str(llama)


def test_hub_id_leads_to_the_hub(cached: str) -> None:
    found = locate(cached)
    assert (found.base, found.adapter, found.config.model_type) == (cached, None, "llama")


@pytest.mark.parametrize("name", ["./none", "/no/such", "../none/here", "a/b/c", "~/perlcli-none"])
def test_folder_that_is_missing_is_told(name: str) -> None:
    with pytest.raises(PerlError, match=f"^--model {name} does not exist$"):
        locate(name)


def test_hub_id_that_cannot_be_had_is_told() -> None:
    with pytest.raises(
        PerlError, match=r"^--reward nobody/nothing is not a local folder, and .*\nHint: check the name"
    ):
        locate("nobody/nothing", option="--reward")


def test_file_is_told(llama: Path) -> None:
    with pytest.raises(PerlError, match=r"config\.json is a file\nHint: name the folder"):
        locate(str(llama / "config.json"))


def test_folder_without_a_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(PerlError, match="can't be read as a model"):
        locate(str(tmp_path))


def test_adapter_leads_to_its_base(llama: Path, tmp_path: Path) -> None:
    adapter = adapter_folder(tmp_path / "adapter", str(llama))
    found = locate(str(adapter))
    assert (found.base, found.adapter, found.config.model_type) == (str(llama), str(adapter), "llama")
    assert not found.is_classifier


def test_adapter_of_a_hub_base_leads_to_the_hub(cached: str, tmp_path: Path) -> None:
    assert locate(str(adapter_folder(tmp_path / "adapter", cached))).base == cached


def test_adapter_with_a_head_is_a_classifier(llama: Path, tmp_path: Path) -> None:
    assert locate(str(adapter_folder(tmp_path / "adapter", str(llama), "SEQ_CLS"))).is_classifier


def test_whole_classifier_is_a_classifier(llama: Path, tmp_path: Path) -> None:
    config = json.loads((llama / "config.json").read_text()) | {"architectures": ["LlamaForSequenceClassification"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert locate(str(tmp_path)).is_classifier


def test_adapter_whose_base_is_gone_is_told(tmp_path: Path) -> None:
    adapter = adapter_folder(tmp_path / "adapter", "/moved/away")
    message = f"^The adapter {adapter} belongs to the base /moved/away, which isn't there\nHint: put it back"
    with pytest.raises(PerlError, match=message):
        locate(str(adapter))


def test_adapter_without_a_base_is_told(tmp_path: Path) -> None:
    with pytest.raises(PerlError, match="does not say which base it belongs to"):
        locate(str(adapter_folder(tmp_path / "adapter", None)))


def test_adapter_config_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(PerlError, match=r"adapter_config\.json can't be read"):
        locate(str(tmp_path))


def test_adapter_of_another_environment_finds_the_embedded_base(tmp_path: Path) -> None:
    elsewhere = "/other/lib/python3.12/site-packages/perlcli/coffee/base"
    found = locate(str(adapter_folder(tmp_path / "adapter", elsewhere)))
    assert found.is_embedded
    assert found.base == str(coffee.BASE)


def test_base_that_an_adapter_names_from_here_is_found_from_anywhere(llama: Path, tmp_path: Path) -> None:
    """`trl --model_name_or_path llama` leaves such an adapter; what is trained on from it names the whole path."""
    (tmp_path / "llama").symlink_to(llama)
    base_model = loading.load_causal(locate(str(llama)), ModelSettings())
    roles.save_adapter(roles.new_adapter(base_model, LORA, "CAUSAL_LM"), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "llama"}))
    source = locate("adapter")
    assert source.base == str(llama.resolve())
    model = roles.load_adapter(loading.load_causal(source, ModelSettings()), str(source.adapter), trainable=True)
    roles.save_adapter(model, tmp_path / "again")
    again = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert again["base_model_name_or_path"] == source.base


def test_hub_adapter_without_a_tokenizer_takes_the_bases(llama: Path, tmp_path: Path) -> None:
    source = locate(in_hub_cache("adapter", adapter_folder(tmp_path / "adapter", str(llama))))
    assert (source.adapter, tokenizers.load_tokenizer(source).name_or_path) == ("org/adapter", str(llama))


def test_padding_that_a_reward_was_trained_with(llama: Path, gpt2: Path, classifier: Path, tmp_path: Path) -> None:
    adapter = adapter_folder(tmp_path / "adapter", str(llama), "SEQ_CLS")
    eos = AutoConfig.from_pretrained(llama).eos_token_id
    assert tokenizers.score_pad(locate(str(adapter))) == eos  # as the base's tokenizer says
    other = tokenizers.load_tokenizer(locate(str(llama)))
    other.save_pretrained(adapter)
    assert tokenizers.score_pad(locate(str(adapter))) == other.pad_token_id != eos  # as `perl reward` leaves it
    plain = adapter_folder(tmp_path / "plain", str(gpt2), "SEQ_CLS")
    assert (
        tokenizers.score_pad(locate(str(plain))) == AutoConfig.from_pretrained(gpt2).eos_token_id
    )  # as trl chooses it
    assert tokenizers.score_pad(locate(str(classifier))) == AutoConfig.from_pretrained(classifier).pad_token_id


# The modules that get an adapter

SPLIT = ["k_proj", "o_proj", "q_proj", "v_proj"]
OUT = ["k_proj", "out_proj", "q_proj", "v_proj"]
FUSED = ["dense", "query_key_value"]
GPT2 = ["attn.c_proj", "c_attn"]
ATTENTION: dict[str, list[str]] = {
    "llama": SPLIT, "mistral": SPLIT, "mixtral": SPLIT, "qwen2": SPLIT, "qwen2_moe": SPLIT, "qwen3": SPLIT,
    "gemma": SPLIT, "gemma2": SPLIT, "cohere": SPLIT, "olmo": SPLIT, "olmo2": SPLIT, "starcoder2": SPLIT,
    "stablelm": SPLIT, "smollm3": SPLIT, "granite": SPLIT, "gpt_oss": SPLIT, "gpt2": GPT2, "gpt_bigcode": GPT2,
    "opt": OUT, "gptj": OUT, "gpt_neo": OUT, "gpt_neox": FUSED, "falcon": FUSED, "bloom": FUSED, "persimmon": FUSED,
    "phi": ["dense", "k_proj", "q_proj", "v_proj"], "phi3": ["o_proj", "qkv_proj"], "codegen": ["out_proj", "qkv_proj"],
    "mpt": ["Wqkv", "out_proj"],
    "deepseek_v3": ["kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj"],
}  # fmt: skip


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


@pytest.mark.parametrize("kind", ["mamba", "xlstm"])
def test_architecture_without_attention_is_told_with_its_modules(kind: str) -> None:
    with pytest.raises(PerlError, match=r"^No attention found in .*; its linear modules: .*out_proj.*\nHint: .*--lora"):
        target_modules(named(AutoConfig.for_model(kind)), "attention")


def test_norm_named_after_attention_is_no_attention() -> None:
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
def test_named_modules_that_are_missing_are_told(wanted: str, missing: str) -> None:
    with pytest.raises(PerlError, match=f"the model has no module '{missing}'\nHint: its linear modules: down_proj, "):
        target_modules(named(AutoConfig.for_model("llama")), wanted)


def test_all_linear_leaves_the_output_head_alone(llama: Path) -> None:
    settings = LoraSettings(lora_r=2, lora_alpha=4, lora_target_modules="all-linear")
    model = roles.new_adapter(loading.load_causal(locate(str(llama)), ModelSettings()), settings, "CAUSAL_LM")
    adapted = {name.split(".lora_A")[0].rsplit(".", 1)[1] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == {*SPLIT, "gate_proj", "up_proj", "down_proj"}


# The tokenizer


def words(*vocabulary: str, template: str = "", **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of these words."""
    names = dict.fromkeys([*vocabulary, *special.values()])
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(names)}, unk_token=None))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **special)
    tokenizer.chat_template = template or None
    return tokenizer


PADS = {
    "own pad": (words("a", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"), "<pad>"),
    "pad is EOS": (words("a", eos_token="</s>", pad_token="</s>", unk_token="<unk>"), "<unk>"),
    "no pad": (words("a", eos_token="</s>", bos_token="<s>", unk_token="<unk>"), "<unk>"),
    "unk is EOS": (words("a", eos_token="</s>", unk_token="</s>", sep_token="<sep>"), "<sep>"),
    "special in the template": (
        words("a", "<0x00>", eos_token="</s>", sep_token="<sep>", template="{{ '<sep>' }}"),
        "<0x00>",
    ),
    "BOS alone": (words("a", "<0x00>", eos_token="</s>", bos_token="<s>"), "<0x00>"),
}


@pytest.mark.parametrize("case", PADS)
def test_pad_is_a_token_other_than_eos(case: str) -> None:
    tokenizer, pad = PADS[case]
    choose_pad(tokenizer)
    assert tokenizer.pad_token == pad
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


def test_pad_of_byte_level_vocabularies(llama: Path, gpt2: Path) -> None:
    assert tokenizers.load_tokenizer(locate(str(llama))).pad_token == "<|endoftext|>"  # its unk
    assert tokenizers.load_tokenizer(locate(str(gpt2))).pad_token == "Ā"  # the NUL byte: every special token is EOS


def test_tokenizer_without_a_token_to_pad_with_is_told() -> None:
    with pytest.raises(PerlError, match="no token besides EOS to pad with"):
        choose_pad(words("a", "b", eos_token="</s>"))


def test_tokenizer_comes_from_the_adapter_where_it_has_one(llama: Path, tmp_path: Path) -> None:
    adapter = adapter_folder(tmp_path / "adapter", str(llama))
    assert tokenizers.load_tokenizer(locate(str(adapter))).name_or_path == str(llama)
    own = tokenizers.load_tokenizer(locate(str(llama)))
    own.chat_template = "{{ messages }}"
    own.save_pretrained(adapter)
    assert tokenizers.load_tokenizer(locate(str(adapter))).chat_template == "{{ messages }}"


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_tokenizer_that_is_missing_is_told(model: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    shutil.copy(request.getfixturevalue(model) / "config.json", tmp_path)
    with pytest.raises(PerlError, match="has no tokenizer that can be read"):
        tokenizers.load_tokenizer(locate(str(tmp_path)))


def test_renderer_ends_at_every_token_of_the_generation_config(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "model")
    source = locate(str(tmp_path / "model"))
    tokenizer = tokenizers.load_tokenizer(source)
    assert tokenizers.renderer(source, tokenizer).eos_ids == (tokenizer.eos_token_id,)
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    assert tokenizers.renderer(source, tokenizer).eos_ids == (tokenizer.eos_token_id, 0)


def test_tokenizer_fingerprint_is_of_what_decides_tokens(llama: Path, gpt2: Path, tmp_path: Path) -> None:
    tokenizer = tokenizers.load_tokenizer(locate(str(llama)))
    mark = tokenizers.tokenizer_fingerprint(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    again.pad_token = "<|im_start|>"  # padding is masked: it decides nothing
    assert tokenizers.tokenizer_fingerprint(again) == mark
    assert tokenizers.tokenizer_fingerprint(tokenizers.load_tokenizer(locate(str(gpt2)))) != mark
    for change in ({"chat_template": "{{ messages }}"}, {"bos_token": "a"}, {"eos_token": "a"}):
        (name,) = change
        before = getattr(again, name)
        setattr(again, name, change[name])
        assert tokenizers.tokenizer_fingerprint(again) != mark
        setattr(again, name, before)
    again.add_tokens(["word"])
    assert tokenizers.tokenizer_fingerprint(again) != mark


# The fingerprint


def test_fingerprint_is_of_the_weights_wherever_they_lie(llama: Path, cached: str, tmp_path: Path) -> None:
    mark = weights.fingerprint(str(llama))
    shutil.copy(llama / "model.safetensors", tmp_path)
    assert mark
    assert weights.fingerprint(str(tmp_path)) == weights.fingerprint(cached) == mark
    assert sources.same_base(locate(str(llama)), locate(cached))


def test_fingerprint_notices_other_weights(llama: Path, gpt2: Path, tmp_path: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"] + 0.01
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert weights.fingerprint(str(tmp_path)) != weights.fingerprint(str(llama))
    assert not sources.same_base(locate(str(llama)), locate(str(gpt2)))


def test_fingerprint_covers_every_shard(llama: Path, tmp_path: Path) -> None:
    shutil.copy(llama / "model.safetensors", tmp_path / "model-00001-of-00002.safetensors")
    one = weights.fingerprint(str(tmp_path))
    shutil.copy(llama / "model.safetensors", tmp_path / "model-00002-of-00002.safetensors")
    assert weights.fingerprint(str(tmp_path)) != one


def test_fingerprint_of_an_adapter_in_the_hub_cache(sft_run: Path) -> None:
    assert weights.fingerprint(in_hub_cache("tuned", sft_run)) == weights.fingerprint(str(sft_run)) != ""


def test_fingerprint_of_an_adapter_is_of_what_it_does(sft_run: Path, tmp_path: Path) -> None:
    mark = weights.fingerprint(str(sft_run))
    for name in (weights.ADAPTER_WEIGHTS, weights.ADAPTER_CONFIG):
        shutil.copy(sft_run / name, tmp_path)
    config = tmp_path / weights.ADAPTER_CONFIG
    values = json.loads(config.read_text())
    for more, is_same in (({"base_model_name_or_path": "moved"}, True), ({"lora_alpha": 99}, False)):
        config.write_text(json.dumps(dict(reversed((values | more).items()))))
        assert (weights.fingerprint(str(tmp_path)) == mark) == is_same
    for damaged in ("[", "[1]", "7"):
        config.write_text(damaged)
        with pytest.raises(PerlError, match=r"adapter_config\.json can't be read"):
            weights.fingerprint(str(tmp_path))


def test_fingerprint_is_empty_where_there_are_no_weights(tmp_path: Path) -> None:
    assert weights.fingerprint("nobody/nothing") == weights.fingerprint(str(tmp_path)) == ""


def test_bases_without_weights_to_compare_are_not_the_same(llama: Path) -> None:
    config = locate(str(llama)).config
    assert not sources.same_base(Source("a", "nobody/one", config), Source("b", "nobody/two", config))
    assert sources.same_base(Source("a", "nobody/one", config), Source("b", "nobody/one", config))


# Loading


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


def test_model_that_cannot_be_loaded_is_told(llama: Path, tmp_path: Path) -> None:
    shutil.copy(llama / "config.json", tmp_path)
    for content in (None, b"no safetensors"):
        if content:
            (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(PerlError, match=f"The model {tmp_path} can't be loaded"):
            loading.load_causal(locate(str(tmp_path)), ModelSettings())


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


def test_the_embedded_base_is_known_in_another_environment_too(tmp_path: Path) -> None:
    """An adapter of another checkout or environment names that one's copy."""
    copy = tmp_path / "perlcli" / "coffee" / "base"
    shutil.copytree(coffee.BASE, copy)
    assert sources.locate(str(copy)).is_embedded
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    assert not sources.locate(str(copy)).is_embedded


# What files of a model or an adapter may hold by damage or malice


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"base_model_name_or_path": [1]}, "base_model_name_or_path must be text, not [1]"),
        ({"base_model_name_or_path": "x" * 300}, "names is too long for a file name"),
        ({"target_modules": {"a": 1}}, "target_modules must be text or list, not {'a': 1}"),
        ({"lora_dropout": [0]}, "lora_dropout must be a number, not [0]"),
        ({"target_modules": "(.*)*x"}, "what chooses the modules is a regular expression that took longer than 2 s"),
        ({"target_modules": "("}, "what chooses the modules is no regular expression"),
        ({"rank_pattern": {"(": 1}}, "what chooses the modules is no regular expression"),
    ],
)
def test_a_config_of_an_adapter_that_can_not_be_used_is_told(change: Any, told: str, tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "adapter", str(coffee.BASE))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(PerlError, match=r"adapter_config\.json") as caught:
        locate(str(folder))
    assert told in caught.value.problem


def test_a_config_of_an_adapter_that_is_nested_too_deeply_is_told(tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "adapter", None)
    (folder / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(PerlError, match=r"adapter_config\.json can't be read: maximum recursion depth"):
        locate(str(folder))


@pytest.mark.parametrize(
    "header",
    [b"", b"\xff" * 8, b"\x02" + b"\0" * 7 + b"[]", b"\x08" + b"\0" * 7 + b'{"a": 1}',
     b"\x09" + b"\0" * 7 + b'{"a": {}}', b"\x1f" + b"\0" * 7 + b'{"a": {"data_offsets": [-9, 1]}}'],
    ids=repr,
)  # fmt: skip
def test_weights_with_a_broken_header_are_damaged(header: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(header)
    with pytest.raises(PerlError, match=r"model\.safetensors is damaged: its header can't be read"):
        weights.fingerprint(str(tmp_path))


@pytest.mark.parametrize("end", ["x", [1, "x"], {"a": 1}, [[1]]])
def test_an_end_of_text_that_is_no_number_is_told(end: Any, tmp_path: Path) -> None:
    shutil.copytree(coffee.BASE, tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    with pytest.raises(PerlError, match=r"eos_token_id must be a number|generation_config.json can't be read"):
        tokenizers.eos_ids(locate(str(tmp_path / "base")))


def test_architectures_that_are_no_names_are_none() -> None:
    assert sources.architectures(SimpleNamespace(architectures=[41, None, "LlamaForCausalLM"])) == ["LlamaForCausalLM"]
    assert sources.architectures(SimpleNamespace(architectures="Llama")) == []


def test_a_tokenizer_that_can_not_encode_is_told(tmp_path: Path) -> None:
    shutil.copytree(coffee.BASE, tmp_path / "base")
    path = tmp_path / "base" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": {}}))
    with pytest.raises(PerlError, match="has no tokenizer that can be read"):
        tokenizers.load_tokenizer(locate(str(tmp_path / "base")))
