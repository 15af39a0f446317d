"""The signals that ask for the end."""

import hashlib
import os
import signal
import threading
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


def busy() -> None:
    """Computes for about a second in one call, during which Python runs no handler."""
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_500_000)


@pytest.mark.slow
def test_a_signal_is_answered_while_the_main_thread_is_busy() -> None:
    answers: list[tuple[int, float]] = []
    took: list[float] = []

    def answer(count: int) -> None:
        answers.append((count, time.monotonic()))

    with signals.heard(lambda number: took.append(time.monotonic())), signals.answered_at_once(answer, print):
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        busy()
    assert [count for count, _ in answers] == [1]
    assert answers[0][1] < took[0]
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.slow
def test_a_process_that_stays_busy_after_the_second_signal_is_overdue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "GRACE_SECONDS", 0.2)
    answers, late = list[int](), list[int]()
    with signals.heard(lambda number: None), signals.answered_at_once(answers.append, late.append):
        for wait, number in ((0.1, signal.SIGINT), (0.2, signal.SIGTERM)):
            threading.Timer(wait, os.kill, (os.getpid(), number)).start()
        busy()
    assert (answers, late) == ([1, 2], [signal.SIGTERM])


def test_nothing_is_overdue_once_the_second_signal_was_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "GRACE_SECONDS", 0.2)
    answers, late = list[int](), list[int]()
    with signals.heard(lambda number: None), signals.answered_at_once(answers.append, late.append):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.4)
    assert (answers, late) == ([1, 2], [])
