"""The TRL config of a stage: what the settings become, and what `--set` accepts."""

import dataclasses
from typing import Any

import pytest
from transformers import GenerationConfig
from trl import RewardConfig, RLOOConfig, SFTConfig

from perlcli import settings
from perlcli.commands import reward, rl, sft
from perlcli.errors import PerlError
from perlcli.training import trl_fields
from perlcli.training.trl_config import overrides

STAGES: dict[str, tuple[Any, Any, Any]] = {
    "sft": (settings.Sft, sft, SFTConfig),
    "reward": (settings.Reward, reward, RewardConfig),
    "rl": (settings.Rl, rl, RLOOConfig),
}
OWN = set(settings.names(settings.Rl))


def config(stage: str, **given: Any) -> Any:
    """The TRL config of a stage for these settings."""
    kind, module, _ = STAGES[stage]
    return module.trainer_args(settings.resolve(settings.build(kind, given), {}))


@pytest.mark.parametrize("stage", STAGES)
def test_settings_keep_their_names_in_trl_s_config(stage: str) -> None:
    given = {
        "seed": 7,
        "max_steps": 3,
        "num_train_epochs": 2.5,
        "learning_rate": 0.25,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 6,
        "save_steps": 11,
    }
    found = config(stage, output="runs/x", **given)
    assert type(found) is STAGES[stage][2]
    assert {name: getattr(found, name) for name in given} == given
    assert found.output_dir == "runs/x/checkpoints/.writing"
    assert found.report_to == []
    assert found.logging_steps == 1
    assert found.logging_nan_inf_filter is False


@pytest.mark.parametrize("stage", STAGES)
def test_epochs_count_if_no_steps_are_given(stage: str) -> None:
    found = config(stage, num_train_epochs=3.0)
    assert (found.max_steps, found.num_train_epochs) == (-1, 3.0)


@pytest.mark.parametrize(
    ("given", "bf16"),
    [({}, False), ({"dtype": "float32"}, False), ({"dtype": "bfloat16"}, True), ({"load_in_4bit": True}, True)],
)
def test_training_is_in_the_precision_of_the_base(given: dict[str, Any], bf16: bool) -> None:
    found = config("sft", dtype=given.pop("dtype", "auto"), **given)
    assert (found.bf16, found.fp16) == (bf16, False)


def test_rl_settings_reach_the_config() -> None:
    given = {"beta": 0.3, "temperature": 0.9, "num_generations": 8, "max_completion_length": 20}
    found = config("rl", **given)
    assert {name: getattr(found, name) for name in given} == given
    assert found.generation_batch_size == 32  # 8 completions x 4 passes: one generation per step


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_length_reaches_the_config(stage: str) -> None:
    assert config(stage, max_length=77).max_length == 77


@pytest.mark.parametrize("stage", STAGES)
def test_set_reaches_the_config(stage: str) -> None:
    found = config(stage, set=("weight_decay=0.5", "lr_scheduler_type=cosine"))
    assert (found.weight_decay, found.lr_scheduler_type.value) == (0.5, "cosine")


PARSED: dict[str, tuple[str, Any]] = {
    "weight_decay=0.1": ("weight_decay", 0.1),
    "weight-decay=0.1": ("weight_decay", 0.1),
    " weight_decay =1": ("weight_decay", 1.0),
    "weight_decay=1e-3": ("weight_decay", 0.001),
    "dataloader_num_workers=2": ("dataloader_num_workers", 2),
    "dataloader_drop_last=true": ("dataloader_drop_last", True),
    "lr_scheduler_type=cosine": ("lr_scheduler_type", "cosine"),
    "run_name=a=b": ("run_name", "a=b"),
    "run_name=null": ("run_name", None),
    "run_name={": ("run_name", "{"),
    "run_name='7'": ("run_name", "7"),
    "reward_clip_range=[-1, 2]": ("reward_clip_range", (-1, 2)),
    "generation_kwargs={use_cache: false}": ("generation_kwargs", {"use_cache": False}),
    "generation_kwargs='{\"prefill_chunk_size\": 8}'": ("generation_kwargs", {"prefill_chunk_size": 8}),
    "lr_scheduler_kwargs={lr_end: 1e-6}": ("lr_scheduler_kwargs", {"lr_end": 1e-6}),
}


