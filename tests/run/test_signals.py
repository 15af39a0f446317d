"""The signals that ask for the end."""

import os
import signal
import time

import pytest

from perlcli.run import signals
from perlcli.run.signals import Signalled


class Dying:
    """Gets a signal while it is taken down."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        sum(range(1000))  # here Python would drop what is raised


def test_a_signal_in_a_finaliser_is_heard_behind_it() -> None:
    with pytest.raises(Signalled) as caught, signals.heard(signals.stop):
        Dying()
        time.sleep(5)
    assert signals.exit_code(caught.value) == 143


def test_nothing_rings_behind() -> None:
    before = [signal.getsignal(number) for number in (*signals.STOPS, signal.SIGALRM)]
    heard: list[int] = []
    with signals.heard(heard.append):
        Dying()
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert [signal.getsignal(number) for number in (*signals.STOPS, signal.SIGALRM)] == before
    assert signals.exit_code(KeyboardInterrupt()) == 130
