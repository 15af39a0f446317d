"""The names of trl: every argument that trl takes has its place, and is read as what it means here."""

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest

from perlcli import settings
from perlcli.errors import PerlError
from perlcli.settings import trl_names
from perlcli.settings.naming import Name
from perlcli.settings.synonyms import entry, set_items, summary, translate
from perlcli.settings.unknown_names import MEANT, meaning
from perlcli.settings.yaml import read_config, read_translated

STAGES = ("sft", "reward", "rl")
LISTS_OF_ANOTHER_KIND = {"datasets"}  # of mappings, which only YAML can have


def names(command: str) -> list[str]:
    return settings.names(settings.COMMANDS[command])


def arguments(command: str) -> dict[str, Any]:
    """The arguments of the command in the installed trl, with their types."""
    from trl import ModelConfig, RewardConfig, RLOOConfig, SFTConfig
    from trl.scripts.rloo import RLOOScriptArguments
    from trl.scripts.utils import DatasetMixtureConfig, ScriptArguments

    configs = {"sft": SFTConfig, "reward": RewardConfig, "rl": RLOOConfig}
    script = RLOOScriptArguments if command == "rl" else ScriptArguments
    found: dict[str, Any] = {}
    for kind in (configs[command], script, ModelConfig, DatasetMixtureConfig):
        types = typing.get_type_hints(kind)
        found |= {field.name: types[field.name] for field in dataclasses.fields(kind) if field.init}
    return found


@pytest.mark.parametrize("command", STAGES)
def test_every_argument_of_trl_has_its_place(command: str) -> None:
    """A field that a new trl adds fails here: put it into a table of `settings/trl_names.py`."""
    known = names(command)
    places = {name: entry(name, command, known) for name in arguments(command)}
    assert [name for name, place in places.items() if place is None and name not in known] == []
    for name, kind in arguments(command).items():
        place = places[name]
        if place is not None and name not in LISTS_OF_ANOTHER_KIND:
            parts = {typing.get_origin(part) or part for part in (typing.get_args(kind) or (kind,))}
            flag = kind is bool or kind == bool | None
            many = bool({list, tuple} & {*parts, typing.get_origin(kind)})
            assert place.kind == ("flag" if flag else "many" if many else "one"), name


@pytest.mark.parametrize("command", STAGES)
def test_only_fields_of_trl_are_passed_on(command: str) -> None:
    assert trl_names.FIELDS[command] <= set(arguments(command))
    assert not set(trl_names.NAMES) & set(trl_names.FIELDS[command])


def test_every_name_leads_somewhere() -> None:
    known = {name for command in settings.COMMANDS for name in names(command)}
    for name, place in trl_names.NAMES.items():
        assert bool(place.why) + bool(place.option) + bool(place.note or name == "do_train") == 1, name
        assert not place.option or place.option in known, name
    fields = set().union(*trl_names.FIELDS.values())
    known |= {name for command in settings.ALL_COMMANDS.values() for name in settings.names(command)}
    assert {meant for row in MEANT.values() for meant in row} <= known | fields


CONFIG = """
model_name_or_path: org/base
dataset_name: rows
dataset_config: main
dataset_train_split: train
output_dir: out
use_peft: true
lora_r: 8
lora_target_modules: [q_proj, v_proj]
torch_dtype: auto
bf16: true
fp16: false
learning_rate: 2.0e-4
lr_scheduler_type: cosine
lr_scheduler_kwargs: {min_lr: 1e-5}
warmup_ratio: 0.1
packing: true
max_steps: -1
logging_steps: 10
eval_strategy: steps
push_to_hub: false
hub_model_id: null
report_to: [tensorboard, wandb]
set: {weight_decay: 0.1, run_name: '5'}
"""


@pytest.fixture
def config(tmp_path: Path) -> Any:
    def write(text: str) -> Path:
        (tmp_path / "run.yaml").write_text(text)
        return tmp_path / "run.yaml"

    return write


