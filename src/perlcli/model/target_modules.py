"""The modules of a model that get an adapter: by default every attention projection."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn
from transformers.pytorch_utils import Conv1D

from perlcli.errors import PerlError
from perlcli.model import expressions
from perlcli.settings import ATTENTION

if TYPE_CHECKING:  # peft takes seconds to import, and a base needs none of it
    from peft import PeftConfig

ATTENTION_BLOCK = re.compile(r"(attn|attention)(?!\w*norm)", re.IGNORECASE)  # but not post_attention_layernorm
ALL_LINEAR = "all-linear"


def target_modules(model: nn.Module, wanted: str, option: str = "--lora-target-modules") -> list[str] | str:
    """The modules that get an adapter, as peft names them; `attention` is every attention projection of the model.

    `wanted` is `attention`, `all-linear` or module names separated by commas; errors blame `option` for it.

    Raises PerlError for names that the model doesn't have, and if no attention is found in the model.
    """
    if wanted == ALL_LINEAR:
        return wanted
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    if wanted != ATTENTION:
        return _named(linear, wanted, option)
    body = [name for name in linear if name.count(".") > 1]  # without the output head
    inside = [name for name in body if any(ATTENTION_BLOCK.search(part) for part in name.split(".")[:-1])]
    if not inside:
        raise PerlError(
            f"No attention found in {type(model).__name__}; its linear modules: {', '.join(_last_parts(linear))}",
            "name the modules to adapt with --lora-target-modules",
        )
    outside = set(linear) - set(inside)
    return sorted({_shortest_tail(name, outside) for name in inside})


def _named(linear: list[str], wanted: str, option: str) -> list[str]:
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    missing = [name for name in names if not any(full == name or full.endswith("." + name) for full in linear)]
    if missing or not names:
        raise PerlError(
            f"{option}: the model has no module {', '.join(missing) or wanted!r}",
            f"its linear modules: {', '.join(_last_parts(linear))}",
        )
    return names


def _last_parts(names: list[str]) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name in names})


def _shortest_tail(name: str, outside: set[str]) -> str:
    """The shortest end of a module's path that names no module outside attention (GPT-2: attn.c_proj, not c_proj)."""
    parts = name.split(".")
    for length in range(1, len(parts)):
        tail = ".".join(parts[-length:])
        if not any(other == tail or other.endswith("." + tail) for other in outside):
            return tail
    return name


def patterns_fault(config: PeftConfig, model: Callable[[], nn.Module | None]) -> str | None:
    """What is wrong with the regular expressions by which an adapter's config chooses modules; None if all is well.
    `model` builds the model to match them with; it is called only if the config has such expressions."""
    texts = [getattr(config, name, None) for name in ("target_modules", "exclude_modules", "layers_pattern")]
    patterns = [text for text in texts if isinstance(text, str) and text not in ("", ALL_LINEAR)]
    for field in ("rank_pattern", "alpha_pattern"):
        patterns += [rf"(.*\.)?({key})$" for key in getattr(config, field, None) or {}]  # as peft matches them
    if not patterns:
        return None
    built = model()
    return expressions.fault(patterns, [name for name, _ in built.named_modules()] if built is not None else [])
