"""Settings: names, defaults in their order, and every fault told at once."""

import dataclasses
from typing import Any

import pytest

from perlcli import settings
from perlcli.coffee import SETTINGS as PRESETS
from perlcli.errors import PerlError
from perlcli.settings import COMMANDS, GENERAL, LEARNING_RATES, build, check, flat, options, resolve

ADDED = ("config", "debug", "help")  # by the command line, for every command
STAGES = pytest.mark.parametrize("command", COMMANDS)


def resolved(command: str, preset: dict[str, Any] | None = None, **given: Any) -> dict[str, Any]:
    return flat(resolve(build(COMMANDS[command], given), preset or {}))


def faults(command: str, **given: Any) -> list[str]:
    """The faults that `check` tells for these values."""
    with pytest.raises(PerlError) as caught:
        check(resolve(build(COMMANDS[command], given), {}))
    assert caught.value.hint == f"perl {command} --help lists the options"
    return caught.value.problem.splitlines()


@STAGES
def test_a_command_has_fewer_than_55_options_with_unique_names(command: str) -> None:
    names = [item.name for item in options(COMMANDS[command])] + list(ADDED)
    assert len(names) == len(set(names))
    assert len(names) < 55


@STAGES
def test_short_forms_are_unique(command: str) -> None:
    shorts = [item.short for item in options(COMMANDS[command]) if item.short]
    assert len(shorts) == len(set(shorts))
    assert "-c" not in shorts  # that is --config


@STAGES
def test_every_option_has_a_help_and_says_what_unset_means(command: str) -> None:
    for item in options(COMMANDS[command]):
        assert item.help.endswith("."), item.name
        if item.default is None and item.name not in ("reward", "max_steps", "adapter"):
            assert item.unset, item.name


@STAGES
def test_flat_values_build_the_same_settings_again(command: str) -> None:
    given = build(COMMANDS[command], {"overwrite": True, "output": "here"})
    assert build(COMMANDS[command], flat(given)) == given
    assert flat(given)["overwrite"]


@STAGES
def test_the_command_of_settings_is_found_from_object_and_class(command: str) -> None:
    assert settings.command_of(COMMANDS[command]) == settings.command_of(COMMANDS[command]()) == command


@STAGES
def test_settings_and_their_groups_are_frozen(command: str) -> None:
    whole = COMMANDS[command]()
    for part in (whole, *(getattr(whole, item.name) for item in dataclasses.fields(whole))):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, dataclasses.fields(part)[0].name, None)


@STAGES
def test_a_flag_is_off_until_it_is_given(command: str) -> None:
    assert not any(item.default for item in options(COMMANDS[command]) if item.type is bool)


@STAGES
def test_the_help_says_the_general_default_that_holds(command: str) -> None:
    for item in options(COMMANDS[command]):
        if item.name in GENERAL and item.unset != "depends on the stage":
            default = GENERAL[item.name]
            shown = f"{default:g}" if isinstance(default, float) else str(default)
            assert item.unset.split(",")[0] == shown, item.name


def test_an_option_that_two_commands_share_is_declared_once() -> None:
    ours = {item.name: item for item in options(settings.Merge)}
    for item in options(settings.Eval):
        if item.name in ("trust_remote_code", "dry_run", "overwrite"):
            assert dataclasses.replace(item, group="", panel="") == dataclasses.replace(
                ours[item.name], group="", panel=""
            )


def test_the_defaults_of_rl_are_the_papers() -> None:
    values = resolved("rl")
    assert (values["beta"], values["temperature"], values["learning_rate"]) == (0.05, 0.7, 1e-5)


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(PerlError, match=r"perl sft`: learning_rat, zzz\nHint: Did you mean learning_rate\?"):
        build(settings.Sft, {"learning_rat": 1, "zzz": 2})


def test_an_option_of_another_command_is_unknown() -> None:
    with pytest.raises(PerlError, match="Unknown setting for `perl sft`: beta"):
        build(settings.Sft, {"beta": 0.1})


@pytest.mark.parametrize(
    ("preset", "given", "expected"),
    [
        ({}, {}, GENERAL["lora_r"]),
        ({"lora_r": 8}, {}, 8),
        ({"lora_r": 8}, {"lora_r": 4}, 4),
    ],
    ids=["general", "preset over general", "given over preset"],
)
def test_what_is_nearer_to_the_user_wins(preset: dict[str, Any], given: dict[str, Any], expected: int) -> None:
    assert resolved("sft", preset, **given)["lora_r"] == expected


def test_a_stage_default_stands_between_preset_and_general() -> None:
    assert resolved("sft")["gradient_accumulation_steps"] == GENERAL["gradient_accumulation_steps"] == 1
    assert resolved("rl")["gradient_accumulation_steps"] == 4
    assert resolved("rl", {"gradient_accumulation_steps": 2})["gradient_accumulation_steps"] == 2


