"""What is set up before the libraries are imported."""

import os
import sys

import pytest

from perlcli import upstream


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the allocator's settings, which are restored afterwards; only `hush`'s environment counts here."""
    for name in upstream.ALLOCATORS:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(upstream, "LOGGERS", {})
    monkeypatch.setattr(upstream, "WARNINGS", ())
    monkeypatch.setattr("logging.setLogRecordFactory", lambda factory: None)
    monkeypatch.setattr("warnings.formatwarning", None)


@pytest.mark.parametrize("platform", ["linux", "win32"])
def test_segments_grow_on_linux_only(monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    upstream.hush()
    assert os.environ.get("PYTORCH_ALLOC_CONF") == ("expandable_segments:True" if platform == "linux" else None)


@pytest.mark.parametrize("name", upstream.ALLOCATORS)
def test_the_user_s_allocator_stays(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "backend:native")
    upstream.hush()
    assert [os.environ[each] for each in upstream.ALLOCATORS if each in os.environ] == ["backend:native"]
