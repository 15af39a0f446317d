"""What a run is complete without may fail; what it needs may not."""

import errno
import shutil
from pathlib import Path

import pytest

from perlcli import settings
from perlcli.errors import PerlError
from perlcli.run.lifecycle import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = Run(settings.build(settings.Sft, {"output": str(tmp_path / "run")}))
    made.begin()
    return made


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (ValueError("bad\nglyph"), "ValueError: bad glyph"),
        (PerlError("The template fails", "another one"), "The template fails"),
        (MemoryError(), "This machine's memory is too small (out of memory)"),
    ],
)
def test_an_extra_that_fails_is_a_note(run: Run, error: Exception, why: str) -> None:
    with run.extra("The plots"):
        raise error
    assert run.record.notes == [f"The plots could not be made: {why}."]


def test_a_full_disk_a_deleted_folder_and_a_signal_are_no_notes(run: Run) -> None:
    with pytest.raises(OSError, match="No space"), run.extra("The plots"):
        raise OSError(errno.ENOSPC, "No space left on device", str(run.folder / "plots"))
    with pytest.raises(KeyboardInterrupt), run.extra("The plots"):
        raise KeyboardInterrupt
    shutil.rmtree(run.folder)
    with pytest.raises(PerlError, match="is gone"), run.extra("The samples"):
        run.append("samples.jsonl", {})
    assert run.record.notes == []
