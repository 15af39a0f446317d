"""The names of trl (1.16, and older ones that its examples still have): the arguments of `trl sft`, `trl reward` and
`trl rloo`, which are the fields of ScriptArguments, ModelConfig, DatasetMixtureConfig, SFTConfig, RewardConfig and
RLOOConfig; and those of `accelerate launch`, which trl accepts too.

Names that are options of perlcli, with the same values, are in no table. A test compares the tables with the installed
trl: a field that a new version adds has to be put into one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypedDict, Unpack

from perlcli.settings.naming import PASSED, Kind, Name, listed, switch

DTYPES = ("bfloat16", "float16", "float32", "auto")
REWARDS = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")  # the short names of trl
OVERLONG = "get_soft_overlong_punishment"
OVERLONG_KWARGS = '{"max_completion_len": 1280, "soft_punish_cache": 256}'  # trl/scripts/rloo.py, trl 1.16


def _dtype(value: object) -> dict[str, Any]:
    return {"dtype": str(value).removeprefix("torch.")}


def _reward_functions(value: object) -> dict[str, Any]:
    """trl's short names and dotted paths as module:function, with the arguments that trl gives one of them."""
    names = listed(value)
    rewards = [_reward_function(name) for name in names]
    if OVERLONG not in names:
        return {"reward": rewards}
    return {"reward": rewards, "reward_kwargs": [OVERLONG_KWARGS if name == OVERLONG else "{}" for name in names]}


def _reward_function(name: str) -> str:
    if name in (*REWARDS, OVERLONG):
        return f"trl.rewards:{name}"
    module, _, function = name.rpartition(".")
    if not module or ":" in name or "/" in name:
        return name  # as perlcli writes it
    return f"{module}:{function}"


def _one_dataset(value: object) -> dict[str, Any]:
    """A mixture of one dataset. Raises ValueError for any other: perlcli reads one source."""
    options = {"path": "data", "name": "subset", "split": "split"}
    if not isinstance(value, list) or len(value) != 1 or not isinstance(value[0], dict):
        raise ValueError("one source is read; join the files of several, which `perl data convert` makes alike")
    given = {key: item for key, item in value[0].items() if item is not None}
    if unknown := [str(key) for key in given if key not in options]:
        raise ValueError(f"{', '.join(unknown)} can't be given for a dataset; use --data FILE, --columns")
    return {options[key]: item for key, item in given.items() if (key, item) != ("split", "train")}


def _resume(value: object) -> dict[str, Any]:
    text = str(value)
    return {} if text.lower() == "false" else {"resume": "latest" if text.lower() == "true" else text}


def _engine(name: str) -> Callable[[object], dict[str, Any]]:
    return lambda value: {"rollouts": name} if switch(value) else {}


def _group_by_length(value: object) -> dict[str, Any]:
    return {PASSED: {"train_sampling_strategy": "group_by_length"}} if switch(value) else {}


def _learned(value: object) -> dict[str, Any]:
    return {"loss_on": "assistant" if switch(value) else "all"}


def _learned_turns(value: object) -> dict[str, Any]:
    if not switch(value):
        raise ValueError("use --loss-on: all for every token, assistant for what follows the prompt")
    return {"loss_on": "assistant"}


def _saved_modules(value: object) -> dict[str, Any]:
    if [name for name in listed(value) if name not in ("score", "")]:
        raise ValueError("modules of the base are shared by all roles; only a reward's head is trained with an adapter")
    return {}


OUTSIDE = "perlcli trains in one process, on one GPU, which CUDA_VISIBLE_DEVICES chooses"
LOADED = "the model is loaded before TRL's trainer; see --dtype, --load-in-4bit and --load-in-8bit"
EVALUATED = "held-out rows are evaluated once, after training"
LOGGED = "every step is logged"
SAVED = "checkpoints are saved every --save-steps"
PUBLISHED = "perlcli publishes nothing; after the run: hf upload NAME FOLDER"
SHOWN = "perl eval writes completions to samples.jsonl"
VLLM = "vLLM runs in a process of its own: give this to its server, whose command `perl serve` prints"

