"""The modules of a model that get an adapter: by default every attention projection, but none that text never reaches.
Regular expressions from a file are tried before they are used: some take years to match a name of thirty letters."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from perlcli.errors import PerlError
from perlcli.settings import ATTENTION
from perlcli.text import shorten

if TYPE_CHECKING:  # peft takes seconds to import, and a base needs none of it
    from peft import PeftConfig

ATTENTION_BLOCK = re.compile(r"(attn|attention)(?!\w*norm)", re.IGNORECASE)  # but not post_attention_layernorm
CROSS_ATTENTION = re.compile(r"cross_?att", re.IGNORECASE)
HEADS = ("classifier", "score")  # what peft itself writes as modules_to_save of a reward
NO_TEXT = "where no text arrives: training on text would never change its adapter"
ALL_LINEAR = "all-linear"
SECONDS = 2.0  # processor time for one expression on all names; an ordinary one takes microseconds


class _TooLong(Exception):
    """The time is up."""


def target_modules(model: nn.Module, wanted: str, option: str = "--lora-target-modules") -> list[str] | str:
    """The modules that get an adapter, as peft names them, where `without_text` matches none of them. `wanted` is
    `attention`, `all-linear` or names separated by commas. Raises PerlError, which blames `option`, if the model lacks
    one of the names or has it only where no text arrives, or has no attention."""
    if wanted == ALL_LINEAR:
        return wanted
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    silent = without_text(model)
    reading = [name for name in linear if silent is None or not re.fullmatch(silent, name)]
    last_parts = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in reading}))
    if wanted != ATTENTION:
        names = [name.strip() for name in wanted.split(",") if name.strip()]
        missing = [name for name in names if not any(_ends_with(full, name) for full in linear)]
        if missing or not names:
            problem = f"{option}: the model has no module {', '.join(missing) or wanted!r}"
            raise PerlError(problem, f"its linear modules: {last_parts}")
        for name in names:
            if not any(_ends_with(full, name) for full in reading):
                where = next(full for full in linear if _ends_with(full, name))
                raise PerlError(f"{option}: {name} is {where}, {NO_TEXT}", f"linear modules that do: {last_parts}")
        return names
    body = [name for name in reading if name.count(".") > 1]  # without the output head
    inside = [name for name in body if any(ATTENTION_BLOCK.search(part) for part in name.split(".")[:-1])]
    if not inside:
        problem = f"No attention found in {type(model).__name__}; its linear modules: {last_parts}"
        raise PerlError(problem, "name the modules to adapt with --lora-target-modules")
    outside = set(reading) - set(inside)
    return sorted({_shortest_tail(name, outside) for name in inside})


def without_text(model: nn.Module) -> str | None:
    """A regular expression for the modules that text never reaches: towers for images and sound, what projects
    their output, and layers that attend to them. None for a model that only reads text."""
    if not isinstance(model, PreTrainedModel) or not model.config.sub_configs:
        return None
    decoder, names = model.get_decoder(), {module: name for name, module in model.named_modules()}
    if decoder not in names:
        return None
    kept = {decoder, model.get_output_embeddings(), *(getattr(model, head, None) for head in HEADS)}
    roots, module, path = [], model, names[decoder].split(".") if names[decoder] else []
    for part in path:  # from the model down to its decoder: all that branches off
        roots += [child for child in module.children() if child not in kept and child is not getattr(module, part)]
        module = getattr(module, part)
    roots += [part for part in decoder.children() if _holds_a_tower(part, model.config)]
    roots += [layer for layer in decoder.modules() if layer is not decoder and _only_attends_elsewhere(layer)]
    paths = "|".join(re.escape(names[root]) for root in roots if names[root])
    return rf"(.*\.)?({paths})(\..*)?" if paths else None


def _holds_a_tower(part: nn.Module, config: PreTrainedConfig) -> bool:
    """Whether a module has a part that is configured as one of the model's towers."""
    text = type(config.get_text_config())
    towers = tuple(kind for kind in config.sub_configs.values() if isinstance(kind, type) and kind is not text)
    return any(type(getattr(module, "config", None)) in towers for module in part.modules())


def _only_attends_elsewhere(layer: nn.Module) -> bool:
    """Whether a layer's only attention is to something else than text (Mllama): text passes by it."""
    attention = [name for name, _ in layer.named_children() if ATTENTION_BLOCK.search(name)]
    return bool(attention) and all(CROSS_ATTENTION.search(name) for name in attention)


def _ends_with(name: str, tail: str) -> bool:
    return f".{name}".endswith(f".{tail}")


def _shortest_tail(name: str, outside: set[str]) -> str:
    """The shortest end of a module's path that names no module outside attention (GPT-2: attn.c_proj, not c_proj)."""
    parts = name.split(".")
    for length in range(1, len(parts)):
        tail = ".".join(parts[-length:])
        if not any(_ends_with(other, tail) for other in outside):
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
    return expression_fault(patterns, [name for name, _ in built.named_modules()] if built is not None else [])


def expression_fault(expressions: Iterable[str], names: Sequence[str], seconds: float = SECONDS) -> str | None:
    """What is wrong with the first expression that is invalid or can't be matched with these names in time."""
    for expression in expressions:
        try:
            with _limit(seconds):
                compiled = re.compile(expression)
                for name in names:
                    compiled.fullmatch(name)
        except (re.error, RecursionError, OverflowError) as error:
            return f"{shorten(expression)} is not a valid regular expression: {error}"
        except _TooLong:
            return f"the regular expression {shorten(expression)} takes longer than {seconds:g} s to match module names"
    return None


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """Raises _TooLong after this much processor time: the re module handles signals while it searches."""
    if threading.current_thread() is not threading.main_thread():  # Python can set a timer only in the main thread
        yield
        return

    def ring(*_: object) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGVTALRM, ring)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
