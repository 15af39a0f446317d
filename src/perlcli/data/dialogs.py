"""Rows as conversations: what a policy is given, what it would have to write, and what of that is learned.

The rule: the conversation is what the template renders, it starts with what a policy is given before each answer, and
it has everything that the row says. A row for which this can't hold is refused, with what to set. `render` holds the
same rule for tokens.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

from perlcli.data.chat import OTHER_TEMPLATE, Chat, Rendering, RowRefused, Span, is_open
from perlcli.data.rows import Message, Template
from perlcli.data.traits import CLOSED, OPENED, contains, reasoning_of, said

LossOn = Literal["assistant", "all", "last"]
VARIANT = "rendered by trl's variant of the chat template, which keeps the reasoning of answers"
LAST_ONLY = "--loss-on last learns the last answer only; or give each answer a row of its own"
SWITCHES = ("enable_thinking", "thinking")  # what templates call the option that opens or closes <think>


@dataclass(frozen=True, slots=True)
class Dialog:
    """A rendered row. `start` is what a policy is given, empty without a prompt; `turns` are the places in `full` that
    are learned, `mute` those that aren't even with --loss-on all."""

    start: Rendering
    full: Rendering
    turns: tuple[Span, ...] = ()
    mute: tuple[Span, ...] = ()
    lead: str = ""  # how the completion begins
    finding: str = ""  # for the load report


def dialog(
    chat: Chat, prompt: list[Message] | None, completion: list[Message], template: Template, learn: LossOn | None = None
) -> Dialog:
    """A prompt and its completion, or a conversation without a prompt. `learn` is None for a reward model, which learns
    nothing token by token. Raises RowRefused if the rule can't hold."""
    talk = _Talk(chat, prompt, completion, template)
    answers = [place for place in range(talk.first, len(talk.messages)) if talk.is_answer(place)]
    chosen = {"assistant": answers, "last": answers[-1:], "all": answers}.get(learn or "", [])
    mute = [place for place in chosen if talk.messages[place].get("weight") == 0]
    learned = [] if learn == "all" else [place for place in chosen if place not in mute]
    if any(not talk.says_something(place) for place in learned):
        raise RowRefused(
            "An assistant message is empty, so there is nothing to learn", "weight: 0, or leave the row out"
        )
    last = answers[-1:] if answers[-1:] == [len(talk.messages) - 1] else []
    talk.find_starts(sorted({*learned, *mute, *last}))
    fault: RowRefused | None = None
    for source in (None, chat.training_source) if chat.is_text else (None,):
        if source is None and fault is not None:
            break  # trl has no variant
        try:
            full = chat.conversation(talk.messages, template, source)
            talk.check(full, sorted({*learned, *last}))
            turns, quiet = (tuple(talk.span(full, place, source) for place in group) for group in (learned, mute))
        except RowRefused as refused:
            fault = fault or refused
            continue
        start = talk.starts.get(talk.GIVEN, full[:0])
        lead = str(completion[0].get("content") or "") if completion else ""
        return Dialog(start, full, turns, quiet, lead, VARIANT if source else "")
    assert fault is not None
    raise fault


def merged(chat: Chat, row: Dialog, template: Template) -> RowRefused:
    """The error for a conversation whose text starts with the prompt's, but whose tokens do not."""
    shown = chat.text(row.start)[-60:]
    if shown.rstrip().endswith(OPENED):
        return _unlike(chat, {}, shown, template)
    return RowRefused(f"The end of the prompt, {shown[-20:]!r}, merges with what follows it", OTHER_TEMPLATE)


def joined(prompt: list[Message], completion: list[Message]) -> tuple[list[Message], int]:
    """The conversation, and the place where its completion begins; an open answer at the end of the prompt is continued
    by the completion."""
    if not (is_open(prompt) and completion and completion[0]["role"] == "assistant"):
        return [*prompt, *completion], len(prompt)
    content = (prompt[-1].get("content") or "") + (completion[0].get("content") or "")
    answer = {**prompt[-1], **completion[0], "content": content}
    return [*prompt[:-1], answer, *completion[1:]], len(prompt) - 1


