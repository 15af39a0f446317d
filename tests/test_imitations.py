"""The tests under imitations of CUDA: its branches of the libraries, and the tests on a GPU rehearsed without one."""

import os
import subprocess
import sys
from pathlib import Path

import imitations
import pytest

TESTS = Path(__file__).parent
QUANTISED = "cuda_autocast,int8_activations"
GROUPS = {
    "rl": (f"{QUANTISED},compact_head", ["commands/test_rl.py", "training/test_algorithms.py"]),
    "reward": (f"{QUANTISED},compact_head", ["commands/test_reward.py", "training/test_rewards.py"]),
    "adapters": (QUANTISED, ["model/test_adapters.py", "model/test_roles.py", "model/test_scorers.py"]),
    "memory": (QUANTISED, ["commands/test_estimate.py"]),  # of a CPU, whose head is not compact
}


def run(imitated: str, marked: str, *files: str) -> str:
    """What pytest prints for these files, in a process with these imitations."""
    environment = {**os.environ, imitations.CHOSEN: imitated}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-m", marked, *(str(TESTS / name) for name in files)]
    result = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    return result.stdout


def test_gpus_are_hidden_from_the_tests() -> None:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_the_branches_of_cuda_change_nothing(group: str) -> None:
    imitated, files = GROUPS[group]
    run(imitated, "not slow", *files)


@pytest.mark.slow
def test_the_tests_on_a_gpu_are_rehearsed() -> None:
    assert "failed" not in run("cuda", "gpu", "gpu")
