"""The signals that ask a process to stop: from Ctrl-C, `kill`, preempted machines and schedulers."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
SOON = 0.05  # seconds
GRACE_SECONDS = 3.0  # from the second signal until a process that is still busy is ended


class Signalled(KeyboardInterrupt):
    """A signal to stop that takes effect at once."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def heard(answer: Callable[[int], object]) -> Iterator[None]:
    """Call `answer` with a signal's number when one arrives inside. Does nothing except in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[int] = []

    def take(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGALRM:
            asked.append(number)
        if _is_in_finaliser(frame):  # Python ignores exceptions there
            signal.setitimer(signal.ITIMER_REAL, SOON)
        else:
            answer(asked[-1])

    before = {number: signal.signal(number, take) for number in (*STOPS, signal.SIGALRM)}
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def answered_at_once(answer: Callable[[int], object], overdue: Callable[[int], object]) -> Iterator[None]:
    """Call `answer` with 1, 2, … as signals to stop arrive inside, and `overdue` with the last one's number a few
    seconds after the second. Both are called from another thread, since Python runs a handler only between its own
    instructions: a backward pass is one call, which can take minutes. To be used inside `heard`, which sets handlers
    for these signals. Does nothing except in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=_listen, args=(reader, answer, overdue), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writer.close()  # ends the thread
        thread.join(GRACE_SECONDS)


def _listen(reader: socket.socket, answer: Callable[[int], object], overdue: Callable[[int], object]) -> None:
    """Read the numbers of signals until the other end is closed."""
    asked: list[int] = []
    with reader, suppress(OSError):  # a closed terminal
        while True:
            try:
                number = reader.recv(1)
            except TimeoutError:
                overdue(asked[-1])
                return
            if not number:
                return
            if number[0] in STOPS:
                asked.append(number[0])
                answer(len(asked))
                reader.settimeout(GRACE_SECONDS if len(asked) > 1 else None)


def _is_in_finaliser(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None


def stop(number: int) -> None:
    """The answer that stops the run at once. Raises Signalled."""
    raise Signalled(number)


def exit_code(error: KeyboardInterrupt) -> int:
    """The exit code after a signal: 130, 143 or 138."""
    return 128 + (error.number if isinstance(error, Signalled) else signal.SIGINT)