# trl's name: the option with the same values.
RENAMED = {
    "model_name_or_path": "model",
    "sft_model_path": "model",
    "dataset_name": "data",
    "dataset_config": "subset",
    "output_dir": "output",
    "max_seq_length": "max_length",
    "chat_template_path": "chat_template",
    "reward_model_path": "reward",
    "rloo_k": "num_generations",
    "kl_coef": "beta",
    "response_length": "max_completion_length",
}


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Fields of TRL's configs that are passed on, as --set does; by the command that has them.
COMMON = (
    "adam_beta1 adam_beta2 adam_epsilon data_seed dataloader_drop_last dataloader_in_order "
    "dataloader_multiprocessing_context dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory "
    "dataloader_prefetch_factor eval_accumulation_steps gradient_checkpointing_kwargs include_num_input_tokens_seen "
    "label_smoothing_factor liger_kernel_config log_level lr_scheduler_kwargs lr_scheduler_type max_grad_norm "
    "neftune_noise_alpha optim_args optim_target_modules pad_to_multiple_of per_device_eval_batch_size project "
    "run_name skip_memory_metrics tf32 torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps "
    "trackio_bucket_id trackio_space_id trackio_static_space_id train_sampling_strategy use_cache use_liger_kernel "
    "warmup_steps weight_decay label_names length_column_name prediction_loss_only include_for_metrics"
)
OWN = {
    "sft": "activation_offloading loss_type packing packing_strategy padding_free router_aux_loss_coef shuffle_dataset",
    "reward": "activation_offloading center_rewards_coefficient disable_dropout",
    "rl": (
        "cache_implementation disable_dropout epsilon epsilon_high generation_batch_size generation_kwargs "
        "mask_truncated_completions min_p normalize_advantages num_iterations repetition_penalty reward_clip_range "
        "router_aux_loss_coef shuffle_dataset steps_per_generation top_k top_p"
    ),
}
FIELDS = {command: _names(f"{COMMON} {own}") for command, own in OWN.items()}
FLAGS = _names(
    "dataloader_drop_last dataloader_in_order dataloader_persistent_workers dataloader_pin_memory skip_memory_metrics "
    "tf32 torch_compile use_cache use_liger_kernel prediction_loss_only activation_offloading packing padding_free "
    "shuffle_dataset disable_dropout mask_truncated_completions normalize_advantages"
)
MANY = _names("include_for_metrics label_names optim_target_modules reward_clip_range")


class Facts(TypedDict, total=False):
    """What a name may declare that perlcli decides; `Name` says what each means."""

    kind: Kind
    why: str
    note: str
    fine: tuple[object, ...]


def _flags(names: str, **facts: Unpack[Facts]) -> dict[str, Name]:
    """Flags that are decided: false needs nothing."""
    facts["kind"] = "flag"
    facts.setdefault("fine", (False,))
    return _all(names, **facts)


def _all(names: str, **facts: Unpack[Facts]) -> dict[str, Name]:
    return {name: Name(**facts) for name in names.split()}


