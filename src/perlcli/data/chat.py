"""A model's chat template: the text of a conversation, and where a policy begins to write. `dialogs` makes rows of it,
`render` turns the text into tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from perlcli.data.rows import Message, Template
from perlcli.data.traits import Traits
from perlcli.errors import PerlError, line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rendering = str | list[int]  # text, or the token ids of a tokenizer that renders conversations itself
Span = tuple[int, int]
CODES = ("-d", "-m", "-j", *"aAbBcdDeFGhHIjmMpSTuUVwWxXyYZ")  # of strftime; those of the time are midnight
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
LATEST = 2**21  # characters of the latest conversations and their renderings
OTHER_TEMPLATE = "use another --chat-template"
# What `apply_chat_template` decides itself, so that no row or option may.
RESERVED = {"conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize"}
RESERVED |= {"padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"}
RESERVED |= {"return_assistant_tokens_mask", "sanitize_control_tokens"}


class RowRefused(PerlError):
    """A row that can't become the tokens that it should."""


@dataclass(frozen=True)
class Style:
    """How rows are rendered."""

    chat: bool = True  # a text row's prompt is a user turn and its completion the assistant's, if there is a template
    options: Template = field(default_factory=dict)  # what every row passes to the chat template
    date: str = ""  # what a template prints as today's, YYYY-MM-DD; empty: today's
    undecided: str = ""  # why text rows need --chat or --no-chat


class Chat:
    """Renders conversations with a tokenizer's chat template. `ends` are the tokens that end an answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], style: Style) -> None:
        self.tokenizer, self.style, self.end_ids = tokenizer, style, tuple(ends)
        self.ends = tuple(str(tokenizer.convert_ids_to_tokens(token)) for token in ends)
        self._latest: dict[str, Rendering] = {}
        self._kept = 0  # characters in `_latest`
        self.traits = Traits(lambda messages, template: self.text(self.conversation(messages, template)))

    @cached_property
    def is_text(self) -> bool:
        """Whether a conversation is rendered as text and then encoded; some tokenizers override this."""
        from transformers import PreTrainedTokenizerBase

        return type(self.tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template

    def prompt(self, messages: list[Message], template: Template) -> Rendering:
        """What a policy is given: the template opens the assistant's turn, or leaves a last one open to be continued.
        Raises RowRefused if it can't be rendered."""
        if is_open(messages):
            return self._render(messages, template, {"continue_final_message": True})
        return self.asked(messages, template)

    def asked(self, messages: list[Message], template: Template) -> Rendering:
        """A conversation to which the assistant answers next. Raises RowRefused if it can't be rendered."""
        return self._render(messages, template, {"add_generation_prompt": True})

    def conversation(self, messages: list[Message], template: Template, source: str | None = None) -> Rendering:
        """A complete conversation, by this template or by the `source` of another. Raises RowRefused if it can't be
        rendered."""
        return self._render(messages, template, {}, source)

    def _render(
        self, messages: list[Message], template: Template, flags: dict[str, bool], source: str | None = None
    ) -> Rendering:
        """A conversation as the template renders it, of which the latest are kept: the completions of a pair share
        their prompt, and in `perl data check` the stages share their rows."""
        key = repr((messages, template, flags, source is None))
        known = self._latest.get(key)
        if known is None:
            known = self._latest[key] = self._rendered(messages, template, flags, source)
            self._kept += len(key) + len(known)
        while self._kept > LATEST:
            oldest = next(iter(self._latest))
            self._kept -= len(oldest) + len(self._latest.pop(oldest))
        return known

    def _rendered(
        self, messages: list[Message], template: Template, flags: dict[str, bool], source: str | None
    ) -> Rendering:
        messages = [{key: value for key, value in each.items() if key != "weight"} for each in messages]
        options = self.options(template)

        def render(given: list[Message]) -> Rendering:
            apply: Any = self.tokenizer.apply_chat_template
            if not self.is_text:
                return list(apply(given, tokenize=True, return_dict=True, **options, **flags)["input_ids"])
            jinja = self._dated(self.source(options) if source is None else source)
            text = str(apply(given, tokenize=False, chat_template=jinja, **options, **flags))
            text.encode()  # half of a surrogate pair is an error that tokenizers don't explain
            return text

        try:
            rendered = render(messages)
        except Exception as error:  # a model's template can raise anything
            for other in _variants(messages):
                with suppress(Exception):
                    return render(other)
            problem = f"The chat template can't render {messages!r:.200}: {line(error)}"
            raise RowRefused(problem, OTHER_TEMPLATE) from error
        parsed = _with_arguments(messages, lambda value: json.loads(value) if isinstance(value, str) else value)
        if parsed and any(_is_quoted_twice(call, self.text(rendered)) for call in _arguments(messages)):
            with suppress(Exception):
                return render(parsed)
        return rendered

    def options(self, template: Template) -> Template:
        """What is passed to the chat template: what every row passes, and what this one does. Raises RowRefused for
        names that transformers needs for itself."""
        options = {**self.style.options, **template}
        if taken := sorted(RESERVED & set(options)):
            raise RowRefused(f"chat_template_kwargs can't set {', '.join(taken)}", "leave it out")
        return options

    def source(self, options: Template) -> str:
        """The Jinja source of the template for rows with these options."""
        return str(cast(Any, self.tokenizer).get_chat_template(None, options.get("tools")))

    def _dated(self, source: str) -> str:
        """The Jinja source of a template, with the style's date in place of today's: a macro of the same name hides the
        function of transformers, which turns functions among a template's variables into text."""
        if not prints_date(source):
            return source
        day = date.fromisoformat(self.style.date) if self.style.date else date.today()
        replaced = "".join(f".replace('%{code}', {day.strftime(f'%{code}')!r})" for code in CODES)
        return f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n{source}"

    def text(self, rendering: Rendering) -> str:
        """A rendering as text, special tokens included."""
        return rendering if isinstance(rendering, str) else str(self.tokenizer.decode(rendering))

    @cached_property
    def training_source(self) -> str | None:
        """trl's variant of this template, which keeps reasoning and marks what the assistant says; None without one."""
        from trl.chat_template_utils import get_training_chat_template

        with suppress(Exception):  # a ValueError for a template that trl doesn't know; its probes can raise more
            return get_training_chat_template(self.tokenizer)
        return None

    @cached_property
    def added(self) -> list[str]:
        """The tokens that are never split, as text."""
        return [str(token) for token in self.tokenizer.added_tokens_decoder.values() if str(token).strip()]

    @cached_property
    def role_tokens(self) -> list[str]:
        """The tokens with which the template frames a user turn."""
        asked = self.text(self.conversation([{"role": "user", "content": "a"}], {}))
        return [token for token in self.added if token in asked]

    def opening(self, template: Template) -> str:
        """What the template opens an answer with."""
        asked: list[Message] = [{"role": "user", "content": "a"}]
        try:
            given, before = self.text(self.asked(asked, template)), self.text(self.conversation(asked, template))
        except RowRefused:
            return ""
        return given.removeprefix(before)

    def marks(self, messages: list[Message], full: str, template: Template) -> Iterator[Span]:
        """Where the template, or trl's variant if it renders the same, marks what the assistant says."""
        from transformers.utils.chat_template_utils import render_jinja_template

        options = self.options(template)
        cleaned = [{k: v for k, v in each.items() if k != "weight" and v is not None} for each in messages]
        for source in (self.source(options), self.training_source):
            if source is None or not MARKED.search(source):
                continue
            render = cast(Callable[..., Any], render_jinja_template)
            given = {**self.tokenizer.special_tokens_map, **options, "chat_template": self._dated(source)}
            with suppress(Exception):
                texts, places = render([cleaned], return_assistant_tokens_mask=True, **given)
                if texts[0] == full:
                    yield from places[0]
                    return


