"""What the figures of every script here were measured on, and how they are saved."""

from __future__ import annotations

import datetime
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def described(script: str, kind: str = "cpu", **more: Any) -> dict[str, Any]:
    """What the figures were measured on: command line, date, commit, device and versions, and what a script adds.

    Of absolute paths only the names are kept.
    """
    from perlcli.run import record

    return {
        "command": command_line(script),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "git_commit": commit(),
        "device": device_name(kind),
        "versions": record.package_versions(),
        **more,
    }


def command_line(script: str) -> str:
    """What was typed to run this script."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join(["python", script, *words])


def commit() -> str:
    """The git commit, and whether src differs from it; `unknown` without a git checkout."""
    from perlcli.run import record

    found = record.git_commit()
    if found is None:
        return "unknown"
    changed = subprocess.run(["git", "status", "--porcelain", "src"], capture_output=True, text=True, check=False)
    return found + (", changed" if changed.stdout.strip() else "")


def device_name(kind: str) -> str:
    """The name of the GPU or CPU."""
    if kind == "cuda":
        import torch

        return str(torch.cuda.get_device_name(0))
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{name} ({os.cpu_count()} cores)"


def short_name(kind: str, name: str) -> str:
    """A device in the name of a file: `cpu`, or such as `nvidia-h100-80gb-hbm3`."""
    return "cpu" if kind == "cpu" else re.sub(r"\W+", "-", name).strip("-").lower()


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [heads, ["---"] * len(heads), *rows])


def write(path: Path, content: dict[str, Any], body: str) -> None:
    """Saves the content as JSON and the body as Markdown; content["about"] comes from `described`."""
    about = content["about"]
    on = [about["device"], *([f"threads {about['threads']}"] if "threads" in about else [])]
    commands = "\n".join(f"$ {line}" for line in (about["command"], *about.get("runs", [])))
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    text = (
        f"# {path.name}\n\n{', '.join([*on, about['date']])}, commit {about['git_commit']}\n\n"
        f"```console\n{commands}\n```\n\n{versions}\n\n{body}\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{path}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    Path(f"{path}.md").write_text(text, encoding="utf-8")