@dataclass
class _Talk:
    """A row's messages, the place where its completion begins, and what a policy is given before each answer."""

    chat: Chat
    prompt: list[Message] | None
    completion: list[Message]
    template: Template
    messages: list[Message] = field(init=False)
    first: int = field(init=False)
    starts: dict[int, Rendering] = field(default_factory=dict)
    GIVEN = -1  # the place of the row's prompt

    def __post_init__(self) -> None:
        self.messages, self.first = joined(self.prompt or [], self.completion)

    def is_answer(self, place: int) -> bool:
        return bool(self.messages[place]["role"] == "assistant")

    def says_something(self, place: int) -> bool:
        message = self.messages[place]
        return bool(self._content(place) or reasoning_of(message).strip() or message.get("tool_calls"))

    def find_starts(self, places: list[int]) -> None:
        """Render what a policy is given before the answers at these places, and the row's prompt."""
        if self.prompt is not None:
            is_answered = self.first < len(self.messages) and self.is_answer(self.first)
            render = self.chat.prompt if is_answered or not self.completion else self.chat.conversation
            self.starts[self.GIVEN] = render(self.prompt, self.template)
            if is_answered:
                self.starts[self.first] = self.starts[self.GIVEN]
        for place in places:
            if place not in self.starts:
                self.starts[place] = self.chat.asked(self.messages[:place], self.template)

    def check(self, full: Rendering, answers: list[int]) -> None:
        """Raises RowRefused if the conversation doesn't start as a policy would be given it, or lacks anything that the
        row says; of reasoning, only that of these answers counts: templates drop that of earlier ones."""
        chat, template = self.chat, self.template
        for place, start in self.starts.items():
            if full[: len(start)] != start:
                raise self._misfit(self.first if place == self.GIVEN else place, start)
        check_kept(chat, self.messages, full, template)
        for place in answers:
            message, written = self.messages[place], chat.text(full[len(self.starts[place]) :])
            thought = reasoning_of(message)
            shown = chat.text(self.starts[place])[-60:].rstrip()
            if shown.endswith(OPENED) and not thought:  # an empty block would be closed by a token that merges with it
                raise _unlike(chat, message, shown, template)
            if thought and not contains(written, thought):
                problem = f"The chat template does not render the reasoning of the answer, {thought.strip()!r:.60}"
                raise RowRefused(problem, LAST_ONLY if place < len(self.messages) - 1 else _elsewhere(message))
            if not thought:
                continue
            before = chat.opening(template) + written[: max(written.find(thought.strip()), 0)]
            if before.count(OPENED) > 1:
                problem = "The chat template opens a <think> block of its own before the one in the answer"
                raise RowRefused(problem, "put the reasoning into reasoning_content")

    def _misfit(self, place: int, start: Rendering) -> RowRefused:
        """Why a conversation doesn't start with what a policy is given before the message at a place."""
        message = self.messages[place] if place < len(self.messages) else {}
        if place < len(self.messages) - 1:
            with suppress(RowRefused):
                alone = self.chat.conversation(self.messages[: place + 1], self.template)
                if alone[: len(start)] == start:
                    return RowRefused(
                        f"The chat template renders the answer {said(message)!r:.60} differently once the conversation "
                        "goes on, so it can't be learned as a policy would write it",
                        LAST_ONLY,
                    )
        return _unlike(self.chat, message, self.chat.text(start)[-60:], self.template)

    def span(self, full: Rendering, place: int, source: str | None) -> Span:
        """Where the answer at a place is: from where a policy begins to write, up to the token that ends its turn.
        Raises RowRefused if the template doesn't show where that is."""
        begin, content = len(self.starts[place]), self._content(place)
        if isinstance(full, str):
            is_last = place == len(self.messages) - 1
            end = len(full) if is_last else self._end(full, place, source)
            stop = self._stop(full, begin, end, content) or (end if is_last else begin + len(full[begin:end].rstrip()))
        else:
            upto = self.chat.conversation(self.messages[: place + 1], self.template)
            end = len(upto) if full[: len(upto)] == upto else begin
            stop = next((at + 1 for at in range(begin, end) if full[at] in self.chat.end_ids), end)
        written = self.chat.text(full[begin:stop])
        if stop > begin and all(contains(written, part) for part in (content, *self._calls(place))):
            return begin, stop
        raise RowRefused(
            f"The chat template does not show where the answer {content!r:.60} ends",
            "--loss-on last or all, or mark what is learned by {% generation %} in a --chat-template",
        )

    def _content(self, place: int) -> str:
        """What is to be written of the message at a place: of a continued answer, only its continuation."""
        is_continued = place == self.first and is_open(self.prompt or [])
        return said(self.completion[0] if is_continued else self.messages[place]).strip()

    def _calls(self, place: int) -> list[str]:
        """The names of what the message at a place calls."""
        calls = self.messages[place].get("tool_calls") or ()
        return [str((call.get("function") or call).get("name", "")) for call in calls if isinstance(call, dict)]

    def _stop(self, full: str, begin: int, end: int, content: str) -> int:
        """The end of the token that ends the turn, which is in the answer or right behind it; 0 if there is none."""
        for find in (full.rfind, full.find):  # an answer may be in its reasoning too, or in the token that ends it
            found = find(content, begin, end) if content else -1
            after = found + len(content) if found >= 0 else begin
            stops = [at + len(stop) for stop in self.chat.ends if (at := full.find(stop, after, end)) >= 0]
            if stops:
                return min(stops)
        return next((end + len(stop) for stop in self.chat.ends if full.startswith(stop, end)), 0)

    def _end(self, full: str, place: int, source: str | None) -> int:
        """Where the answer at a place, which is not the last message, ends; 0 if that can't be found."""
        upto = self.chat.text(self.chat.conversation(self.messages[: place + 1], self.template, source))
        if full.startswith(upto):
            return len(upto)
        begin, content = len(self.starts[place]), self._content(place)
        found = full.find(content, begin) if content else -1
        after = found + len(content) if found >= 0 else begin
        for start, end in self.chat.marks(self.messages, full, self.template):
            if start <= after <= end:
                return end
        following = said(self.messages[place + 1]).strip()
        limit = full.find(following, after) if following else len(full)
        closing = upto[upto.rfind(content) + len(content) :] if content and not self._calls(place) else ""
        for tokens in (self.chat.ends, [token for token in self.chat.added if token in closing]):
            found_at = [at + len(token) for token in tokens if (at := full.find(token, after, limit)) >= 0]
            if found_at:
                return min(found_at)
        return 0


