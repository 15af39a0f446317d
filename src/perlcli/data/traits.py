"""What a chat template renders of a message, and what it leaves out without an error."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property

from perlcli.data.rows import Message, Template
from perlcli.errors import PerlError

REASONING = ("reasoning_content", "reasoning", "thinking")  # transformers gives each the others' names
OPENED, CLOSED = "<think>", "</think>"
SQUEEZED = re.compile(r"[\s\\\"]+")


def said(message: Message) -> str:
    """What a message says; of an answer, only what follows its reasoning."""
    content = str(message.get("content") or "")
    return content.rpartition(CLOSED)[2] if message["role"] == "assistant" and CLOSED in content else content


def reasoning_of(message: Message) -> str:
    """The reasoning of an answer: in a field of its own, or in its content as `<think>…</think>`; empty without one."""
    own = next((str(message[name]) for name in REASONING if message.get(name)), "")
    if own.strip():
        return own
    content = str(message.get("content") or "")
    return content.rpartition(CLOSED)[0].rpartition(OPENED)[2] if CLOSED in content else ""


def before_reasoning(message: Message) -> str:
    """What an answer says before the reasoning in its content."""
    content = str(message.get("content") or "")
    is_apart = message["role"] == "assistant" and CLOSED in content and OPENED in content
    return content.partition(OPENED)[0] if is_apart else ""


def contains(text: str, part: str, times: int = 1) -> bool:
    """Whether a rendering contains a part so many times, whatever the template did to white space and quotes."""
    part = part.strip()
    if not part or text.count(part) >= times or text.count(json.dumps(part, ensure_ascii=False)[1:-1]) >= times:
        return True
    squeezed = SQUEEZED.sub("", part)
    return not squeezed or SQUEEZED.sub("", text).count(squeezed) >= times


class Traits:
    """What a chat template renders, found by rendering conversations that are easy to recognise. `render` gives the
    text of a conversation, or raises PerlError."""

    def __init__(self, render: Callable[[list[Message], Template], str]) -> None:
        self._render = render

    def lost(self, messages: list[Message], text: str, options: Template) -> str:
        """What the rendering of a conversation leaves out, in words; empty if nothing. Reasoning is not looked at."""
        parts = [(message, part) for message in messages for part in (before_reasoning(message), said(message))]
        given = "\0".join(part for _, part in parts)
        for message, part in parts:
            times = given.count(part.strip()) if part.strip() else 0  # in other messages too
            if not contains(text, part, times):
                return f"the {message['role']} message {part!r:.60}"
            calls = message.get("tool_calls") or ()
            if len(calls) > 1 and self.calls == 1:
                return "more than one of the tool_calls of a message"
            if calls and not self.calls:
                return "tool_calls"
        return "tools" if options.get("tools") and not self.shows_tools else ""

    @cached_property
    def calls(self) -> int:
        """How many of two calls in a message are rendered, with their arguments."""
        return 2 if self._shows_calls(2) else int(self._shows_calls(1))

    def _shows_calls(self, count: int) -> bool:
        names, values = ([f"perlcli_{kind}_{n}" for n in range(count)] for kind in ("call", "value"))
        calls = [
            {"type": "function", "function": {"name": name, "arguments": {"a": value}}}
            for name, value in zip(names, values, strict=True)
        ]
        asked = {"role": "user", "content": "a"}
        with suppress(PerlError):
            text = self._render([asked, {"role": "assistant", "content": None, "tool_calls": calls}], {})
            return all(part in text for part in (*names, *values))
        return False

    @cached_property
    def shows_tools(self) -> bool:
        """Whether the tools of a row are rendered."""
        parameters = {"type": "object", "properties": {"a": {"type": "string", "description": "b"}}}
        function = {"name": "perlcli_tool", "description": "c", "parameters": parameters}
        with suppress(PerlError):
            template = {"tools": [{"type": "function", "function": function}]}
            return "perlcli_tool" in self._render([{"role": "user", "content": "a"}], template)
        return False
