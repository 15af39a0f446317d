"""The command line as trl's users type it."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from perlcli import settings
from perlcli.cli.app import app
from perlcli.cli.binding import Group, command
from perlcli.settings import COMMANDS, flat
from perlcli.settings.types import inner


def given(line: str, stage: str = "sft") -> tuple[dict[str, Any], str]:
    """What a command line sets, and what it prints to standard error."""
    import typer

    found: list[Any] = []
    one = typer.Typer(cls=Group, pretty_exceptions_enable=False)
    one.callback()(lambda: None)
    command(one, stage, found.append)
    result = CliRunner().invoke(one, [stage, *line.split()])
    assert result.exit_code == 0, result.output
    defaults = flat(COMMANDS[stage]())
    return {name: value for name, value in flat(found[0]).items() if value != defaults[name]}, result.stderr


def refused(line: str) -> list[str]:
    result = CliRunner().invoke(app, line.split())
    assert result.exit_code == 2, result.output
    return result.stderr.splitlines()


# The arguments that trl's documentation and scripts show, with other values.
DOCUMENTED = {
    "sft": "--model_name_or_path org/base --dataset_name org/rows --learning_rate 2.0e-4 --num_train_epochs 2 "
    "--packing --per_device_train_batch_size 2 --gradient_accumulation_steps 4 --eos_token <|im_end|> "
    "--eval_strategy steps --eval_steps 50 --use_peft --lora_r 32 --lora_alpha 8 --output_dir out",
    "reward": "--model_name_or_path org/base --dataset_name org/rows --output_dir out --per_device_train_batch_size 4 "
    "--learning_rate 1.0e-4 --logging_steps 25 --eval_strategy steps --eval_steps 50 --max_length 512 --use_peft "
    "--lora_task_type SEQ_CLS --lora_r 32 --lora_alpha 8 --center_rewards_coefficient 0.01 --bf16 True",
    "rl": "--model_name_or_path org/base --dataset_name org/rows --output_dir out --learning_rate 1e-5 --bf16 "
    "--reward_model_name_or_path org/reward --reward_funcs accuracy_reward my.rewards.fn --num_generations 8 "
    "--max_completion_length 64 --use_peft --lora_target_modules q_proj v_proj --log_completions --beta 0.01",
}


@pytest.mark.parametrize("stage", DOCUMENTED)
@pytest.mark.parametrize("dashes", [False, True])
def test_documented_command_lines_of_trl_work(stage: str, dashes: bool) -> None:
    line = " ".join(
        word.replace("_", "-") if dashes and word.startswith("--") else word for word in DOCUMENTED[stage].split()
    )
    values, told = given(line, stage)
    assert (values["model"], values["data"], values["output"]) == ("org/base", "org/rows", "out")
    assert told.startswith("trl's names: model_name_or_path → --model, dataset_name → --data")
    expected: dict[str, dict[str, Any]] = {
        "sft": {"set": ("packing=true",), "lora_r": 32, "learning_rate": 2e-4, "num_train_epochs": 2.0},
        "reward": {"set": ("center_rewards_coefficient=0.01",), "dtype": "bfloat16", "max_length": 512},
        "rl": {
            "reward": ("org/reward", "trl.rewards:accuracy_reward", "my.rewards:fn"),
            "lora_target_modules": "q_proj,v_proj",
            "beta": 0.01,
        },
    }
    assert expected[stage].items() <= values.items()


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("--load_in_4bit True --trust_remote_code false", {"load_in_4bit": True}),
        ("--load_in_4bit=true --full=false", {"load_in_4bit": True}),
        ("--gradient_checkpointing --seed 1", {"gradient_checkpointing": "true", "seed": 1}),
        ("--gradient_checkpointing False", {"gradient_checkpointing": "false"}),
        ("--no_gradient_checkpointing", {"gradient_checkpointing": "false"}),
        ("--no_dataloader_pin_memory", {"set": ("dataloader_pin_memory=false",)}),
        ("--report_to tensorboard wandb", {"report_to": "tensorboard,wandb"}),
        ("--label_names a b", {"set": ("label_names=[a, b]",)}),
        ("--max_steps -1 --max_grad_norm=0.5", {"set": ("max_grad_norm=0.5",)}),
        ("--dtype auto --bf16", {"dtype": "bfloat16"}),
        ("--no-full --use_peft", {}),
        ("--set warmup_steps=2 --weight_decay 0.1", {"set": ("warmup_steps=2", "weight_decay=0.1")}),
        ("-m base --dataset_name=a_b", {"model": "base", "data": "a_b"}),
    ],
)
def test_values_as_trl_takes_them(line: str, values: dict[str, Any]) -> None:
    assert given(line)[0] == values


def test_the_command_line_wins_over_names_of_trl_in_a_config(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model_name_or_path: a\nwarmup_steps: 3\nweight_decay: 0.1\nbf16: true")
    values, told = given(f"--config {tmp_path / 'run.yaml'} --model b --weight_decay 0.2 --dtype float32")
    assert values == {"model": "b", "dtype": "float32", "set": ("warmup_steps=3", "weight_decay=0.2")}
    assert told.splitlines()[0].count("trl's names: ") == 1


def test_all_unknown_names_are_reported_at_once(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("lr: 1\nhub_model_id: x")
    found = refused(f"sft --batch-size 4 --gpus 2 --foo a b --push_to_hub --config {tmp_path / 'run.yaml'}")
    assert found == [
        "Error: No such option: --batch-size. Did you mean --per-device-train-batch-size?",
        "No such option: --gpus. perlcli trains in one process, on one GPU, which CUDA_VISIBLE_DEVICES chooses.",
        "No such option: --foo",
        "--push-to-hub: perlcli publishes nothing; after the run: hf upload NAME FOLDER",
        f"{tmp_path / 'run.yaml'}: unknown key: lr. Did you mean learning_rate?",
        f"{tmp_path / 'run.yaml'}: hub_model_id: perlcli publishes nothing; after the run: hf upload NAME FOLDER",
        "Hint: perl sft --help lists the options",
    ]


def test_two_names_with_different_values_are_refused() -> None:
    assert refused("sft --model a --model_name_or_path b")[0] == (
        "Error: --model and --model-name-or-path set --model to different values: 'a' and 'b'"
    )


NEED_NO_VALUE = ("resume", "gradient_checkpointing")


@pytest.mark.slow
@pytest.mark.parametrize("stage", COMMANDS)
def test_every_option_of_every_command_is_read_as_before(stage: str) -> None:
    """The names of trl shadow none of perlcli's own."""
    for item in settings.options(COMMANDS[stage]):
        if item.argument or inner(item.type) is bool or item.name in NEED_NO_VALUE:
            continue
        assert "requires an argument" in CliRunner().invoke(app, [stage, item.shown]).stderr, item.name