# Names whose values differ from those of the option.
READ: Mapping[str, Name] = {
    "dtype": Name("dtype", read=_dtype),
    "torch_dtype": Name("dtype", read=_dtype),
    "bf16": Name("dtype", kind="flag", read=lambda value: {"dtype": "bfloat16" if switch(value) else "float32"}),
    "fp16": Name("dtype", kind="flag", read=lambda value: {"dtype": "float16"} if switch(value) else {}),
    "use_peft": Name("full", kind="flag", read=lambda value: {"full": not switch(value)}),
    "max_steps": Name("max_steps", read=lambda value: {"max_steps": value}, fine=(-1,)),
    "activation_checkpointing": Name(
        "gradient_checkpointing", kind="flag", read=lambda value: {"gradient_checkpointing": str(switch(value)).lower()}
    ),
    "auto_find_batch_size": Name("auto_batch", kind="flag", read=lambda value: {"auto_batch": switch(value)}),
    "use_vllm": Name("rollouts", kind="flag", read=_engine("vllm")),
    "use_transformers_continuous_batching": Name("rollouts", kind="flag", read=_engine("continuous")),
    "use_transformers_paged": Name("rollouts", kind="flag", read=_engine("continuous")),
    "activation_checkpointing_kwargs": Name(PASSED, field="gradient_checkpointing_kwargs"),
    "dataset_train_split": Name("split", read=lambda value: {"split": value}, fine=("train",)),
    "datasets": Name("data", read=_one_dataset),
    "test_split_size": Name("eval_fraction", read=lambda value: {"eval_fraction": value}),
    "dataset_text_field": Name("columns", read=lambda value: {"columns": f"text={value}"}, fine=("text",)),
    "assistant_only_loss": Name("loss_on", kind="flag", read=_learned_turns),
    "completion_only_loss": Name("loss_on", kind="flag", read=_learned),
    "reward_model_name_or_path": Name("reward", read=lambda value: {"reward": [value]}),
    "reward_funcs": Name("reward", kind="many", read=_reward_functions),
    "resume_from_checkpoint": Name("resume", read=_resume),
    "warmup_ratio": Name(PASSED, field="warmup_steps"),  # a share of the steps, if below 1
    "use_liger": Name(PASSED, field="use_liger_kernel", kind="flag"),
    "group_by_length": Name(PASSED, field="train_sampling_strategy", kind="flag", read=_group_by_length),
    "lora_modules_to_save": Name("full", kind="many", read=_saved_modules),
}
# What perlcli decides itself, with what to use instead.
REFUSED: Mapping[str, Name] = {
    "model_revision": Name(
        why="the main revision is loaded; download another with `hf download NAME --revision X --local-dir FOLDER`, "
        "then use --model FOLDER",
        fine=("main",),
    ),
    "attn_implementation": Name(why="transformers chooses it (sdpa, where the model has it)", fine=("sdpa",)),
    "model_init_kwargs": Name(why=LOADED, fine=({},)),
    "lora_target_parameters": Name(kind="many", why="put target_parameters into a --peft file"),
    **_flags("use_rslora", why="put use_rslora into a --peft file"),
    "bnb_4bit_quant_type": Name(why="4 bits are NF4", fine=("nf4",)),
    "bnb_4bit_quant_storage": Name(why="4-bit weights are stored as uint8", fine=("uint8",)),
    **_flags("dataset_streaming streaming", why="rows are read before training starts, so that they can be checked"),
    "dataset_mixture": Name(why="one source is read; join the files, which `perl data convert` makes alike"),
    "dataset_test_split": Name(why="held-out rows are those of the test split; use --eval-data", fine=("test",)),
    "dataset_kwargs": Name(why="rows are rendered before TRL's trainer; see --columns and --chat", fine=({},)),
    "truncation_mode": Name(why="use --on-long: drop, truncate (never cuts the completion) or error"),
    "max_prompt_length": Name(why="use --max-length, which counts the prompt and the completion together"),
    "eval_packing": Name(kind="flag", why="held-out rows are never packed", fine=(False,)),
    **_flags("load_best_model_at_end", why=f"the last weights are kept: {EVALUATED}; see --save-total-limit"),
    **_flags("push_to_hub hub_always_push hub_private_repo", why=PUBLISHED),
    **_all("hub_model_id hub_token hub_strategy hub_revision", why=PUBLISHED),
    "vllm_mode": Name(why="vLLM runs in a process of its own; use --rollouts vllm", fine=("server",)),
    **_all("vllm_server_host vllm_server_port", why="use --vllm-server-base-url http://HOST:PORT"),
    **_flags("vllm_enable_sleep_mode", why=VLLM),
    **_all("vllm_gpu_memory_utilization vllm_max_model_length vllm_model_impl vllm_tensor_parallel_size", why=VLLM),
    "vllm_structured_outputs_regex": Name(why="the policy would learn from what it didn't choose to write"),
    "transformers_continuous_batching_config": Name(why="its cache is as large as the completions need", fine=({},)),
    **_flags("sync_ref_model", why="the anchor stays fixed; use --anchor to choose it"),
    **_all("ref_model_mixup_alpha ref_model_sync_steps", why="the anchor stays fixed; use --anchor to choose it"),
    **_flags("use_cpu no_cuda", why="a GPU is used if there is one; CUDA_VISIBLE_DEVICES= hides it"),
    **_flags("full_determinism", why="use --seed; deterministic kernels are set by torch's own environment variables"),
    **_flags("save_only_model", why="checkpoints are complete, so that --resume continues exactly"),
    **_flags("ignore_data_skip", why="a resumed run continues with the rows that an uninterrupted one would read"),
    **_flags("enable_jit_checkpoint", why="Ctrl-C and SIGTERM save a checkpoint already"),
    **_flags("restore_callback_states_from_checkpoint", why="--resume restores them"),
    **_flags("overwrite_output_dir", why="use --overwrite, which replaces the folder"),
    "debug": Name(
        kind="many", why="losses and gradients are checked; --debug shows the traceback of an error", fine=("",)
    ),
    "logging_dir": Name(why="metrics are in the output folder; trackers have environment variables for their folders"),
    "env": Name(why="a settings file sets no environment variables; put them before the command: NAME=VALUE perl …"),
    **_all("num_processes num_machines", why=OUTSIDE, fine=(1,)),
    **_all("accelerate_config config_file", why=OUTSIDE, fine=("single_gpu",)),
    **_all("gpu_ids machine_rank main_process_ip main_process_port", why=OUTSIDE),
    **_flags("multi_gpu use_deepspeed use_fsdp", why=OUTSIDE),
    "mixed_precision": Name(why="use --dtype"),
    **_all("deepspeed fsdp fsdp_config accelerator_config parallelism_config zero_stage", why=OUTSIDE, fine=("", {})),
    **_flags("ignore_bias_buffers ddp_find_unused_parameters ddp_broadcast_buffers ddp_static_graph", why=OUTSIDE),
    **_all("ddp_backend ddp_bucket_cap_mb", why=OUTSIDE),
    "local_rank": Name(why=OUTSIDE, fine=(-1, 0)),
}
# What has no effect on what is learned, with what happens here.
NOTED: Mapping[str, Name] = {
    "lora_task_type": Name(note="the command decides it", fine=("SEQ_CLS", "CAUSAL_LM")),
    **_flags("use_bnb_nested_quant", note="quantisation constants are always quantised too", fine=(True,)),
    **_all("eos_token", note="an answer ends as in the chat template"),
    **_all("pad_token", note="padding is masked"),
    **_all("dataset_num_proc dataset_batch_size", note="tokens are cached between runs"),
    **_flags("remove_unused_columns", note="every stage keeps the columns that it needs", fine=(True, False)),
    **_all("logging_steps logging_strategy", note=LOGGED, fine=(1,)),
    **_flags("logging_first_step logging_nan_inf_filter", note=LOGGED, fine=(True, False)),
    **_flags("disable_tqdm", note="progress is shown on a terminal only", fine=(True, False)),
    **_flags("log_completions", note=SHOWN),
    **_flags("log_unique_prompts log_multimodal", note=SHOWN, fine=(True, False)),
    "num_completions_to_print": Name(note=SHOWN),
    **_all("eval_strategy evaluation_strategy eval_steps eval_delay", note=EVALUATED, fine=("no", 0)),
    **_flags("do_train", note="", fine=(True, False)),
    **_flags("do_eval do_predict eval_on_start", note=EVALUATED),
    **_flags("batch_eval_metrics eval_do_concat_batches eval_use_gather_object", note=EVALUATED, fine=(True, False)),
    **_flags("bf16_full_eval fp16_full_eval", note="rows are evaluated in the precision that they are trained in"),
    "num_generations_eval": Name(note=EVALUATED),
    "vllm_group_port": Name(note="only the adapter is sent, over HTTP", fine=(51216,)),
    "vllm_server_timeout": Name(note="a server has about two minutes to come back"),
    "metric_for_best_model": Name(note="the last weights are kept"),
    "greater_is_better": Name(kind="flag", note="the last weights are kept"),
    "save_strategy": Name(note=SAVED, fine=("steps",)),
    "save_safetensors": Name(kind="flag", note="weights are saved as safetensors", fine=(True,)),
    **_flags("save_on_each_node log_on_each_node average_tokens_across_devices", note=OUTSIDE, fine=(True, False)),
    **_flags("ds3_gather_for_generation", note=OUTSIDE, fine=(True, False)),
    "ddp_timeout": Name(note=OUTSIDE, fine=(1800,)),
    "log_level_replica": Name(note=OUTSIDE, fine=("warning",)),
}


def _table() -> dict[str, Name]:
    return {name: Name(option) for name, option in RENAMED.items()} | {**READ, **REFUSED, **NOTED}


NAMES = _table()


HELD_OUT = Name(why="perl rl holds out no rows; `perl eval` measures the policy on --data")


def find(name: str, command: str) -> Name | None:
    """What a name of trl becomes in a command; None if trl has none, or only in another command."""
    if name == "test_split_size" and command == "rl":
        return HELD_OUT
    if name in NAMES:
        return NAMES[name]
    if name in FIELDS.get(command, ()):
        kind: Kind = "flag" if name in FLAGS else "many" if name in MANY else "one"
        return Name(PASSED, field=name, kind=kind)
    return None