@pytest.mark.parametrize("item", PARSED)
def test_set_reads_a_value_of_the_field_s_type(item: str) -> None:
    name, value = PARSED[item]
    found = overrides((item,), RLOOConfig, OWN)
    assert found == {name: value}
    assert type(found[name]) is type(value)


REFUSED = {
    "weight_decay": "--set weight_decay: expected NAME=VALUE",
    "wait_decay=1": "--set wait_decay: RLOOConfig has no such field. Did you mean weight_decay?",
    "zzz=1": "--set zzz: RLOOConfig has no such field.",
    "learning_rate=1": "--set learning_rate: use the option --learning-rate",
    "bf16=true": "--set bf16: use the option --dtype",
    "use_vllm=true": "--set use_vllm: use the option --rollouts",
    "vllm_model_impl=vllm": "--set vllm_model_impl can't be used: vLLM runs in a process of its own: give this to its server, whose command `perl serve` prints",  # noqa: E501
    "weight_decay=much": "--set weight_decay: must be a number, not 'much'",
    "weight_decay=true": "--set weight_decay: must be a number, not True",
    "weight_decay=": "--set weight_decay: must be a number, not None",
    "dataloader_num_workers=1.5": "--set dataloader_num_workers: must be a whole number, not 1.5",
    "shuffle_dataset=1": "--set shuffle_dataset: must be true or false, not 1",
    "ignore_data_skip=true": "--set ignore_data_skip can't be used: a resumed run continues with the rows that an uninterrupted one would read",  # noqa: E501
    "reward_clip_range=2": "--set reward_clip_range: must be a list: a number, a number, not 2",
}


@pytest.mark.parametrize("item", REFUSED)
def test_set_rejects_values_of_another_type(item: str) -> None:
    with pytest.raises(PerlError) as caught:
        overrides((item,), RLOOConfig, OWN)
    assert caught.value.problem == REFUSED[item]
    assert caught.value.hint == "--set takes the fields of trl.RLOOConfig"


def test_all_faults_of_set_are_reported_together() -> None:
    with pytest.raises(PerlError) as caught:
        overrides(tuple(REFUSED), RLOOConfig, OWN)
    assert caught.value.problem.splitlines() == list(REFUSED.values())


@pytest.mark.parametrize(
    ("stage", "item"),
    [("sft", "lr_scheduler_type=round"), ("rl", "generation_batch_size=3"), ("reward", "warmup_steps=-1")],
)
def test_what_trl_rejects_is_reported(stage: str, item: str) -> None:
    with pytest.raises(PerlError, match=f"^TRL's {STAGES[stage][2].__name__} rejects these settings: .+"):
        config(stage, set=(item,))


def test_missing_tracker_is_reported() -> None:
    with pytest.raises(PerlError, match=r"^--report-to must be the names of experiment trackers, not 'wanbd'\nHint: "):
        config("sft", report_to="none, wanbd")


# Every field of TRL's configs


CONFIGS = {"sft": SFTConfig, "reward": RewardConfig, "rl": RLOOConfig}


def fields_of(stage: str) -> list[str]:
    return [field.name for field in dataclasses.fields(CONFIGS[stage]) if field.init]


@pytest.mark.parametrize("stage", STAGES)
def test_every_field_is_an_option_or_allowed_or_refused_with_a_reason(stage: str) -> None:
    kind, own = CONFIGS[stage], set(settings.names(STAGES[stage][0]))
    for name in fields_of(stage):
        reason = trl_fields.why_refused(name, kind.__name__, own)
        is_allowed = name in trl_fields.ALLOWED and name not in trl_fields.REFUSED_BY[kind.__name__]
        assert is_allowed == (not reason), name
        assert "doesn't know" not in reason, name


def test_the_tables_of_fields_name_no_other_fields_and_none_twice() -> None:
    every = {name for stage in STAGES for name in fields_of(stage)}
    own = {name for kind, _, _ in STAGES.values() for name in settings.names(kind)}
    tables = [trl_fields.OPTIONS, trl_fields.REFUSED, trl_fields.ALLOWED]
    assert all(set(table) <= every - own for table in tables)
    assert sum(map(len, tables)) == len(set().union(*tables))
    for stage, kind in CONFIGS.items():
        assert set(trl_fields.REFUSED_BY[kind.__name__]) <= trl_fields.ALLOWED & set(fields_of(stage))
    assert set(trl_fields.OPTIONS.values()) <= own


