"""Which rows a run trains on, and which it holds out."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from perlcli.run.record import RunRecord, write_record
from perlcli.settings import DataSettings
from perlcli.settings.stages import HeldOutSettings
from perlcli.training import rows


@pytest.mark.parametrize(
    ("resume", "before", "held_out"),
    [(None, 0, 32), ("latest", 0, 0), ("latest", 32, 32)],
    ids=["new", "begun without held-out rows", "resumed"],
)
def test_a_resumed_run_holds_out_what_it_did(
    resume: str | None, before: int, held_out: int, tmp_path: Path, write: Any
) -> None:
    write_record(tmp_path, RunRecord(data={"train": {"held_out": before}}))
    answers = {"chosen": "yes", "rejected": "no"}
    source = write(tmp_path / "pairs.jsonl", [{"prompt": f"prompt {place}", **answers} for place in range(100)])
    settings = SimpleNamespace(
        data=DataSettings(data=str(source)), held_out=HeldOutSettings(), keep=SimpleNamespace(resume=resume)
    )
    run = SimpleNamespace(folder=tmp_path, note=lambda text: None)
    prepared: Any = SimpleNamespace(settings=settings, run=run, renderer=SimpleNamespace(makes_turns=True))
    train, other = rows.load_sides(prepared, "reward")
    assert len(train.rows) == 100 - held_out
    assert (len(other.rows) if other is not None else 0) == held_out