@pytest.mark.parametrize("command", LEARNING_RATES)
def test_full_tuning_takes_a_lower_learning_rate_than_lora(command: str) -> None:
    adapter, full = resolved(command)["learning_rate"], resolved(command, full=True)["learning_rate"]
    assert (adapter, full) == LEARNING_RATES[command]
    assert full == pytest.approx(adapter / 10)
    assert resolved(command, full=True, learning_rate=0.5)["learning_rate"] == 0.5


@STAGES
def test_the_output_is_named_after_the_command(command: str) -> None:
    assert resolved(command)["output"] == f"runs/{command}"


@pytest.mark.parametrize(
    ("given", "alpha"),
    [({}, 32), ({"lora_r": 4}, 8), ({"lora_r": 1}, 2), ({"lora_r": 4, "lora_alpha": 3}, 3), ({"full": True}, None)],
)
def test_lora_alpha_is_twice_the_rank_unless_given(given: dict[str, Any], alpha: int | None) -> None:
    assert resolved("sft", **given)["lora_alpha"] == alpha


def test_full_tuning_has_no_adapter_settings_even_from_a_preset() -> None:
    values = resolved("sft", {"lora_r": 8, "max_length": 64}, full=True)
    assert [values[name] for name in values if name.startswith("lora_")] == [None] * 4
    assert values["max_length"] == 64


@pytest.mark.parametrize(
    ("given", "steps", "epochs"),
    [
        ({}, 60, 1.0),
        ({"max_steps": 5}, 5, 1.0),
        ({"num_train_epochs": 2.0}, None, 2.0),
        ({"max_steps": 5, "num_train_epochs": 2.0}, 5, 2.0),
    ],
    ids=["preset", "steps", "epochs", "both"],
)
def test_the_users_choice_of_length_replaces_the_presets(
    given: dict[str, Any], steps: int | None, epochs: float
) -> None:
    values = resolved("sft", {"max_steps": 60}, **given)
    assert (values["max_steps"], values["num_train_epochs"]) == (steps, epochs)


def test_without_a_preset_a_run_is_one_epoch() -> None:
    assert (resolved("sft")["max_steps"], resolved("sft")["num_train_epochs"]) == (None, 1.0)


def test_a_presets_fields_stay_but_for_those_that_the_user_sets() -> None:
    preset = {"set": ("lr_scheduler_type=cosine", "warmup_steps=2")}
    assert resolved("sft", preset)["set"] == preset["set"]
    assert resolved("sft", preset, set=("warmup_steps=5", "weight_decay=1"))["set"] == (
        "lr_scheduler_type=cosine",
        "warmup_steps=5",
        "weight_decay=1",
    )


def test_resolving_twice_changes_nothing() -> None:
    preset = {"lora_r": 8, "set": ("warmup_steps=2",)}
    once = resolve(settings.Rl(), preset)
    assert resolve(once, {**preset, "lora_r": 2}) == once


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
        (
            "sft",
            {"learning_rate": float("nan")},
            "--learning-rate must be a finite number of at most ",
        ),
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
        ("rl", {"beta": -0.1}, "--beta must be at least 0, not -0.1"),
        ("rl", {"temperature": 0.0}, "--temperature must be above 0, not 0.0"),
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


@pytest.mark.parametrize("weight", ["auto", "none", "2.5", 2.5, 3])
def test_a_pos_weight_is_a_word_or_a_number(weight: Any) -> None:
    check(resolve(build(settings.Reward, {"pos_weight": weight}), {}))


def test_zero_is_a_fine_beta_and_seed() -> None:
    check(resolve(build(settings.Rl, {"beta": 0.0, "seed": 0, "missing_eos_penalty": 0.0}), {}))


def test_all_faults_are_told_at_once() -> None:
    found = faults("rl", lora_r=-1, seed=-2, load_in_4bit=True, load_in_8bit=True, num_generations=1, beta=-1.0)
    assert len(found) == 5


def test_faults_of_quantised_full_tuning_are_both_told() -> None:
    assert len(faults("sft", full=True, load_in_4bit=True, lora_r=4)) == 2


def test_a_presets_trl_fields_stand_but_for_those_that_the_user_sets() -> None:
    preset = {"set": ("lr_scheduler_type=cosine", "warmup_steps=3")}
    resolved = settings.resolve(settings.build(settings.Sft, {"set": ("warmup_steps=5",)}), preset)
    assert resolved.train.set == ("lr_scheduler_type=cosine", "warmup_steps=5")
    again = settings.resolve(settings.build(settings.Sft, {"set": resolved.train.set}), preset)
    assert again.train.set == resolved.train.set
