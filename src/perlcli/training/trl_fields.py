"""Which fields of TRL's configs `--set` takes, and why not the others. Each field of `SFTConfig`, `RewardConfig` and
`RLOOConfig` is an option of perlcli, or in one of these tables."""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import GenerationConfig
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS

from perlcli import settings
from perlcli.errors import nearest
from perlcli.rollouts.how import FULL
from perlcli.settings.declaring import Option
from perlcli.settings.faults import limit_fault
from perlcli.settings.trl_names import NAMES
from perlcli.settings.types import describe, fits
from perlcli.settings.yaml import parse
from perlcli.text import clip, shorten

Table = Mapping[str, str]


def _by_name(table: Table) -> dict[str, str]:
    """A table from reasons to names, as one from each name to its reason."""
    return {name: reason for reason, names in table.items() for name in names.split()}


OPTIONS = {  # fields that an option of another name sets
    **dict.fromkeys(("assistant_only_loss", "completion_only_loss"), "loss_on"),
    **dict.fromkeys(("bf16", "fp16"), "dtype"),
    "output_dir": "output",
    "resume_from_checkpoint": "resume",
    "chat_template_path": "chat_template",
    "activation_checkpointing": "gradient_checkpointing",
    "auto_find_batch_size": "auto_batch",
    **dict.fromkeys(("use_vllm", "use_transformers_continuous_batching", "use_transformers_paged"), "rollouts"),
    "dataset_text_field": "columns",
}
# Reasons for fields that `trl_names` doesn't decide: outside `--set` these are passed on, and so refused here.
REFUSED = _by_name(
    {
        "a resumed run ends as an uninterrupted one": "dataloader_in_order",
        "held-out rows are evaluated once, after training": "eval_accumulation_steps include_for_metrics label_names "
        "prediction_loss_only do_train",
        "perlcli counts tokens itself": "include_num_input_tokens_seen",
        "perlcli measures memory itself": "skip_memory_metrics",
        "training keeps no cache": "use_cache",
        "--set packing=true leaves out padding and keeps rows apart": "padding_free",
        "use --set gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
        "it computes the base's layers differently from the model that is saved": "use_liger_kernel "
        "liger_kernel_config",
    }
)
NO_EFFECT = "it has no effect in this stage"
REFUSED_BY: dict[str, dict[str, str]] = {  # in a single config
    "SFTConfig": {},
    "RewardConfig": _by_name(
        {
            NO_EFFECT: "label_smoothing_factor per_device_eval_batch_size",
            "transformers can't group pairs by their length": "train_sampling_strategy length_column_name",
        }
    ),
    "RLOOConfig": _by_name(
        {
            NO_EFFECT: "label_smoothing_factor per_device_eval_batch_size data_seed train_sampling_strategy "
            "length_column_name",
            "noise would part the policy from its anchor": "neftune_noise_alpha",
            "adapters are switched on one base in every step": "torch_compile torch_compile_backend torch_compile_mode",
        }
    ),
}
ALLOWED = {
    field
    for fields in (
        # optimiser and schedule
        "adam_beta1 adam_beta2 adam_epsilon max_grad_norm optim_args optim_target_modules weight_decay",
        "lr_scheduler_type lr_scheduler_kwargs warmup_steps",
        # rows and batches
        "data_seed dataloader_drop_last dataloader_multiprocessing_context dataloader_num_workers",
        "dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor length_column_name packing",
        "packing_strategy pad_to_multiple_of per_device_eval_batch_size shuffle_dataset",
        "train_sampling_strategy",
        # loss
        "center_rewards_coefficient disable_dropout epsilon epsilon_high label_smoothing_factor loss_type",
        "mask_truncated_completions neftune_noise_alpha normalize_advantages reward_clip_range router_aux_loss_coef",
        # sampling
        "cache_implementation generation_batch_size generation_kwargs num_iterations steps_per_generation",
        # memory and speed
        "activation_offloading gradient_checkpointing_kwargs tf32 torch_compile torch_compile_backend",
        "torch_compile_mode torch_empty_cache_steps",
        # trackers and messages
        "log_level project run_name trackio_bucket_id trackio_space_id trackio_static_space_id",
    )
    for field in fields.split()
}