def prints_date(source: str | dict[str, str] | None) -> bool:
    """Whether a chat template prints today's date."""
    return "strftime_now" in str(source)


def is_open(messages: list[Message]) -> bool:
    """Whether a conversation ends in the start of an answer, to be continued."""
    return bool(messages) and messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls")


# Messages as some templates need them


def _arguments(messages: list[Message]) -> Iterator[str]:
    for message in messages:
        for call in message.get("tool_calls") or ():
            arguments = (call.get("function") or call).get("arguments") if isinstance(call, dict) else None
            if isinstance(arguments, str):
                yield arguments


def _is_quoted_twice(arguments: str, text: str) -> bool:
    quoted = json.dumps(arguments, ensure_ascii=False)
    return quoted != f'"{arguments}"' and quoted in text


def _variants(messages: list[Message]) -> Iterator[list[Message]]:
    """The messages with empty text where they have no content, and with the arguments of calls as JSON text."""
    blank = [each if each.get("content") is not None else {**each, "content": ""} for each in messages]
    yield blank
    for version in (messages, blank):
        dumped = _with_arguments(version, lambda value: value if isinstance(value, str) else json.dumps(value))
        if dumped is not None:
            yield dumped


def _with_arguments(messages: list[Message], change: Callable[[Any], Any]) -> list[Message] | None:
    """The messages with the arguments of every call changed; None if there are none, or they can't be changed."""
    if not any(message.get("tool_calls") for message in messages):
        return None
    changed = []
    try:
        for message in messages:
            calls = []
            for call in message.get("tool_calls") or ():
                inner = call.get("function", call)
                new = {**inner, "arguments": change(inner.get("arguments"))}
                calls.append({**call, "function": new} if "function" in call else new)
            changed.append({**message, "tool_calls": calls} if calls else message)
    except (ValueError, AttributeError, TypeError):
        return None
    return changed
