"""RL by a real vLLM server on a CPU: `make vllm` installs one, without which these tests are skipped."""

import json
import os
import shlex
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from perlcli.run.record import read_record

PYTHON = Path(os.environ.get("PERL_TESTS_VLLM", Path(__file__).parents[2] / ".vllm")) / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason=f"there is no vLLM: make vllm installs one ({PYTHON})"),
]
# One thread, and little memory for its cache
VARIABLES = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
PATIENCE = 300  # seconds for a server to start
RL = ("--rollouts", "vllm", "--max-length", "128", "--max-completion-length", "12", "--learning-rate", "1e-2")
REWARD = ("--reward", "reward.py:reward")
BATCH = ("--per-device-train-batch-size", "8", "--gradient-accumulation-steps", "1", "--eval-fraction", "0")

Perl = Callable[..., Any]


@contextmanager
def serving(command: str) -> Iterator[str]:
    """The address of the server that a command of `perl serve` starts; it has ended at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variable, _, *words = shlex.split(command)
    words[words.index("--port") + 1] = str(port)
    assert words[0] == "serve"
    # vllm-cpu has no `vllm` that works: its package has another name
    started = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", *words[1:]]
    environment = os.environ | VARIABLES | dict([variable.split("=")]) | {"PYTHONPATH": ""}
    with Path("server.txt").open("w") as log:
        server = subprocess.Popen([*started, "--enforce-eager"], stdout=log, stderr=log, env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(url, server)
        yield url
    finally:
        server.terminate()
        server.wait(60)


def wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and server.poll() is None:
        try:
            if requests.get(f"{url}/health", timeout=5).ok:
                return
        except requests.RequestException:
            pass
        time.sleep(1)
    pytest.fail(f"vLLM didn't start:\n{Path('server.txt').read_text()[-4000:]}")


@pytest.fixture
def start(perl: Perl, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    Path("reward.py").write_text(
        "def reward(completions, **_):\n    return [float(len(str(c))) for c in completions]\n"
    )
    return lambda *words: serving(perl("serve", *words, "--dtype", "bfloat16").stdout.splitlines()[0])


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
