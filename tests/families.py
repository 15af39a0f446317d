"""Families of causal models, tiny and random: their configs, tokenizers and chat templates."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

VOCABULARY, IMAGE = 512, 509  # tokens of a model, of which the tokenizer has fewer; the token where an image goes
Config = dict[str, Any]

# The sizes of all families under the names that their configs have for them; a config takes those it knows.
SMALL: Config = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff", "dff"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 512),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(
        ("n_shared_experts", "moe_num_shared_experts", "first_k_dense_replace", "n_group", "topk_group"), 1
    ),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "global_head_dim"), 8),
    **dict.fromkeys(("rotary_dim", "query_pre_attn_scalar", "hidden_size_per_layer_input", "state_size"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_state", "mamba_dt_rank"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "linear_num_value_heads", "mamba_d_conv", "conv_kernel"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_chunk_size", "chunk_size"), 16),
    **dict.fromkeys(("num_key_value_heads", "num_global_key_value_heads", "linear_num_key_heads", "mamba_expand"), 2),
    **dict.fromkeys(("n_groups", "mamba_n_groups", "ssm_mamba_n_groups"), 1),
    **dict.fromkeys(("sliding_window", "local_attention", "mamba_d_ssm", "attention_chunk_size"), 64),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("attn_layer_period", "expert_layer_period"), 2),
    **dict.fromkeys(("attn_layer_offset", "expert_layer_offset"), 1),
    "expand": 2,
    "pad_token_id": 0,
    "initializer_range": 0.1,  # larger than theirs, so that two steps of training show in the logits
    "use_mamba_kernels": False,
}
# The same of an image's tower and of the projector behind it.
SMALL_TOWER: Config = {
    **dict.fromkeys(("hidden_size", "out_hidden_size", "embed_dim", "vision_output_dim"), 32),
    **dict.fromkeys(("projector_input_dim", "projector_output_dim", "projector_hidden_size", "hidden_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "depth", "pooling_kernel_size"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "num_key_value_heads"), 4),
    **dict.fromkeys(("intermediate_size", "position_embedding_size", "num_position_embeddings"), 64),
    "patch_size": 16,
    "image_size": 32,
    "deepstack_visual_indexes": [0],
}
TOKEN_IDS = tuple(
    f"{what}_token_{kind}"
    for what in ("image", "video", "audio", "boi", "eoi", "boa", "eoa", "vision_start", "vision_end")
    for kind in ("id", "index")
)


CHATML, IMAGES = "chatml", "multimodal"
KINDS = {
    "dense": """llama mistral qwen2 qwen3 gemma gemma2 gemma3_text gemma4_text phi phi3 gpt2 gpt_neox gpt_bigcode opt
        bloom mpt falcon ctrl xglm biogpt starcoder2 olmo2 granite cohere2 glm4 nemotron smollm3 seed_oss ernie4_5
        exaone4 apertus""",
    "mixture of experts": """mixtral qwen2_moe qwen3_moe gpt_oss olmoe phimoe deepseek_v3 glm4_moe granitemoe minimax
        ernie4_5_moe llama4_text""",
    "hybrid": """jamba bamba falcon_h1 granitemoehybrid nemotron_h recurrent_gemma zamba2 lfm2 qwen3_next
        qwen3_5_moe_text""",
    "state-space": "mamba mamba2 falcon_mamba rwkv",
    IMAGES: "gemma3 gemma4 qwen3_5 llama4 mistral3 qwen3_vl qwen2_5_vl llava smolvlm",
}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
LATENT = {"num_key_value_heads": 4}  # attention whose keys and values come from one vector for all heads
SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
LLAMA4 = {"intermediate_size_mlp": 64, "moe_layers": [1], "interleave_moe_layer_step": 1}
# What a family needs that differs from SMALL
OWN: dict[str, Config] = {
    "bamba": {"attn_layer_indices": [1]},
    "deepseek_v3": LATENT,
    "gemma4": SLIDING | {"num_kv_shared_layers": 0},
    "gemma4_text": SLIDING | {"num_kv_shared_layers": 0},
    "gpt2": dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),  # its first loss is compared
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "llama4": LLAMA4,
    "llama4_text": LLAMA4,
    "mamba2": {"num_heads": 8},
    "nemotron_h": {"layers_block_type": ["mamba", "attention"]},
    "qwen2_5_vl": SECTIONS,
    "qwen3_5": LINEAR,
    "qwen3_5_moe_text": LINEAR,
    "qwen3_next": LINEAR,
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 64, "block_types": ["recurrent", "attention"]},
    "zamba2": {"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid"] * 2, "hybrid_layer_ids": [1, 3]},
}
# The chat templates that trl packages for some of them; the others have ChatML
TEMPLATES = {
    "gemma": "gemma",
    "gemma2": "gemma",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "glm4_moe": "glm4moe",
    "gpt_oss": "gptoss",
    "llama": "llama3",
    "phi3": "phi3",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3",
}


@dataclass(frozen=True)
class Family:
    """One family of models by its `model_type` in transformers."""

    name: str
    kind: str

    @property
    def template(self) -> str:
        """The name of its chat template."""
        return TEMPLATES.get(self.name, CHATML)


FAMILIES = [Family(name, kind) for kind, names in KINDS.items() for name in names.split()]


# Models


def config_of(family: Family) -> Any:
    """The tiny config of a family."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind, own = CONFIG_MAPPING[family.name], OWN.get(family.name, {})
    plain = kind()
    parts = getattr(kind, "sub_configs", {})
    if "text_config" not in parts:
        return kind(**_small(plain, SMALL) | own)
    values = _small(plain, dict.fromkeys(TOKEN_IDS, IMAGE) | {"mm_tokens_per_image": 4})
    for name in parts:
        part = getattr(plain, name, None)
        if part is None:
            continue
        of_part = _small(part, SMALL) | own if name == "text_config" else _small(part, SMALL_TOWER)
        values[name] = type(part)(**of_part)
    return kind(**values)


