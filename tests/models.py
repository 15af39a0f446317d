"""Models and adapters that several test modules make."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from conftest import PAD, PRECISIONS
from torch import nn

from perlcli.model import loading, roles
from perlcli.model.sources import locate
from perlcli.settings import LoraSettings, ModelSettings

LORA = LoraSettings(lora_r=4, lora_alpha=8, lora_dropout=0.5, lora_target_modules="attention")


def adapter_folder(folder: Path, base_name: str | None, task: str = "CAUSAL_LM") -> Path:
    """An adapter's folder with nothing but its config."""
    folder.mkdir()
    config = {"peft_type": "LORA", "task_type": task, "base_model_name_or_path": base_name, "r": 2}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def in_hub_cache(name: str, folder: Path) -> str:
    """The id of a repository that holds what a folder does, as an earlier call would have brought it there."""
    top = Path(os.environ["HF_HOME"]) / "hub" / f"models--org--{name}"
    if not top.exists():
        revision = "1" * 40
        (top / "refs").mkdir(parents=True)
        (top / "refs" / "main").write_text(revision)
        shutil.copytree(folder, top / "snapshots" / revision)
    return f"org/{name}"


def scramble(model: nn.Module, seed: int) -> None:
    """Give an adapter random weights, as if it were trained; a fresh one is the identity."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)


def saved_reward(folder: Path, llama: Path, settings: ModelSettings) -> str:
    """The folder of a reward adapter for the tiny Llama in this precision."""
    torch.manual_seed(3)
    model: Any = roles.new_adapter(loading.load_classifier(locate(str(llama)), settings, PAD), LORA, "SEQ_CLS")
    scramble(model, 1)
    roles.round_head(model, model.dtype)
    roles.save_adapter(model, folder)
    return str(folder)


def load_policy(llama: Path, settings: ModelSettings = PRECISIONS["float32"]) -> Any:
    return roles.new_adapter(loading.load_causal(locate(str(llama)), settings), LORA, "CAUSAL_LM")
