"""The declarations of the options: names, help, defaults, short forms."""

import dataclasses

import pytest

from perlcli import settings
from perlcli.cli.binding import shown_default
from perlcli.settings import COMMANDS, GENERAL, options

ADDED = ("config", "debug", "help")  # by the command line, for every command
STAGES = pytest.mark.parametrize("command", COMMANDS)


@STAGES
def test_a_command_has_at_most_85_options_with_unique_names(command: str) -> None:
    names = [item.name for item in options(COMMANDS[command])] + list(ADDED)
    assert len(names) == len(set(names))
    assert len(names) <= 85


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
def test_the_command_of_settings_is_found_from_object_and_class(command: str) -> None:
    assert settings.command_of(COMMANDS[command]) == settings.command_of(COMMANDS[command]()) == command


@STAGES
def test_settings_and_their_groups_are_frozen(command: str) -> None:
    whole = COMMANDS[command]()
    for part in (whole, *(getattr(whole, item.name) for item in dataclasses.fields(whole))):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, dataclasses.fields(part)[0].name, None)


@STAGES
def test_a_flag_is_off_until_it_is_given_but_shared_prompts_are_on(command: str) -> None:
    on = {item.name for item in options(COMMANDS[command]) if item.type is bool and item.default}
    assert on <= {"shared_prompts"}


@pytest.mark.parametrize("command", ["sft", "reward", "rl", "eval"])
def test_the_help_says_the_default_that_holds(command: str) -> None:
    resolved = settings.flat(settings.resolve(COMMANDS[command](), {}))
    shown = {item.name: shown_default(item, command) for item in options(COMMANDS[command])}
    named = {item.name for item in options(COMMANDS[command]) if "{}" in item.unset}
    assert named >= (set(GENERAL) | {"learning_rate", "output", "split"}) & set(shown)
    for name in named - {"output", "split"}:
        found = shown[name].partition(",")[0].partition(";")[0]
        assert found == str(resolved[name]) or float(found) == resolved[name], name
    assert all("stage" not in default for default in shown.values())


@pytest.mark.parametrize(
    ("command", "name", "default"),
    [
        ("sft", "learning_rate", "0.0002; with --full 2e-5"),
        ("rl", "learning_rate", "1e-5; with --full 1e-6"),
        ("compare-full", "learning_rate", "sft 0.0002, reward 0.0001, rl 1e-5"),
        ("reward", "gradient_accumulation_steps", "1"),
        ("rl", "gradient_accumulation_steps", "4"),
        ("estimate", "gradient_accumulation_steps", "1, rl 4"),
        ("sft", "split", "train"),
        ("eval", "split", "test or validation"),
        ("data check", "split", "train"),
        ("reward", "output", "runs/reward"),
        ("eval", "output", "eval-MODEL next to the run"),
        ("rl", "num_generations", "4, reinforce: 1"),
    ],
)
def test_the_help_says_the_default_of_its_own_stage(command: str, name: str, default: str) -> None:
    (item,) = (item for item in options(settings.ALL_COMMANDS[command]) if item.name == name)
    assert shown_default(item, command) == default


def test_an_option_that_two_commands_share_is_declared_once() -> None:
    ours = {item.name: item for item in options(settings.Merge)}
    for item in options(settings.Eval):
        if item.name in ("trust_remote_code", "dry_run", "overwrite"):
            assert dataclasses.replace(item, group="", panel="") == dataclasses.replace(
                ours[item.name], group="", panel=""
            )
