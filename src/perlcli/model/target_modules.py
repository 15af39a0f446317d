"""The modules of a model that get an adapter: by default every attention projection."""

from __future__ import annotations

import re

from torch import nn
from transformers.pytorch_utils import Conv1D

from perlcli.errors import PerlError
from perlcli.settings import ATTENTION

ATTENTION_BLOCK = re.compile(r"(attn|attention)(?!\w*norm)", re.IGNORECASE)  # but no post_attention_layernorm


def target_modules(model: nn.Module, wanted: str, option: str = "--lora-target-modules") -> list[str] | str:
    """The modules that get an adapter, as peft names them; `attention` is every attention projection of the model.

    Raises PerlError for names that the model doesn't have, and for an architecture whose attention isn't recognised.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    body = [name for name in linear if name.count(".") > 1]  # without the output head
    if wanted == "all-linear":
        return wanted
    if wanted != ATTENTION:
        return _named(linear, wanted, option)
    inside = [name for name in body if any(ATTENTION_BLOCK.search(part) for part in name.split(".")[:-1])]
    if not inside:
        raise PerlError(
            f"No attention found in {type(model).__name__}; its linear modules: {', '.join(_leaves(linear))}",
            "name the ones to adapt with --lora-target-modules",
        )
    outside = set(linear) - set(inside)
    return sorted({_suffix(name, outside) for name in inside})


def _named(linear: list[str], wanted: str, option: str) -> list[str]:
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    missing = [name for name in names if not any(full == name or full.endswith("." + name) for full in linear)]
    if missing or not names:
        raise PerlError(
            f"{option}: the model has no module {', '.join(missing) or wanted!r}",
            f"its linear modules: {', '.join(_leaves(linear))}",
        )
    return names


def _leaves(names: list[str]) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name in names})


def _suffix(name: str, outside: set[str]) -> str:
    """The shortest tail of a module's path that names no module outside attention (gpt2: mlp.c_proj, attn.c_proj)."""
    parts = name.split(".")
    for length in range(1, len(parts)):
        tail = ".".join(parts[-length:])
        if not any(other == tail or other.endswith("." + tail) for other in outside):
            return tail
    return name
