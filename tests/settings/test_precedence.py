"""Settings from flat values, and which value an option takes: the user's, a preset's or a default."""

from typing import Any

import pytest

from perlcli import settings
from perlcli.errors import PerlError
from perlcli.settings import COMMANDS, GENERAL, LEARNING_RATES, build, flat, layered, resolve

STAGES = pytest.mark.parametrize("command", COMMANDS)


def resolved(command: str, preset: dict[str, Any] | None = None, **given: Any) -> dict[str, Any]:
    return flat(resolve(build(COMMANDS[command], given), preset or {}))


def test_the_defaults_of_rl_are_the_papers() -> None:
    values = resolved("rl")
    assert (values["beta"], values["temperature"], values["learning_rate"]) == (0.05, 0.7, 1e-5)


@pytest.mark.parametrize(
    ("preset", "given", "expected"),
    [({}, {}, GENERAL["lora_r"]), ({"lora_r": 8}, {}, 8), ({"lora_r": 8}, {"lora_r": 4}, 4)],
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


def test_a_presets_trl_fields_stand_but_for_those_that_the_user_sets() -> None:
    preset = {"set": ("lr_scheduler_type=cosine", "warmup_steps=3")}
    resolved = settings.resolve(settings.build(settings.Sft, {"set": ("warmup_steps=5",)}), preset)
    assert resolved.train.set == ("lr_scheduler_type=cosine", "warmup_steps=5")
    again = settings.resolve(settings.build(settings.Sft, {"set": resolved.train.set}), preset)
    assert again.train.set == resolved.train.set


def test_the_layers_stand_in_their_order() -> None:
    assert layered({"seed": 1}, {"seed": 2, "beta": 2.0}, {"seed": 3, "beta": 3.0, "rows": 3}) == {
        "seed": 1,
        "beta": 2.0,
        "rows": 3,
    }


@pytest.mark.parametrize(
    ("stronger", "weaker", "expected"),
    [
        ({"max_steps": 5}, {"num_train_epochs": 3.0}, {"max_steps": 5}),
        ({"data": "mine"}, {"data": "theirs", "split": "dev", "seed": 1}, {"data": "mine", "seed": 1}),
        ({"full": True}, {"lora_r": 8, "seed": 1}, {"full": True, "seed": 1}),
        ({"eval_data": None}, {"eval_data": "theirs"}, {"eval_data": None}),
        ({"set": ("a=1",)}, {"set": ("a=2", "b=2")}, {"set": ("b=2", "a=1")}),
    ],
    ids=["length", "data", "full", "null", "set"],
)
def test_a_stronger_choice_voids_what_depends_on_another(
    stronger: dict[str, Any], weaker: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert layered(stronger, weaker) == expected


@STAGES
def test_flat_values_build_the_same_settings_again(command: str) -> None:
    given = build(COMMANDS[command], {"overwrite": True, "output": "here"})
    assert build(COMMANDS[command], flat(given)) == given
    assert flat(given)["overwrite"]


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(PerlError, match=r"perl sft`: learning_rat, zzz\nHint: Did you mean learning_rate\?"):
        build(settings.Sft, {"learning_rat": 1, "zzz": 2})


def test_an_option_of_another_command_is_unknown() -> None:
    with pytest.raises(PerlError, match="Unknown setting for `perl sft`: beta"):
        build(settings.Sft, {"beta": 0.1})


def test_a_list_that_is_not_given_hides_no_preset() -> None:
    assert resolved("eval", {"stop": ("a", "b")})["stop"] == ("a", "b")
    assert resolved("eval", {"stop": ("a", "b")}, stop=("",))["stop"] == ("",)