def test_a_field_that_a_later_trl_adds_is_refused() -> None:
    fault = trl_fields.why_refused("new", "RLOOConfig", set())
    assert fault == " can't be used: perlcli doesn't know what this field of RLOOConfig changes"


@pytest.mark.parametrize("name", ["fsdp", "deepspeed", "parallelism_config", "accelerator_config", "ddp_backend"])
@pytest.mark.parametrize("stage", STAGES)
def test_what_needs_several_processes_is_refused(stage: str, name: str) -> None:
    with pytest.raises(PerlError) as caught:
        config(stage, set=(f"{name}={{a: 1}}",))
    assert (
        caught.value.problem
        == f"--set {name} can't be used: perlcli trains in one process, on one GPU, which CUDA_VISIBLE_DEVICES chooses"
    )


@pytest.mark.parametrize(("top", "options"), [("top_p", "--top-p"), ("repetition_penalty", "--repetition-penalty")])
def test_flat_and_nested_settings_of_sampling_name_the_option(top: str, options: str) -> None:
    for item, place in ((f"{top}=0.5", top), (f"generation_kwargs={{{top}: 0.5}}", f"generation_kwargs: {top}")):
        with pytest.raises(PerlError) as caught:
            config("rl", set=(item,))
        assert caught.value.problem == f"--set {place}: use the option {options}"


def generation_faults(text: str) -> list[str]:
    with pytest.raises(PerlError) as caught:
        config("rl", set=(f"generation_kwargs={text}",))
    return caught.value.problem.splitlines()


def test_every_key_of_generation_kwargs_is_an_option_or_harmless_or_refused() -> None:
    known = {key for key in GenerationConfig().to_dict() if not key.startswith("_")}
    tables = [trl_fields.GENERATION_OPTIONS, trl_fields.COMPUTING, trl_fields.GENERATION_REFUSED]
    assert all(set(table) <= known for table in tables)
    assert sum(map(len, tables)) == len(set().union(*tables))
    for key in sorted(known - trl_fields.COMPUTING.keys()):
        (fault,) = generation_faults(f"{{{key}: 1}}")
        ours = trl_fields.GENERATION_OPTIONS.get(key)
        wanted = f": use the option --{settings.dashed(ours)}" if ours else " can't be used: "
        assert fault.startswith(f"--set generation_kwargs: {key}{wanted}")
        assert ours is None or ours in settings.names(settings.Rl)


