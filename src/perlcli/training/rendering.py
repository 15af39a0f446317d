"""How a run renders its rows: by its options, and otherwise as what it starts from was trained."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import date
from typing import Any

from transformers import PreTrainedTokenizerBase

from perlcli import settings
from perlcli.data import Renderer
from perlcli.data.chat import RESERVED, Style, prints_date
from perlcli.errors import PerlError, nearest
from perlcli.model import tokenizers
from perlcli.model.sources import Source
from perlcli.run import checkpoints
from perlcli.run.files import CHECKPOINTS
from perlcli.run.lifecycle import Run
from perlcli.run.record import RunRecord, find_record
from perlcli.settings.yaml import parse
from perlcli.text import shorten

RENDERING = "rendering"  # in the record, within `model`
KWARGS = "--chat-template-kwargs"
OLDER = "was trained by a version of perlcli that joined text rows and rendered conversations"
Options = settings.DataSettings | settings.TokenizerSettings


def style_of(options: Options, source: Source, tokenizer: PreTrainedTokenizerBase) -> Style:
    """How to render rows for a model. Raises PerlError for options that it was not trained with, or that can't be."""
    has_template, own, name = bool(tokenizer.chat_template), recorded(source.record), source.name
    if options.chat and not has_template:
        raise PerlError(f"--chat: {name} has no chat template", "--chat-template FILE, or --no-chat")
    chat, kwargs = options.chat, parsed_kwargs(options.chat_template_kwargs)
    if own is not None and has_template and chat not in (None, own.chat):
        asked, was = _flag(bool(chat)), _flag(own.chat)
        raise PerlError(f"{asked}: {name} was trained with {was}, so it would read rows that it doesn't know", was)
    if own is not None and kwargs not in (None, own.options):
        problem = f"{KWARGS} {shorten(kwargs)}: {name} was trained with {shorten(own.options)}"
        raise PerlError(problem, "leave the option out")
    _check_spelling(kwargs or {}, tokenizer)
    undecided = ""
    if own is None and source.record is not None and chat is None:
        undecided = f"{name} {OLDER}: it isn't recorded which it learned"
    inherited = own or Style()
    day = inherited.date or date.today().isoformat() if prints_date(tokenizer.chat_template) else ""
    chosen = inherited.chat if chat is None else chat
    return Style(has_template and chosen, inherited.options if kwargs is None else kwargs, day, undecided)


def parsed_kwargs(text: str | None) -> dict[str, Any] | None:
    """The value of --chat-template-kwargs; None if it is not given. Raises PerlError if it isn't a mapping of names."""
    if text is None:
        return None
    value = parse(text, KWARGS)
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        problem = f"{KWARGS} must be a mapping of names to values, not {shorten(value)}"
        raise PerlError(problem, f"{KWARGS} '{{enable_thinking: false}}'")
    if taken := sorted((RESERVED | {"self"}) & set(value)):
        raise PerlError(f"{KWARGS} can't set {', '.join(taken)}", "leave it out")
    return value


def unread(kwargs: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The variables that no chat template of the tokenizer reads."""
    source = str(tokenizer.chat_template)
    return [name for name in kwargs if not re.search(rf"\b{re.escape(name)}\b", source)]


def _check_spelling(kwargs: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises PerlError for a variable that no chat template reads, if one reads another of nearly the same name."""
    known = sorted(set(re.findall(r"\b[a-z]\w*_\w+\b", str(tokenizer.chat_template))))
    for name in unread(kwargs, tokenizer):
        if meant := nearest(name, known):
            raise PerlError(f"{KWARGS}: the chat template does not read {name}", meant)


def summary(style: Style, loss_on: str | None) -> dict[str, Any]:
    """How rows are rendered, as a run's record keeps it."""
    kept: dict[str, Any] = {"chat": style.chat, "chat_template_kwargs": style.options}
    kept |= {"date": style.date} if style.date else {}
    return kept | ({"loss_on": loss_on} if loss_on else {})


def recorded(record: RunRecord | None) -> Style | None:
    """How a run rendered its rows, by its record; None if there is none, or it doesn't say."""
    kept = record.model.get(RENDERING) if record is not None else None
    if not isinstance(kept, Mapping):
        return None
    return Style(bool(kept.get("chat")), dict(kept.get("chat_template_kwargs") or {}), str(kept.get("date") or ""))


def resumed(style: Style, run: Run) -> Style:
    """The same style with the date on which a resumed run began. Raises PerlError if the run is older than styles."""
    before = find_record(str(run.folder)) if run.record.settings.get("resume") else None
    if before is None:
        return style
    own = recorded(before)
    if own is None and not checkpoints.found(run.folder / CHECKPOINTS):
        return style  # nothing was trained: it starts over
    if own is None:
        problem = f"--resume: the run in {run.folder} began with a version of perlcli that rendered rows differently"
        raise PerlError(problem, "finish it with that version, or start it again with --overwrite")
    return replace(style, date=own.date)


def check(source: Source, run: Run, role: str) -> None:
    """Raises PerlError if a reward or anchor with the policy's tokenizer was trained on rows rendered differently."""
    own, ours = recorded(source.record), run.record.model.get(RENDERING)
    if own is None or not isinstance(ours, Mapping) or source.record is None:
        return
    if source.record.model.get("tokenizer") != run.record.model.get("tokenizer"):
        return  # it is rendered with its own
    changes = []
    if own.chat != ours["chat"]:
        changes.append(f"with {_flag(own.chat)}, but here it is {_flag(ours['chat'])}")
    if own.options != ours["chat_template_kwargs"]:
        changes.append(
            f"with {KWARGS} {shorten(own.options)}, but here they are {shorten(ours['chat_template_kwargs'])}"
        )
    if changes:
        problem = f"{role} {source.name} was trained {' and '.join(changes)}: it would read text that it doesn't know"
        raise PerlError(problem, "train it again, or render these rows in the same way")


def decide_later(source: Source, options: Options, renderer: Renderer) -> None:
    """Make text rows an error if a reward's record doesn't say how such rows were rendered, and --chat isn't given."""
    if source.record is not None and recorded(source.record) is None and options.chat is None and renderer.chat:
        problem = f"{source.name} {OLDER}: it isn't recorded which it learned"
        renderer.style = replace(renderer.style, undecided=problem)


def as_trained(renderer: Renderer, source: Source) -> Renderer:
    """The renderer with the date that a reward read in its training."""
    own = recorded(source.record)
    if own is None or own.date in ("", renderer.style.date):
        return renderer
    return Renderer(renderer.tokenizer, renderer.eos_ids, replace(renderer.style, date=own.date))


def own_style(source: Source, tokenizer: PreTrainedTokenizerBase) -> Style:
    """How a reward model with another tokenizer renders rows: as it was trained, as far as its record says."""
    return recorded(source.record) or Style(chat=bool(tokenizer.chat_template))


def renderer_of(options: Options, source: Source, *, trust_remote_code: bool) -> Renderer:
    """The renderer of a model with these options, which reads no weights. Raises PerlError if it can't be made."""
    tokenizer = tokenizers.load_tokenizer(source, trust_remote_code=trust_remote_code)
    tokenizers.use_template(tokenizer, options.chat_template)
    return tokenizers.renderer(source, tokenizer, style_of(options, source, tokenizer))


def _flag(chat: bool) -> str:
    return "--chat" if chat else "--no-chat"
