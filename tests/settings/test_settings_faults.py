"""Values outside their limits and conflicts between values: all are reported at once."""

from typing import Any

import pytest

from perlcli import settings
from perlcli.coffee import SETTINGS as PRESETS
from perlcli.errors import PerlError
from perlcli.settings import COMMANDS, build, check, resolve

STAGES = pytest.mark.parametrize("command", COMMANDS)


def faults(command: str, **given: Any) -> list[str]:
    """The faults that `check` tells for these values."""
    with pytest.raises(PerlError) as caught:
        check(resolve(build(COMMANDS[command], given), {}))
    assert caught.value.hint == f"perl {command} --help lists the options"
    return caught.value.problem.splitlines()


@STAGES
def test_the_defaults_pass_the_check(command: str) -> None:
    check(resolve(COMMANDS[command](), {}))
    check(resolve(COMMANDS[command](), PRESETS.get(command, {})))


@pytest.mark.parametrize(
    ("command", "given", "fault"),
    [
        ("sft", {"lora_r": 0}, "--lora-r must be above 0, not 0"),
        ("sft", {"lora_alpha": -1}, "--lora-alpha must be above 0, not -1"),
        ("sft", {"max_steps": 0}, "--max-steps must be above 0, not 0"),
        ("sft", {"learning_rate": float("nan")}, "--learning-rate must be a finite number of at most "),
        ("sft", {"num_train_epochs": -0.5}, "--num-train-epochs must be above 0, not -0.5"),
        ("sft", {"per_device_train_batch_size": 0}, "--per-device-train-batch-size must be above 0, not 0"),
        ("sft", {"max_length": 0}, "--max-length must be above 0, not 0"),
        ("sft", {"save_steps": 0}, "--save-steps must be above 0, not 0"),
        ("sft", {"seed": -1}, "--seed must be at least 0 and below 4294967296, not -1"),
        ("sft", {"seed": 2**32}, "--seed must be at least 0 and below 4294967296, not 4294967296"),
        ("sft", {"lora_dropout": 1.0}, "--lora-dropout must be at least 0 and below 1, not 1.0"),
        ("sft", {"lora_dropout": -0.1}, "--lora-dropout must be at least 0 and below 1, not -0.1"),
        ("sft", {"load_in_4bit": True, "load_in_8bit": True}, "--load-in-4bit and --load-in-8bit can't be combined"),
        ("sft", {"full": True, "load_in_4bit": True}, "--full trains the base's weights"),
        ("sft", {"full": True, "load_in_8bit": True}, "--full trains the base's weights"),
        ("sft", {"full": True, "lora_target_modules": "q_proj"}, "--full uses no adapter, so the --lora options"),
        ("sft", {"overwrite": True, "resume": "latest"}, "--overwrite and --resume can't be combined"),
        ("reward", {"pos_weight": "many"}, "--pos-weight must be auto, none or a number above 0, not many"),
        ("reward", {"pos_weight": "0"}, "--pos-weight must be auto, none or a number above 0, not 0"),
        ("reward", {"pos_weight": "inf"}, "--pos-weight must be auto, none or a number above 0, not inf"),
        ("rl", {"on_reward_error": "go"}, "--on-reward-error must be stop, skip or a number, not 'go'"),
        ("eval", {"on_reward_error": "nan"}, "--on-reward-error must be stop, skip or a number, not 'nan'"),
        ("rl", {"beta": -0.1}, "--beta must be at least 0, not -0.1"),
        ("rl", {"temperature": 0.0}, "--temperature must be above 0, not 0.0"),
        ("rl", {"top_p": 0.0}, "--top-p must be above 0 and at most 1, not 0.0"),
        ("eval", {"top_p": 1.1}, "--top-p must be above 0 and at most 1, not 1.1"),
        ("eval", {"top_k": -1}, "--top-k must be at least 0, not -1"),
        ("rl", {"top_k": 1}, "--top-k 1 writes the same completion to a prompt every time, so there is nothing to"),
        ("rl", {"min_p": 1.0}, "--min-p must be at least 0 and below 1, not 1.0"),
        ("eval", {"repetition_penalty": 0.0}, "--repetition-penalty must be above 0, not 0.0"),
        ("rl", {"stop": ("", "a")}, "--stop '' means no stop string, so no other --stop can be given"),
        ("eval", {"stop": ("a", "b", "a")}, "--stop 'a' is given twice"),
        ("rl", {"missing_eos_penalty": -1.0}, "--missing-eos-penalty must be at least 0, not -1.0"),
        ("rl", {"num_generations": 0}, "--num-generations must be above 0, not 0"),
        ("rl", {"num_generations": 1}, "--num-generations must be at least 2"),
        ("rl", {"num_generations": 3}, "= 32 completions per step must be a multiple of --num-generations = 3"),
        (
            "rl",
            {"max_length": 64},
            "--max-length = 64 leaves no room for a prompt before --max-completion-length = 128",
        ),
        ("eval", {"max_samples": 0}, "--max-samples must be above 0, not 0"),
        ("eval", {"per_device_eval_batch_size": -2}, "--per-device-eval-batch-size must be above 0, not -2"),
        ("quickstart", {"max_steps": 0}, "--max-steps must be above 0, not 0"),
    ],
)
def test_a_value_or_combination_that_can_not_be_is_told(command: str, given: dict[str, Any], fault: str) -> None:
    (told,) = faults(command, **given)
    assert fault in told


@pytest.mark.parametrize("decision", ["stop", "skip", "-1", 0, 2.5])
def test_a_decision_on_reward_errors_is_a_word_or_a_number(decision: Any) -> None:
    check(resolve(build(settings.Rl, {"on_reward_error": decision}), {}))


@pytest.mark.parametrize("weight", ["auto", "none", "2.5", 2.5, 3])
def test_a_pos_weight_is_a_word_or_a_number(weight: Any) -> None:
    check(resolve(build(settings.Reward, {"pos_weight": weight}), {}))


def test_zero_is_a_fine_beta_and_seed() -> None:
    off = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "stop": ("",)}
    check(resolve(build(settings.Rl, off), {}))
    check(resolve(build(settings.Eval, {"top_k": 1}), {}))
    check(resolve(build(settings.Rl, {"beta": 0.0, "seed": 0, "missing_eos_penalty": 0.0}), {}))


def test_all_faults_are_told_at_once() -> None:
    found = faults("rl", lora_r=-1, seed=-2, load_in_4bit=True, load_in_8bit=True, num_generations=1, beta=-1.0)
    assert len(found) == 5


def test_faults_of_quantised_full_tuning_are_both_told() -> None:
    assert len(faults("sft", full=True, load_in_4bit=True, lora_r=4)) == 2