def why_refused(name: str, config: str, own: set[str]) -> str:
    """Why `--set` doesn't take a field of this config; empty if it does. `own` are the names of the stage's options."""
    if name in own or OPTIONS.get(name) in own:
        return f": use the option --{settings.dashed(OPTIONS.get(name, name))}"
    reason = REFUSED.get(name) or REFUSED_BY.get(config, {}).get(name) or _why_decided(name)
    if not reason and name not in ALLOWED:
        reason = f"perlcli doesn't know what this field of {config} changes"  # a later version of TRL added it
    return f" can't be used: {reason}" if reason else ""


def _why_decided(name: str) -> str:
    """Why perlcli decides a name of trl itself; empty if it doesn't."""
    decided = NAMES.get(name)
    return (decided.why or decided.note) if decided is not None else ""


# Values

EVALUATING = ("reduce_lr_on_plateau", "greedy")  # schedules that need a figure from evaluation
LOSSES = ("nll", "dft")  # of SFTTrainer, which checks the name once the model is loaded (TRL 1.16)
MAPPINGS = ("gradient_checkpointing_kwargs", "generation_kwargs", "lr_scheduler_kwargs")
SCIENTIFIC = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def _limits(names: str, **limits: Any) -> dict[str, Option]:  # noqa: ANN401
    """Limits for some fields, as an option has them."""
    facts: dict[str, Any] = {"group": "", "panel": "", "type": float, "default": None, "help": ""} | limits
    return {name: Option(name=name, **facts) for name in names.split()}


LIMITS = {
    **_limits("num_iterations steps_per_generation generation_batch_size per_device_eval_batch_size", ge=1),
    **_limits("pad_to_multiple_of torch_empty_cache_steps", ge=1),
    **_limits("epsilon epsilon_high max_grad_norm weight_decay neftune_noise_alpha", ge=0),
    **_limits("center_rewards_coefficient router_aux_loss_coef data_seed", ge=0),
    **_limits("adam_beta1 adam_beta2 label_smoothing_factor", ge=0, lt=1),
    **_limits("adam_epsilon", gt=0),
    # each is a process: a slip of the keyboard would fill the machine
    **_limits("dataloader_num_workers", ge=0, le=256),
}
CHECKPOINTING: dict[str, Any] = {
    **dict.fromkeys(("use_reentrant", "preserve_rng_state", "debug", "early_stop"), bool),
    "determinism_check": str,
}
# Of `generation_kwargs`: what only changes how tokens are computed, what is an option, and why not the others.
COMPUTING: dict[str, Any] = {"use_cache": bool, "prefill_chunk_size": int | None, "cache_implementation": str | None}
GENERATION_OPTIONS = {
    **{name: name for name in ("temperature", *FULL)},
    "stop_strings": "stop",
    "min_new_tokens": "min_completion_length",
    "max_new_tokens": "max_completion_length",
    "max_length": "max_completion_length",
}
TRAINING_ONLY = "it would change what completions are sampled from, in training only"
GENERATION_REFUSED = _by_name(
    {
        "they follow from the tokenizer and the model": "eos_token_id pad_token_id bos_token_id decoder_start_token_id "
        "forced_bos_token_id forced_eos_token_id",
        "RL samples; it doesn't search": "do_sample num_beams num_beam_groups early_stopping length_penalty "
        "diversity_penalty constraints force_words_ids low_memory penalty_alpha dola_layers",
        "each prompt has --num-generations completions": "num_return_sequences",
        "TRL reads token ids only": "return_dict_in_generate output_attentions output_hidden_states output_logits "
        "output_scores",
        "the clock would decide where a completion ends": "max_time",
        "speculative decoding takes one prompt at a time": "assistant_confidence_threshold assistant_early_exit "
        "assistant_ensemble_weight assistant_lookbehind is_assistant max_matching_ngram_size num_assistant_tokens "
        "num_assistant_tokens_schedule prompt_lookup_num_tokens speculation_type target_lookbehind use_mtp",
        "it would hide a NaN or infinite logit, which stops a run": "remove_invalid_values",
        "it has no effect here": "disable_compile compile_config continuous_batching_config renormalize_logits "
        "transformers_version cache_config max_cache_len",
    }
)