def check_kept(chat: Chat, messages: list[Message], rendering: Rendering, template: Template) -> None:
    """Raises RowRefused if the rendering of messages lacks anything that they say, other than reasoning."""
    if lost := chat.traits.lost(messages, chat.text(rendering), chat.options(template)):
        raise RowRefused(f"The chat template does not render {lost}", OTHER_TEMPLATE)


def _unlike(chat: Chat, message: Message, shown: str, template: Template) -> RowRefused:
    """Why an answer doesn't continue what a policy is given, whose end is `shown`, and what to set."""
    source = chat.source(chat.options(template))
    switch = next((name for name in SWITCHES if re.search(rf"\b{name}\b", source)), None)
    has_reasoning = bool(message and reasoning_of(message))
    if shown.rstrip().endswith(OPENED) and not has_reasoning:
        hint = f"--chat-template-kwargs '{{\"{switch}\": false}}'" if switch else "give the answer its reasoning"
        return RowRefused("The chat template opens <think> for an answer that has no reasoning", hint)
    if shown.rstrip().endswith(OPENED):
        return RowRefused("The chat template opens <think>, but drops the reasoning of the answer", _elsewhere(message))
    if shown.rstrip().endswith(CLOSED) and has_reasoning:
        hint = f"--chat-template-kwargs '{{\"{switch}\": true}}'" if switch else OTHER_TEMPLATE
        return RowRefused("The chat template closes <think> before an answer that has reasoning", hint)
    return RowRefused(
        f"The chat template renders the conversation differently from its prompt, which ends in {shown!r}",
        OTHER_TEMPLATE,
    )


def _elsewhere(message: Message) -> str:
    """Where else a template may read the reasoning of an answer."""
    in_content = CLOSED in str(message.get("content") or "")
    place = "reasoning_content" if in_content else "the content, as <think>…</think>"
    return f"put the reasoning into {place}, or {OTHER_TEMPLATE}"
