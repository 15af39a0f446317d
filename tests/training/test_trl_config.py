"""The TRL config of a stage: what the settings become, and what `--set` accepts."""

from typing import Any

import pytest
from trl import RewardConfig, RLOOConfig, SFTConfig

from perlcli import settings
from perlcli.commands import reward, rl, sft
from perlcli.errors import PerlError
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
    "use_vllm=true": "--set use_vllm can't be used: vLLM would hold the policy a second time",
    "weight_decay=much": "--set weight_decay: must be a number, not 'much'",
    "weight_decay=true": "--set weight_decay: must be a number, not True",
    "weight_decay=": "--set weight_decay: must be a number, not None",
    "dataloader_num_workers=1.5": "--set dataloader_num_workers: must be a whole number, not 1.5",
    "shuffle_dataset=1": "--set shuffle_dataset: must be true or false, not 1",
    "ignore_data_skip=true": "--set ignore_data_skip can't be used: a resumed run ends as an uninterrupted one",
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
    with pytest.raises(PerlError, match=r"^--report-to wanbd: not installed or unknown\nHint: installed trackers: "):
        config("sft", report_to="none, wanbd")