def test_a_yaml_of_trl_is_read(config: Any) -> None:
    values, read = read_translated(settings.Sft, config(CONFIG))
    assert values == {
        "model": "org/base",
        "data": "rows",
        "subset": "main",
        "output": "out",
        "full": False,
        "lora_r": 8,
        "lora_target_modules": "q_proj,v_proj",
        "dtype": "bfloat16",
        "learning_rate": 2e-4,
        "report_to": "tensorboard,wandb",
        "set": (
            "weight_decay=0.1",
            'run_name="5"',
            "lr_scheduler_type=cosine",
            'lr_scheduler_kwargs={"min_lr": 1e-05}',
            "warmup_steps=0.1",
            "packing=true",
        ),
    }
    first, second = summary([read], values)
    assert "model_name_or_path → --model, dataset_name → --data" in first
    assert "bf16 → --dtype bfloat16" in first
    assert first.endswith("lr_scheduler_type, lr_scheduler_kwargs, packing → --set")
    assert second.startswith("No effect: logging_steps (every step is logged); eval_strategy (held-out rows")


def test_numbers_in_nested_fields_are_numbers(config: Any) -> None:
    from trl import SFTConfig

    from perlcli.training.trl_config import overrides

    values = read_config(settings.Sft, config("lr_scheduler_kwargs: {min_lr: 1e-5}"))
    assert overrides(values["set"], SFTConfig, set()) == {"lr_scheduler_kwargs": {"min_lr": 1e-5}}


@pytest.mark.parametrize(
    ("command", "given", "values"),
    [
        ("sft", {"fp16": True}, {"dtype": "float16"}),
        ("sft", {"bf16": False}, {"dtype": "float32"}),
        ("sft", {"bf16": False, "fp16": True}, {"dtype": "float16"}),
        ("sft", {"torch_dtype": "torch.bfloat16", "bf16": True}, {"dtype": "bfloat16"}),
        ("sft", {"dtype": None}, {}),
        ("sft", {"use_peft": False}, {"full": True}),
        ("sft", {"dataset_text_field": "body"}, {"columns": "text=body"}),
        ("sft", {"completion_only_loss": False}, {"loss_on": "all"}),
        ("sft", {"assistant_only_loss": True}, {"loss_on": "assistant"}),
        ("sft", {"test_split_size": 0.1}, {"eval_fraction": 0.1}),
        ("sft", {"datasets": [{"path": "a/b", "name": "x", "split": "train"}]}, {"data": "a/b", "subset": "x"}),
        ("sft", {"resume_from_checkpoint": True}, {"resume": "latest"}),
        ("sft", {"group_by_length": True}, {"set": ["train_sampling_strategy=group_by_length"]}),
        ("reward", {"lora_modules_to_save": ["score"], "lora_task_type": "SEQ_CLS"}, {}),
        (
            "rl",
            {"reward_model_name_or_path": "m", "reward_funcs": ["think_format_reward", "my.lib.fn", "f.py:g"]},
            {"reward": ["m", "trl.rewards:think_format_reward", "my.lib:fn", "f.py:g"]},
        ),
        (
            "rl",
            {"reward_model_name_or_path": "m", "reward_funcs": ["get_soft_overlong_punishment"]},
            {
                "reward": ["m", "trl.rewards:get_soft_overlong_punishment"],
                "reward_kwargs": ["{}", trl_names.OVERLONG_KWARGS],
            },
        ),
        ("rl", {"rloo_k": 4, "kl_coef": 0.1}, {"num_generations": 4, "beta": 0.1}),
        ("rl", {"use_vllm": True, "vllm_mode": "server"}, {"rollouts": "vllm"}),
        ("rl", {"use_transformers_continuous_batching": True}, {"rollouts": "continuous"}),
        ("eval", {"model_name_or_path": "m", "dataset_name": "d"}, {"model": "m", "data": "d"}),
    ],
)
def test_values_that_differ_are_translated(command: str, given: dict[str, Any], values: dict[str, Any]) -> None:
    found = translate(command, names(command), given.items(), "f: ")
    assert (found.added, found.own, found.faults) == (values, [], [])


@pytest.mark.parametrize(
    ("command", "given", "told"),
    [
        (
            "sft",
            {"model": "a", "model_name_or_path": "b"},
            "model and model_name_or_path set --model to different values",
        ),
        (
            "sft",
            {"bf16": True, "fp16": True},
            "bf16 and fp16 set --dtype to different values: 'bfloat16' and 'float16'",
        ),
        ("sft", {"full": True, "use_peft": True}, "full and use_peft set --full to different values"),
        ("sft", {"set": ["packing=false"], "packing": True}, "packing and set packing have different values"),
        ("sft", {"warmup_ratio": 0.1, "warmup_steps": 5}, "warmup_steps and warmup_ratio have different values"),
        ("sft", {"push_to_hub": True}, "push_to_hub: perlcli publishes nothing; after the run: hf upload"),
        ("rl", {"vllm_mode": "colocate"}, "vllm_mode: vLLM runs in a process of its own; use --rollouts vllm"),
        ("sft", {"datasets": [{"path": "a"}, {"path": "b"}]}, "datasets one source is read; join the files"),
        ("sft", {"env": {"A": 1}}, "env: a settings file sets no environment variables"),
        ("sft", {"num_processes": 4}, "num_processes: perlcli trains in one process"),
        ("sft", {"packing": "maybe"}, "packing must be true or false, not 'maybe'"),
        ("reward", {"lora_modules_to_save": ["embed_tokens"]}, "lora_modules_to_save modules of the base are shared"),
    ],
)
def test_what_can_not_be_meant_is_refused_with_the_reason(command: str, given: dict[str, Any], told: str) -> None:
    (fault,) = translate(command, names(command), given.items(), "f: ").faults
    assert fault.startswith(f"f: {told}")


