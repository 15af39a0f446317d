"""Families of causal models, tiny and random: their configs, and what each stage makes of them (docs/models.md).

    python tests/families.py            # runs all families, and writes docs/models.json
    python tests/families.py llama opt  # runs two, and prints what came of them
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

OUTCOMES = Path(__file__).parents[1] / "docs" / "models.json"
STAGES = ("sft", "reward", "rl", "eval", "merge")
OK, REFUSED, FAILED, NOTHING = "ok", "refused", "failed", "-"
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
    **dict.fromkeys(("n_shared_experts", "moe_num_shared_experts", "first_k_dense_replace", "n_group", "topk_group"), 1),
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


@dataclass(frozen=True)
class Family:
    """One kind of model. `config` has what differs from SMALL, `tower` the same for the vision tower."""

    name: str  # its model_type in transformers
    kind: str
    config: Config = field(default_factory=dict)
    tower: Config = field(default_factory=dict)
    template: str = "chatml"


DENSE, MOE, HYBRID, STATE_SPACE, IMAGES = "dense", "mixture of experts", "hybrid", "state-space", "multimodal"
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
CONV = {"layer_types": ["conv", "full_attention"]}
MLA = {"num_key_value_heads": 4}  # attention whose keys and values come from one vector for all heads
SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
TEMPLATES = {
    "llama": "llama3",
    "gemma": "gemma",
    "gemma2": "gemma",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3",
    "cohere": "cohere",
    "cohere2": "cohere2",
    "phi3": "phi3",
    "glm4_moe": "glm4moe",
    "gpt_oss": "gptoss",
}


def _families(kind: str, names: str, own: Mapping[str, Config] | None = None) -> list[Family]:
    special = own or {}
    return [Family(name, kind, special.get(name, {}), template=TEMPLATES.get(name, "chatml")) for name in names.split()]


FAMILIES = [
    *_families(
        DENSE,
        "llama mistral ministral ministral3 qwen2 qwen3 gemma gemma2 gemma3_text gemma4_text gemma3n_text phi phi3 gpt2 gpt_neo gpt_neox gptj"
        " gpt_bigcode opt bloom mpt falcon codegen xglm biogpt ctrl openai-gpt stablelm starcoder2 olmo olmo2 olmo3 granite"
        " cohere cohere2 glm glm4 nemotron persimmon helium smollm3 arcee seed_oss ernie4_5 exaone4 hunyuan_v1_dense"
        " apertus bitnet nanochat vaultgemma diffllama modernbert-decoder cwm youtu jais2 internlm3 minicpm3 doge mellum",
        {
            "gemma4_text": {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0},
            "gemma3n_text": {
                "intermediate_size": [64, 64],
                "num_kv_shared_layers": 0,
                "laurel_rank": 8,
                "altup_num_inputs": 2,
            },
            "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
            "youtu": MLA,
            "minicpm3": MLA,
        },
    ),
    *_families(
        MOE,
        "mixtral qwen2_moe qwen3_moe gpt_oss olmoe phimoe deepseek_v2 deepseek_v3 dots1 ernie4_5_moe flex_olmo glm4_moe"
        " granitemoe granitemoeshared hunyuan_v1_moe minimax minimax_m2 jetmoe afmoe llama4_text glm4_moe_lite exaone_moe solar_open",
        {
            "deepseek_v2": MLA,
            "deepseek_v3": MLA,
            "glm4_moe_lite": MLA,
            "llama4_text": {"intermediate_size_mlp": 64, "moe_layers": [1], "interleave_moe_layer_step": 1},
        },
    ),
    *_families(
        HYBRID,
        "jamba bamba falcon_h1 granitemoehybrid nemotron_h recurrent_gemma zamba zamba2 lfm2 lfm2_moe qwen3_next olmo_hybrid qwen3_5_text"
        " qwen3_5_moe_text kimi_linear",
        {
            "bamba": {"attn_layer_indices": [1]},
            "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
            "nemotron_h": {"layers_block_type": ["mamba", "attention"]},
            "recurrent_gemma": {"lru_width": 32, "attention_window_size": 64, "block_types": ["recurrent", "attention"]},
            "zamba": {"layer_types": ["mamba", "hybrid"] * 2, "num_hidden_layers": 4},
            "zamba2": {"layer_types": ["mamba", "hybrid"] * 2, "num_hidden_layers": 4, "hybrid_layer_ids": [1, 3]},
            "kimi_linear": LINEAR | MLA | {"linear_head_dim": 8, "linear_num_heads": 4},
            "lfm2": CONV,
            "lfm2_moe": CONV,
            "qwen3_next": LINEAR,
            "olmo_hybrid": LINEAR,
            "qwen3_5_text": LINEAR,
            "qwen3_5_moe_text": LINEAR,
        },
    ),
    *_families(STATE_SPACE, "mamba mamba2 falcon_mamba rwkv", {"mamba2": {"num_heads": 8, "head_dim": 8}}),
    *_families(
        IMAGES,
        "gemma3 gemma4 qwen3_5 qwen3_5_moe llama4 mistral3 qwen3_vl qwen3_vl_moe qwen2_vl qwen2_5_vl llava llava_next"
        " smolvlm idefics3 internvl aya_vision glm4v paligemma lfm2_vl cohere2_vision",
        {"gemma4": {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0},
            "llama4": {"intermediate_size_mlp": 64, "moe_layers": [1], "interleave_moe_layer_step": 1},
         "qwen2_vl": SECTIONS, "qwen2_5_vl": SECTIONS, "glm4v": SECTIONS,
         "qwen3_5": LINEAR, "qwen3_5_moe": LINEAR, "lfm2_vl": CONV},
    ),
]


# Models


def config_of(family: Family) -> Any:
    """The tiny config of a family."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family.name]
    plain = kind()
    parts = getattr(kind, "sub_configs", {})
    if "text_config" not in parts:
        return kind(**_small(plain, SMALL) | family.config)
    values = _small(plain, dict.fromkeys(TOKEN_IDS, IMAGE) | {"mm_tokens_per_image": 4})
    for name in parts:
        part = getattr(plain, name, None)
        if part is None:
            continue
        of_part = _small(part, SMALL) | family.config if name == "text_config" else _small(part, SMALL_TOWER) | family.tower
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


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The first token of a text, if there is one, and the token that ends a turn.
ENDS = {
    "chatml": (None, "<|im_end|>"),
    "qwen3": (None, "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
    "gemma": ("<bos>", "<end_of_turn>"),
    "gemma3": ("<bos>", "<end_of_turn>"),
    "cohere": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    "cohere2": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
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
    "<|START_OF_TURN_TOKEN|>",
    "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>",
)


def template_of(name: str) -> tuple[str | None, str, str]:
    """A chat template as trl packages it, with the tokens around a text."""
    import trl

    path = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    return (*ENDS[name], CHATML if name == "chatml" else path.read_text(encoding="utf-8"))


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


# Data: as many rows as a batch has, so that every batch has the same rows

QUESTIONS = [
    ("What is the capital of France?", "It is Paris.", "No."),
    ("Write about the sea.", "The sea and the sky are blue.", "Sea."),
    ("Count to three, please.", "One, two, three.", "Three, two"),
    ("Who are you?", "A friend.", "I would like coffee with milk and sugar."),
]


def write_data(folder: Path) -> None:
    """Demonstrations, pairs and prompts as JSONL."""
    for name, answers in (("demonstrations", ("completion",)), ("pairs", ("chosen", "rejected")), ("prompts", ())):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for question, *texts in QUESTIONS:
                row = {"prompt": [{"role": "user", "content": question}]}
                for key, text in zip(answers, texts, strict=False):
                    row[key] = [{"role": "assistant", "content": text}]
                file.write(json.dumps(row) + "\n")


# Runs


@dataclass(frozen=True)
class Outcome:
    """What became of a stage: OK, or REFUSED before weights loaded, or FAILED; with the error, and the seconds."""

    stage: str
    result: str
    text: str = ""
    seconds: float = 0.0


def brevity(completions: list[Any], **_: Any) -> list[float]:
    """A reward for short answers, where there is no reward model."""
    return [-float(len(str(completion))) for completion in completions]


STEPS = ("--max-steps", "2", "--per-device-train-batch-size", "4", "--gradient-accumulation-steps", "1")
SHORT = (*STEPS, "--learning-rate", "1e-2", "--max-length", "480", "--lora-r", "4", "--overwrite")


def words(stage: str, models: Mapping[str, Path], data: Path, folder: Path) -> list[str]:
    """The command line of a stage on the models that earlier stages made."""
    rl_batch = ("--num-generations", "2", "--max-completion-length", "6")
    policy, reward = models.get("sft", models["base"]), models.get("reward", "families:brevity")
    given = {
        "sft": ("--model", models["base"], "--data", data / "demonstrations.jsonl", *SHORT),
        "reward": ("--model", models["base"], "--data", data / "pairs.jsonl", *SHORT),
        "rl": ("--model", policy, "--reward", reward, "--data", data / "prompts.jsonl", *SHORT, *rl_batch),
        "eval": (
            *("--model", models.get("rl", policy), "--reward", reward, "--data", data / "prompts.jsonl", "--overwrite"),
            *("--max-length", "480", "--max-completion-length", "6"),
        ),
        "merge": (models.get("rl", models.get("sft", models.get("reward", ""))), "--overwrite"),
    }
    return [stage, *map(str, given[stage]), "--output", str(folder / stage)]


def run_stage(line: Sequence[str]) -> Outcome:
    """Runs a command in this process."""
    from typer.testing import CliRunner

    from perlcli.cli.app import app

    begun = time.perf_counter()
    output = Path(line[line.index("--output") + 1])
    result = CliRunner().invoke(app, list(line))
    seconds = time.perf_counter() - begun
    if result.exit_code == 0:
        return Outcome(line[0], OK, seconds=seconds)
    crashed = result.exception is not None and not isinstance(result.exception, SystemExit)
    text = f"{type(result.exception).__name__}: {result.exception}" if crashed else result.stderr.strip()
    refused = result.exit_code == 2 and not crashed and not output.exists()
    return Outcome(line[0], REFUSED if refused else FAILED, text, seconds)


def run_family(family: Family, data: Path, folder: Path) -> list[Outcome]:
    """What becomes of the family in every stage, each on what the stages before it made."""
    models = {"base": build(family, folder / "base")}
    outcomes = []
    for stage in STAGES:
        if stage == "merge" and not models.keys() & {"sft", "reward", "rl"}:
            outcomes.append(Outcome(stage, NOTHING))
            continue
        outcome = run_stage(words(stage, models, data, folder))
        outcomes.append(outcome)
        if outcome.result == OK:
            models[stage] = folder / stage
    return outcomes


def main(names: Iterable[str]) -> None:
    import gc

    chosen = [family for family in FAMILIES if not names or family.name in names or family.kind in names]
    top = Path(tempfile.mkdtemp())
    write_data(top)
    for family in chosen:
        begun = time.perf_counter()
        try:
            outcomes = run_family(family, top, top / family.name)
        except Exception as error:
            print(f"{family.name} NOT BUILT {type(error).__name__}: {str(error)[:300]}", flush=True)
            continue
        good = " ".join(f"{outcome.stage}={outcome.result}({outcome.seconds:.1f})" for outcome in outcomes)
        print(f"{family.name} [{time.perf_counter() - begun:.1f}s] {good}", flush=True)
        for outcome in outcomes:
            if outcome.text:
                print(f"    {outcome.stage}: {' | '.join(outcome.text.splitlines()[-4:])[-600:]}", flush=True)
        gc.collect()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1:])
