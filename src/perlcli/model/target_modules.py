"""The modules of a model that get an adapter: by default every attention projection, but none that text never reaches.
Regular expressions from a file are tried before they are used: some take years to match a name of thirty letters."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from perlcli.errors import PerlError
from perlcli.model.time_limit import TooLong, limited
from perlcli.settings import ATTENTION
from perlcli.text import shorten

if TYPE_CHECKING:  # peft takes seconds to import, and a base needs none of it
    from peft import PeftConfig

ATTENTION_BLOCK = re.compile(r"(attn|attention)(?!\w*norm)", re.IGNORECASE)  # but not post_attention_layernorm
ATTENTION_CLASS = re.compile(r"Attention$")  # for blocks with another name, such as `mixer` and `temporal_block`
EXPERTS = re.compile(r"experts$", re.IGNORECASE)
CROSS_ATTENTION = re.compile(r"cross_?att", re.IGNORECASE)
# As an operand or argument, also transposed or in another dtype; not a part of it, nor its shape.
WEIGHT_READ = re.compile(r"self\.(\w+)\.weight\b(?!\[|\.(?!(?:t|T|mT|to|type|float|transpose|view)\b))")
HEADS = ("classifier", "score")  # what peft itself writes as modules_to_save of a reward
NO_TEXT = "where no text arrives: training on text would never change its adapter"
READ = "whose weight the model's code reads itself: an adapter on it would be bypassed"
AT_THE_HEAD = "the output head, whose weight the loss reads itself: an adapter on it would be bypassed"
ALL_LINEAR = "all-linear"
SECONDS = 2.0  # processor time for one expression on all names; an ordinary one takes microseconds


def target_modules(model: nn.Module, wanted: str, option: str = "--lora-target-modules") -> list[str] | str:
    """The modules that get an adapter, as peft names them, where `without_text` matches none of them. `wanted` is
    `attention`, `all-linear` or names separated by commas. A model without attention gets it on all projections of its
    layers. Raises PerlError, which blames `option`, for names that the model lacks, or that can't be adapted."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    head, closed = _head(model, linear), read_directly(model)
    silent = without_text(model)
    reading = [name for name in linear if silent is None or not re.fullmatch(silent, name)]
    body = [name for name in reading if name != head and name not in closed]
    if wanted == ALL_LINEAR:
        return _tails(model, body) if closed else wanted
    if wanted != ATTENTION:
        last_parts = ", ".join(_tails(model, body))
        return _named(wanted, option, {"": linear, NO_TEXT: reading, READ: body}, head, last_parts)
    inside = [name for name in body if any(ATTENTION_BLOCK.search(part) for part in name.split(".")[:-1])]
    inside = inside or _in_blocks(model, body)
    if not body:
        problem = f"{type(model).__name__} has no linear modules that an adapter could be put on"
        raise PerlError(problem, "name another --model")
    inside = inside or [name for name in body if "." in name]
    return _tails(model, inside)


def _named(wanted: str, option: str, kinds: dict[str, list[str]], head: str, last_parts: str) -> list[str]:
    """The names in a list. `kinds` are the linear modules, and those left when modules are taken out for a reason."""
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    missing = [name for name in names if not any(_ends_with(full, name) for full in kinds[""])]
    if missing or not names:
        problem = f"{option}: the model has no module {', '.join(missing) or wanted!r}"
        raise PerlError(problem, f"its linear modules: {last_parts}")
    for name in names:
        matched = [full for full in kinds[""] if _ends_with(full, name)]
        if matched == [head]:
            raise PerlError(f"{option}: {name} is {AT_THE_HEAD}", f"its linear modules: {last_parts}")
        if not set(matched) & set(kinds[NO_TEXT]):
            raise PerlError(f"{option}: {name} is {matched[0]}, {NO_TEXT}", f"linear modules that do: {last_parts}")
        closed = sorted(set(matched) & set(kinds[NO_TEXT]) - set(kinds[READ]) - {head})
        if closed:
            raise PerlError(f"{option}: {name} is {closed[0]}, {READ}", f"its linear modules: {last_parts}")
    return names


def _head(model: nn.Module, linear: Sequence[str]) -> str:
    """The name of the output head; empty without one."""
    found = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    names = [name for name, module in model.named_modules() if module is found and found is not None]
    return names[0] if names else next((name for name in linear if "." not in name), "")


def _in_blocks(model: nn.Module, linear: Sequence[str]) -> list[str]:
    """The linear modules in blocks whose class is an attention, whatever their name is."""
    blocks = [name for name, module in model.named_modules() if ATTENTION_CLASS.search(type(module).__name__)]
    return [name for name in linear if any(name.startswith(f"{block}.") for block in blocks)]


def read_directly(model: nn.Module) -> set[str]:
    """The linear modules whose weight the code of their block hands to a kernel in some path, such as those of Mamba's
    mixers: an adapter on them would be bypassed where that kernel is installed. peft refuses some of them by name."""
    found = set()
    kinds = {kind: _handed_on(kind) for kind in {type(module) for module in model.modules()}}
    for name, block in model.named_modules():
        for child in kinds[type(block)]:
            if isinstance(getattr(block, child, None), nn.Linear | Conv1D):
                found.add(f"{name}.{child}" if name else child)
    return found


def _handed_on(kind: type) -> frozenset[str]:
    """The names of submodules whose `weight` a class's methods read, other than for its dtype, shape or device."""
    if kind.__module__.partition(".")[0] == "torch":
        return frozenset()
    found: set[str] = set()
    for name, method in vars(kind).items():
        if inspect.isfunction(method) and not name.startswith(("__init__", "_init", "reset")):
            try:
                found |= set(WEIGHT_READ.findall(inspect.getsource(method)))
            except (OSError, TypeError):  # code without a file
                continue
    return frozenset(found)


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


def experts(model: nn.Module) -> list[str]:
    """The ends of the names of parameters that hold the weights of all experts of a layer: (experts, out, in)."""
    found = set()
    for name, module in model.named_modules():
        if EXPERTS.search(type(module).__name__) or EXPERTS.search(name.rpartition(".")[2]):
            held = [own for own, parameter in module.named_parameters(recurse=False) if parameter.dim() == 3]
            found |= {f"{name.rpartition('.')[2]}.{own}" for own in held}
    return sorted(found)


def _ends_with(name: str, tail: str) -> bool:
    return f".{name}".endswith(f".{tail}")


def _tails(model: nn.Module, chosen: Iterable[str]) -> list[str]:
    """The shortest ends of the chosen modules' paths that name no other module (GPT-2: attn.c_proj, not c_proj)."""
    wanted = set(chosen)
    silent = without_text(model)  # peft leaves these out
    others = {name for name, _ in model.named_modules() if name not in wanted}
    others = {name for name in others if silent is None or not re.fullmatch(silent, name)}
    taken = {tail for name in others for tail in _ends(name)}
    return sorted({next((tail for tail in _ends(name) if tail not in taken), name) for name in wanted})


def _ends(name: str) -> list[str]:
    """All ends of a module's path, the shortest first."""
    parts = name.split(".")
    return [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]


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
            with limited(seconds):
                compiled = re.compile(expression)
                for name in names:
                    compiled.fullmatch(name)
        except (re.error, RecursionError, OverflowError) as error:
            return f"{shorten(expression)} is not a valid regular expression: {error}"
        except TooLong:
            return f"the regular expression {shorten(expression)} takes longer than {seconds:g} s to match module names"
    return None
