"""Regular expressions from files: those that can't be read, or would take years, are told."""

import signal
import threading

import pytest

from perlcli.model.expressions import fault

NAMES = [f"model.layers.{number}.self_attn.q_proj" for number in range(4)]


@pytest.mark.parametrize("expression", ["", r".*\.q_proj", r"model\.layers\.[01]\..*", "a|b"])
def test_an_ordinary_expression_is_in_order(expression: str) -> None:
    assert fault([expression], NAMES) is None


@pytest.mark.parametrize("expression", ["(", "[", "*", "\\", "(?:", "a{99999999999999}"])
def test_an_invalid_expression_is_an_error(expression: str) -> None:
    assert str(fault(["a", expression], NAMES)).startswith(f"{expression!r} is not a valid regular expression: ")


@pytest.mark.parametrize("expression", [r"(.*)*x", r"(\w+\.?)+!", ".*" * 12 + "x"])
def test_an_expression_that_takes_years_is_stopped(expression: str) -> None:
    before = signal.getsignal(signal.SIGVTALRM)
    found = fault([expression], NAMES, seconds=0.1)
    assert found == f"the regular expression {expression!r} takes longer than 0.1 s to match module names"
    assert signal.getsignal(signal.SIGVTALRM) is before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_in_another_thread_there_is_no_timer() -> None:
    found: list[str | None] = []
    thread = threading.Thread(target=lambda: found.append(fault(["a"], NAMES)))
    thread.start()
    thread.join()
    assert found == [None]
