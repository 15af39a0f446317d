"""RL by a real vLLM server on a CPU: `make vllm` installs one, without which these tests are skipped."""

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perlcli.run.record import read_record

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("PERL_TESTS_VLLM", ROOT / ".vllm")) / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason=f"there is no vLLM: make vllm installs one ({PYTHON})"),
]
RL = ("--rollouts", "vllm", "--max-length", "128", "--max-completion-length", "12", "--learning-rate", "1e-2")
REWARD = ("--reward", "reward.py:reward")
BATCH = ("--per-device-train-batch-size", "8", "--gradient-accumulation-steps", "1", "--eval-fraction", "0")

Perl = Callable[..., Any]


@pytest.fixture
def start(perl: Perl, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    Path("reward.py").write_text(
        "def reward(completions, **_):\n    return [float(len(str(c))) for c in completions]\n"
    )
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    serving = importlib.import_module("vllm_cpu").serving

    def started(*words: object) -> Any:
        command = perl("serve", *words, "--dtype", "bfloat16").stdout.splitlines()[0]
        return serving(PYTHON, command, Path("server.txt"))

    return started


def steps(run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("algorithm", ["rloo", "reinforce"])
def test_rl_learns_from_what_a_server_samples(perl: Perl, start: Callable[..., Any], algorithm: str) -> None:
    words = ("rl", *REWARD, "--output", "run", *RL, *BATCH, "--algorithm", algorithm)
    with start() as url:
        perl(*words, "--max-steps", "2", "--vllm-server-base-url", url)
    with start() as url:  # another server, without the adapter
        perl(*words, "--max-steps", "4", "--vllm-server-base-url", url, "--resume")
        perl("eval", "--model", "run", "--rollouts", "vllm", "--vllm-server-base-url", url, "--max-samples", "8")
    found = read_record(Path("run"))
    assert found.guards["rollouts"]["base_mean"] < 0.05 and found.guards["rollouts"]["adapter_mean"] < 0.05
    assert [row["step"] for row in steps("run")] == [1, 2, 3, 4]
    for row in steps("run"):
        assert row["sampler/diff_mean"] < 0.05  # of 16 bits to float32
        assert 0.9 < row["sampler/importance"] < 1.1


def test_another_base_is_noticed(perl: Perl, start: Callable[..., Any], llama: Path, rows: dict[str, Path]) -> None:
    with start() as url:
        words = ("rl", "--model", llama, "--data", rows["prompts"], "--output", "other", *REWARD, *RL, *BATCH)
        result = perl(*words, "--vllm-server-base-url", url, code=2)
    assert f"The vLLM server {url} splits" in result.output