NESTED = {
    ("rl", "generation_kwargs={stop_strings: a}"): "generation_kwargs: stop_strings: use the option --stop",
    ("rl", "generation_kwargs={min_new_tokens: 3}"): "generation_kwargs: min_new_tokens: use the option "
    "--min-completion-length",
    ("rl", "generation_kwargs={suppress_tokens: [3]}"): "generation_kwargs: suppress_tokens can't be used: it would "
    "change what completions are sampled from, in training only",
    ("rl", "generation_kwargs={num_return_sequence: 2}"): "generation_kwargs: no such key: num_return_sequence. Did "
    "you mean num_return_sequences?",
    ("rl", "generation_kwargs={1: 2}"): "generation_kwargs: no such key: 1.",
    ("rl", "generation_kwargs={use_cache: 3}"): "generation_kwargs: use_cache must be true or false, not 3",
    ("rl", "generation_kwargs={cache_implementation: fast}"): "generation_kwargs: cache_implementation must be one of ",
    ("rl", "generation_kwargs=sampled"): "generation_kwargs must be a mapping, not 'sampled'",
    ("rl", "cache_implementation=quantized"): "cache_implementation=quantized can't be used: the policy would sample ",
    ("rl", "reward_clip_range=[2, 1]"): "reward_clip_range must be the lower and the higher limit, not [2, 1]",
    ("rl", "num_iterations=0"): "num_iterations must be at least 1, not 0",
    ("rl", "neftune_noise_alpha=5"): "neftune_noise_alpha can't be used: noise would part the policy from its anchor",
    ("rl", "torch_compile=true"): "torch_compile can't be used: adapters are switched on one base in every step",
    ("reward", "label_smoothing_factor=0.1"): "label_smoothing_factor can't be used: it has no effect in this stage",
    ("sft", "label_smoothing_factor=1"): "label_smoothing_factor must be at least 0 and below 1, not 1.0",
    ("sft", "dataloader_num_workers=99999999999"): "dataloader_num_workers must be at least 0 and at most 256, not 99",
    ("sft", "max_grad_norm=-1"): "max_grad_norm must be at least 0, not -1.0",
    ("sft", "gradient_checkpointing_kwargs={reentrant: 1}"): "gradient_checkpointing_kwargs: no such key: reentrant.",
    ("sft", "gradient_checkpointing_kwargs={use_reentrant: 1}"): "gradient_checkpointing_kwargs: use_reentrant must ",
    ("sft", "dataloader_multiprocessing_context=knife"): "dataloader_multiprocessing_context must be one of fork, ",
    (
        "sft",
        "lr_scheduler_type=reduce_lr_on_plateau",
    ): "lr_scheduler_type=reduce_lr_on_plateau can't be used: it needs ",
    ("sft", "loss_type=hinge"): "loss_type must be one of nll, dft, not 'hinge'",
    ("sft", "padding_free=true"): "padding_free can't be used: --set packing=true leaves out padding and keeps rows ",
    ("reward", "train_sampling_strategy=group_by_length"): "train_sampling_strategy can't be used: transformers can't ",
    ("sft", "optim_args=momentum"): "optim_args must be NAME=VALUE, comma-separated, not 'momentum'",
    ("sft", "optim_args=momentum=0.9"): "optim_args: --optim adamw_torch_fused doesn't read momentum",
    (
        "sft",
        "lr_scheduler_kwargs={min_lr: 1e-6}",
    ): "lr_scheduler_type=linear with --set lr_scheduler_kwargs={'min_lr': ",
    ("sft", "lr_scheduler_type=cosine_with_min_lr"): "lr_scheduler_type=cosine_with_min_lr without --set lr_scheduler_",
}


@pytest.mark.parametrize(("stage", "item"), NESTED)
def test_values_that_would_break_the_loop_are_refused(stage: str, item: str) -> None:
    with pytest.raises(PerlError) as caught:
        config(stage, set=(item,))
    assert caught.value.problem.startswith(f"--set {NESTED[stage, item]}")
    assert "\n" not in caught.value.problem


def test_nested_values_that_suit_reach_the_config() -> None:
    schedule = ("lr_scheduler_type=cosine_with_min_lr", "lr_scheduler_kwargs={min_lr: 1e-6}")
    assert config("sft", set=schedule).lr_scheduler_kwargs == {"min_lr": 1e-6}
    assert config("sft", optim="sgd", set=("optim_args=momentum=0.9,nesterov=true",)).optim_args
    with pytest.raises(PerlError, match=r"^--set optim_args: --optim sgd rejects them: ValueError: Nesterov"):
        config("sft", optim="sgd", set=("optim_args=nesterov=true",))
    reentrant = ("gradient_checkpointing_kwargs={use_reentrant: true}",)
    assert config("reward", set=reentrant).gradient_checkpointing_kwargs == {"use_reentrant": True}


def test_sampling_options_reach_the_config_and_are_off_by_default() -> None:
    off = config("rl")
    assert (off.top_p, off.top_k, off.min_p, off.repetition_penalty) == (1.0, 0, None, 1.0)
    given = {"top_p": 0.9, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1}
    assert {name: getattr(config("rl", **given), name) for name in given} == given


@pytest.mark.parametrize("algorithm", ["rloo", "reinforce"])
def test_masking_truncated_completions_would_mask_those_that_stop(algorithm: str) -> None:
    masked = {"algorithm": algorithm, "set": ("mask_truncated_completions=true",)}
    masked |= {"num_generations": 1} if algorithm == "reinforce" else {}
    assert config("rl", **masked).mask_truncated_completions
    with pytest.raises(PerlError, match=r"^--set mask_truncated_completions=true can't be combined with --stop: "):
        config("rl", stop=("\n",), **masked)
