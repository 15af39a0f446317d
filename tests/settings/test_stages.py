"""The choices of options that other rooms define too."""

from typing import get_args

from perlcli.data.formats import NAMES
from perlcli.settings import DataFormat


def test_every_format_of_data_is_a_choice() -> None:
    assert get_args(DataFormat) == tuple(NAMES)