def _small(plain: Any, sizes: Config) -> Config:
    """The sizes that a config knows as fields."""
    fields = {name for kind in type(plain).__mro__ for name in getattr(kind, "__annotations__", {})}
    return {name: value for name, value in sizes.items() if name in fields | vars(plain).keys()}


def build(family: Family, folder: Path) -> Path:
    """Writes a random model of the family with a tokenizer, as the Hub has it, and returns the folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    tokenizer = tokenizer_with(family.template)
    config = config_of(family)
    text = config.get_text_config()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(text, name, getattr(tokenizer, name))
    torch.manual_seed(0)
    auto = AutoModelForImageTextToText if family.kind == IMAGES else AutoModelForCausalLM
    model = auto.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@cache
def tokenizer_with(template: str) -> Any:
    """A byte-level tokenizer with a chat template of a known family."""
    from transformers import PreTrainedTokenizerFast

    first, end, text = template_of(template)
    raw = _raw_tokenizer()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=first, eos_token=end, pad_token="<pad>")
    tokenizer.chat_template = text
    return tokenizer


CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The first token of a text, if there is one, and the token that ends a turn.
ENDS = {
    CHATML: (None, "<|im_end|>"),
    "qwen3": (None, "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
    "gemma": ("<bos>", "<end_of_turn>"),
    "gemma3": ("<bos>", "<end_of_turn>"),
    "phi3": ("<s>", "<|end|>"),
    "glm4moe": (None, "<|endoftext|>"),
    "gptoss": ("<|startoftext|>", "<|return|>"),
}
OTHER_TOKENS = (
    "<|im_start|>",
    "<think>",
    "</think>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<start_of_turn>",
    "<|start|>",
    "<|channel|>",
    "<|message|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
)


def template_of(name: str) -> tuple[str | None, str, str]:
    """A chat template as trl packages it, with the tokens around a text."""
    import trl

    path = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    return (*ENDS[name], CHATML_TEMPLATE if name == CHATML else path.read_text(encoding="utf-8"))


QUESTIONS = [
    ("What is the capital of France?", "It is Paris.", "No."),
    ("Write about the sea.", "The sea and the sky are blue.", "Sea."),
    ("Count to three, please.", "One, two, three.", "Three, two"),
    ("Who are you?", "A friend.", "I would like coffee with milk and sugar."),
]


@cache
def _raw_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = ["<pad>", *sorted({token for pair in ENDS.values() for token in pair if token}), *OTHER_TOKENS]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator([f"{question} {answer} user assistant" for question, answer, _ in QUESTIONS * 20], trainer)
    return raw
