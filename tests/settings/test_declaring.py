"""The declarations of the options: names, help, defaults, short forms."""

import dataclasses

import pytest

from perlcli import settings
from perlcli.settings import COMMANDS, GENERAL, options

ADDED = ("config", "debug", "help")  # by the command line, for every command
STAGES = pytest.mark.parametrize("command", COMMANDS)


@STAGES
def test_a_command_has_at_most_65_options_with_unique_names(command: str) -> None:
    names = [item.name for item in options(COMMANDS[command])] + list(ADDED)
    assert len(names) == len(set(names))
    assert len(names) <= 65


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
