"""Settings from flat values, and back."""

import pytest

from perlcli import settings
from perlcli.errors import PerlError
from perlcli.settings import COMMANDS, build, flat

STAGES = pytest.mark.parametrize("command", COMMANDS)


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
