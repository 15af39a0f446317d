"""The short form of the chaos test: `python tests/chaos.py` is the long one."""

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import chaos
import pytest
from chaos import PHASES, Board


@pytest.mark.slow
def test_runs_that_end_in_any_way_resume_to_the_same_end(tmp_path: Path) -> None:
    words = ["--kills", "12", "--ends", "18", "--seed", "1", "--output", str(tmp_path / "report")]
    done = subprocess.run(
        [sys.executable, chaos.__file__, *words], capture_output=True, text=True, timeout=2400, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    report = json.loads((tmp_path / "report.json").read_text())
    kills, about = report["kills"], report["about"]
    assert about["command"].startswith("python tests/chaos.py --kills 12 --ends 18 --seed 1") and about["seconds"] > 0
    ended = [kill for kill in kills if kill["way"] != chaos.KILL]
    assert {(kill["phase"], kill["way"]) for kill in ended} == set(product(PHASES, chaos.WAYS))
    assert len(kills) >= 12 + 18 and {kill["stage"] for kill in kills} == set(chaos.STAGES)
    assert all(kill["again"] == "exact" for kill in kills)
    assert "| reinforce |" in (tmp_path / "report.md").read_text()


def test_the_board_counts_phases_and_their_own_time() -> None:
    board = Board()
    board.begin()
    learning, scoring = PHASES.index("learning"), PHASES.index("scoring")
    for _ in range(2):
        with board.inside(learning):
            with board.inside(scoring):
                assert board.phase == scoring
            assert board.phase == learning
    assert board.phase == 0
    board.close()
    assert [board.read(phase)[0] for phase in range(len(PHASES))] == [1, 0, 2, 2, 0, 0]
    assert all(board.read(phase)[1] > 0 for phase in (0, learning, scoring))
