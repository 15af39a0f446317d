"""What a run leaves, to compare one that was killed and resumed with one that was not interrupted."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from perlcli.run import checkpoints

TIMES = ("seconds", "step_time", "train_runtime", "_per_second")  # different in any two runs


def killed_after(whole: Path, step: int, folder: Path) -> None:
    """Make the folder of a run that was killed some time after the checkpoint of a step."""
    shutil.copytree(whole, folder)
    for checkpoint in (folder / "checkpoints").glob("checkpoint-*"):
        if int(checkpoint.name.rpartition("-")[2]) > step:
            shutil.rmtree(checkpoint)
    record = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(json.dumps({**record, "status": "running"}))


def end(folder: Path) -> dict[str, Any]:
    """Everything that a run leaves, except times."""
    found: dict[str, Any] = {}
    for path in folder.rglob("*.safetensors"):
        if "checkpoints" not in path.parts:
            found |= {f"{path.relative_to(folder)} {name}": tensor for name, tensor in load_file(path).items()}
    (last, *_) = checkpoints.found(folder / "checkpoints")
    state = torch.load(last / "optimizer.pt", weights_only=True)
    for number, entry in state["state"].items():
        found |= {f"optimizer {number} {name}": value for name, value in entry.items()}
    for name in ("metrics.jsonl", "samples.jsonl"):
        lines = (folder / name).read_text().splitlines() if (folder / name).exists() else []
        found[name] = [untimed(json.loads(line)) for line in lines]
    record = json.loads((folder / "record.json").read_text())
    found |= {"metrics": untimed(record["metrics"]), **{name: record[name] for name in ("steps", "tokens", "guards")}}
    return found


def untimed(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not any(word in name for word in TIMES)}


def differences(one: Path, other: Path) -> list[str]:
    """The names of what differs between two runs."""
    first, second = end(one), end(other)
    assert first.keys() == second.keys()
    return [name for name in first if not is_same(first[name], second[name])]


def is_same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