def test_equal_values_by_two_names_are_fine() -> None:
    given = {"model": "a", "model_name_or_path": "a", "set": {"packing": True}, "packing": True}
    found = translate("sft", names("sft"), given.items(), "f: ")
    assert found.faults == []


@pytest.mark.parametrize("text", ["5", "true", "null", "1e-5", "a: b", "[x", "plain", ""])
def test_a_mapping_keeps_its_texts(text: str) -> None:
    from perlcli.settings.yaml import parse

    (item,) = set_items({"run_name": text})
    shown = item.partition("=")[2]
    try:
        assert parse(shown, "x") == text
    except PerlError:
        assert shown == text  # what isn't YAML stays text


def test_without_use_peft_the_difference_is_noted() -> None:
    found = translate("sft", names("sft"), {"model_name_or_path": "m"}.items(), "f: ")
    assert summary([found], found.added)[-1].startswith("Note: without use_peft, trl trains all parameters")
    assert len(summary([found], found.added | {"lora_r": 8})) == 1


@pytest.mark.parametrize(
    ("command", "name", "hint"),
    [
        ("sft", "batch-size", "Did you mean per_device_train_batch_size?"),
        ("eval", "batch_size", "Did you mean per_device_eval_batch_size?"),
        ("sft", "lr", "Did you mean learning_rate?"),
        ("sft", "epochs", "Did you mean num_train_epochs?"),
        ("sft", "rank", "Did you mean lora_r?"),
        ("sft", "alpha", "Did you mean lora_alpha?"),
        ("sft", "model_name", "Did you mean model?"),
        ("merge", "model_name", "Did you mean adapter?"),
        ("sft", "dataset", "Did you mean data?"),
        ("sft", "out", "Did you mean output?"),
        ("sft", "scheduler", "Did you mean lr_scheduler_type?"),
        ("sft", "max_lenght", "Did you mean max_length?"),
        ("sft", "learningrate", "Did you mean learning_rate?"),
        ("sft", "lr_schedule_type", "Did you mean lr_scheduler_type?"),
        ("sft", "load_in_2bit", ""),
        ("sft", "beta_data", ""),
        ("sft", "top_k", "perl rl has this option."),
        ("rl", "packing", "perl sft has this option."),
        ("sft", "gpus", f"{trl_names.OUTSIDE}."),
    ],
)
def test_an_unknown_name_gets_a_hint_only_if_it_means_the_same(command: str, name: str, hint: str) -> None:
    assert meaning(name, command, names(command)) == hint


def test_names_of_other_commands_are_none() -> None:
    assert entry("packing", "rl", names("rl")) is None
    assert entry("push_to_hub", "merge", names("merge")) is None
    assert entry("reward_funcs", "sft", names("sft")) is None
    assert entry("model", "sft", names("sft")) is None
    assert isinstance(entry("packing", "sft", names("sft")), Name)


def test_lists_and_mappings_where_the_command_line_has_commas(config: Any) -> None:
    values = read_config(
        settings.Sft, config("columns: {prompt: question, completion: answer}\nlora-target-modules: [q]")
    )
    assert values == {"columns": "prompt=question,completion=answer", "lora_target_modules": "q"}
    assert read_config(settings.Sft, config("report_to: []"))["report_to"] == "none"
    with pytest.raises(PerlError, match=r"lora_target_modules can't have an item with , in it: 'a,b'"):
        read_config(settings.Sft, config("lora_target_modules: ['a,b']"))
    with pytest.raises(PerlError, match=r"label_map must have texts as its items, not True"):
        read_config(settings.Reward, config("label_map: {yes: 1}"))