def nested(name: str, value: Any) -> Iterator[str]:  # noqa: ANN401
    """What is wrong with or inside the value of a field that perlcli takes, as the rest of a line that begins with
    --set. The value has the field's type."""
    if isinstance(value, int | float) and name in LIMITS and (fault := limit_fault(LIMITS[name], value)):
        yield f"{name} {fault}"
    if name in MAPPINGS and value is not None and not isinstance(value, dict):
        yield f"{name} must be a mapping, not {shorten(value)}"
    elif name == "gradient_checkpointing_kwargs":
        yield from _checkpointing(name, value or {})
    elif name == "generation_kwargs":
        yield from _generation(name, value or {})
    elif name == "cache_implementation" and value is not None:
        yield from _cache(name, value)
    if name == "lr_scheduler_type" and value in EVALUATING:
        yield f"{name}={value} can't be used: it needs figures from evaluation, which comes after training"
    if name == "loss_type" and value not in LOSSES:
        yield f"{name} must be one of {', '.join(LOSSES)}, not {shorten(value)}"
    if name == "optim_args" and not all(
        re.fullmatch(r"\s*\w+\s*=[^=]+", part) for part in str(value or "a=1").split(",")
    ):
        yield f"{name} must be NAME=VALUE, comma-separated, not {shorten(value)}"
    if name == "reward_clip_range" and value is not None and not value[0] < value[1]:
        yield f"{name} must be the lower and the higher limit, not {shorten(list(value))}"
    ways = multiprocessing.get_all_start_methods()
    if name == "dataloader_multiprocessing_context" and value not in (None, *ways):
        yield f"{name} must be one of {', '.join(ways)}, not {shorten(value)}"


def as_mapping(value: Any, kind: object) -> Any:  # noqa: ANN401
    """A mapping that was quoted as text, which TRL accepts as JSON, as a mapping, and numbers like 1e-6 in a mapping,
    which YAML 1.1 reads as text, as numbers; any other value as it is."""
    if isinstance(value, str) and value.lstrip().startswith("{") and fits({}, kind):
        value = parse(value, "--set")
    if not isinstance(value, dict):
        return value
    return {key: float(item) if SCIENTIFIC.fullmatch(str(item)) else item for key, item in value.items()}


def _checkpointing(name: str, value: Mapping[Any, object]) -> Iterator[str]:
    for key, item in value.items():
        if key not in CHECKPOINTING:
            yield f"{name}: no such key: {clip(str(key))}. {nearest(str(key), CHECKPOINTING)}".rstrip()
        elif not fits(item, CHECKPOINTING[key]):
            yield f"{name}: {key} must be {describe(CHECKPOINTING[key])}, not {shorten(item)}"


def _generation(name: str, value: Mapping[Any, object]) -> Iterator[str]:
    known = {key for key in GenerationConfig().to_dict() if not key.startswith("_")}
    for key, item in value.items():
        if key in GENERATION_OPTIONS:
            yield f"{name}: {key}: use the option --{settings.dashed(GENERATION_OPTIONS[key])}"
        elif key not in known:
            yield f"{name}: no such key: {clip(str(key))}. {nearest(str(key), known)}".rstrip()
        elif key not in COMPUTING:
            yield f"{name}: {key} can't be used: {GENERATION_REFUSED.get(key, TRAINING_ONLY)}"
        elif not fits(item, COMPUTING[key]):
            yield f"{name}: {key} must be {describe(COMPUTING[key])}, not {shorten(item)}"
        elif key == "cache_implementation" and item is not None:
            yield from _cache(f"{name}: {key}", str(item))


def _cache(name: str, kind: str) -> Iterator[str]:
    if kind == "quantized":
        yield f"{name}={kind} can't be used: the policy would sample from rounded keys and values"
    elif kind not in ALL_CACHE_IMPLEMENTATIONS:
        known = sorted(set(ALL_CACHE_IMPLEMENTATIONS) - {"quantized"})
        yield f"{name} must be one of {', '.join(known)}, not {shorten(kind)}"
