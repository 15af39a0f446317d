"""Turns content into tokens, the only place that does: training, RL and evaluation all read these ids.

A row is always `prompt ids + completion ids`, split where a policy would start to write, so that a reward model is
trained on exactly the tokens that it will score. A completion ends with EOS, followed in a chat by the template's tail
(often a newline). A completion that a policy wrote is used token by token, never decoded and encoded again; if it was
cut off, it has neither EOS nor tail, and if it ended with another EOS than the template's, it gets the template's.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any

from perlcli.data.chat import Chat, RowRefused, Style
from perlcli.data.dialogs import Dialog, LossOn, check_kept, dialog, joined, merged
from perlcli.data.encoding import Encoder
from perlcli.data.rows import Content, Demonstration, Message, Preference, Prompt, Row, Template, Thumb, completions
from perlcli.data.traits import CLOSED, OPENED
from perlcli.errors import PerlError
from perlcli.text import shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from perlcli.data.cache import TokenCache

Ids = list[int]
Columns = dict[str, Any]  # of a row: lists of token ids, and a label or row next to them
IGNORED = -100  # the label of a token without loss: the default ignore_index of torch's cross-entropy
NONE: Template = {}
SPLIT = "the answer's first characters are encoded apart from the prompt, as a policy would write them"
BLANK = "the white space before an answer is part of a token of the template, and is not learned"
AS_CHAT = "rendered as chats: prompt = user turn, completion = assistant turn (--no-chat joins the text)"
AS_TEXT = "rendered as text: prompt and completion joined (--chat makes them turns of a chat)"
NOT_ITS_TOKENIZER = "use the model with the tokenizer that it was trained with"
NO_TEMPLATE = "rendered as text: prompt and completion joined, as the model has no chat template"
BY_TEMPLATE = "rendered by the model's chat template"


class Renderer:
    """Turns prompts and completions into token ids with one tokenizer, in the given `style`. `eos_ids` are ids that end
    a completion in addition to the tokenizer's EOS, `embedded` is the number of tokens that the model has embeddings
    for. Raises PerlError if the tokenizer has no EOS, or the model no embedding for it."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        eos_ids: Sequence[int] = (),
        style: Style | None = None,
        *,
        embedded: int | None = None,
    ) -> None:
        self.tokenizer, self.style, self.embedded = tokenizer, style or Style(), embedded
        if tokenizer.eos_token_id is None:
            raise PerlError(
                f"The tokenizer of {tokenizer.name_or_path} has no EOS token, with which a completion ends",
                "use a model whose tokenizer has an EOS token; only a --reward needs none",
            )
        self.eos_ids = tuple(dict.fromkeys([tokenizer.eos_token_id, *eos_ids]))
        if fault := self.unembedded([tokenizer.eos_token_id]):
            raise PerlError(f"{fault} and is the EOS token of {tokenizer.name_or_path}", NOT_ITS_TOKENIZER)
        self.template = Chat(tokenizer, self.eos_ids, self.style)
        self.encoder = Encoder(tokenizer)
        self.findings: list[str] = []  # of the latest row, for the load report
        self._foreseen: dict[tuple[int, LossOn | None], tuple[Row, list[Dialog]]] = {}

    def unembedded(self, ids: Sequence[int]) -> str:
        """What is wrong with the first token that the model has no embedding for; empty if it has one for each."""
        beyond = max(ids, default=0)
        if self.embedded is None or beyond < self.embedded:
            return ""
        token = shorten(self.tokenizer.convert_ids_to_tokens(beyond))
        return (
            f"The model has embeddings for {self.embedded:,} tokens only, and none for {token}, which has id {beyond:,}"
        )

    @property
    def cache(self) -> TokenCache | None:
        """The cache of tokens between runs."""
        return self.encoder.cache

    @cache.setter
    def cache(self, cache: TokenCache | None) -> None:
        self.encoder.cache = cache

    @property
    def chat(self) -> bool:
        """Whether conversations can be rendered."""
        return bool(self.tokenizer.chat_template)

    @property
    def makes_turns(self) -> bool:
        """Whether the prompt and the completion of a text row become turns of a chat."""
        return self.chat and self.style.chat

    def how(self, row: Row) -> str:
        """How a row is rendered, for the load report; empty if there is no choice."""
        if not isinstance(row.prompt, str):
            is_text = row.prompt is None and all(isinstance(part, str) for part in completions(row))
            return "" if is_text else BY_TEMPLATE
        if not self.chat:
            return NO_TEMPLATE
        return AS_CHAT if self.style.chat else AS_TEXT

    # Ahead of time

    def foresee(self, rows: Sequence[Row], learn: LossOn | None = None) -> None:
        """Encode all that the rows will need at once, which is several times faster with a fast tokenizer. The ids are
        the same. Only the latest are kept; the others are encoded when they are needed."""
        if not self.tokenizer.is_fast:
            return
        self._foreseen.clear()
        for row in rows:
            with suppress(PerlError):  # it is raised again when the row is needed
                self._foreseen[id(row), learn] = row, self._dialogs(row, learn)
        texts: dict[str, None] = {}
        starts: dict[str, None] = {}
        chats: dict[str, None] = {}
        for row, found in self._foreseen.values():
            is_chat = self._is_chat(row)
            for each in found:
                for text, known in ((each.start, starts), (each.full, chats)):
                    if isinstance(text, str) and text:
                        (known if is_chat else texts)[text] = None
        self.encoder.foresee(list(texts), special=True)
        self.encoder.foresee(list(chats), special=False, with_places=learn is not None)
        self.encoder.foresee(list(starts), special=False)

    def forget(self) -> None:
        """Free what `foresee` encoded."""
        self._foreseen.clear()
        self.encoder.forget()

    # Rows

    def _is_chat(self, row: Row) -> bool:
        """Whether a row is rendered by the chat template."""
        parts = [part for part in (row.prompt, *completions(row)) if part is not None]
        if all(isinstance(part, str) for part in parts):
            return row.prompt is not None and self.makes_turns
        if not self.chat:
            raise PerlError(
                f"{self.tokenizer.name_or_path} has no chat template, but the data contains conversations",
                "use an instruct model, or data with plain text",
            )
        return True

    def _dialogs(self, row: Row, learn: LossOn | None) -> list[Dialog]:
        """A row with each of its completions, or its prompt. Raises PerlError if it can't be rendered."""
        known = self._foreseen.get((id(row), learn))
        if known is not None and known[0] is row:
            return known[1]
        if isinstance(row.prompt, str) and self.chat and self.style.undecided:
            raise PerlError(self.style.undecided, "--chat or --no-chat, as it was trained")
        if not self._is_chat(row):
            prompt = str(row.prompt or "")
            return [Dialog(prompt, prompt + str(part)) for part in completions(row)] or [Dialog(prompt, prompt)]
        asked = None if row.prompt is None else self._turns(row.prompt, "user")
        answers = [self._turns(part, "assistant") for part in completions(row)]
        if asked is not None and not answers:
            given = self.template.prompt(asked, row.template)
            check_kept(self.template, asked, given, row.template)
            return [Dialog(given, given)]
        return [dialog(self.template, asked, answer, row.template, learn) for answer in answers]

    def _turns(self, content: Content, role: str) -> list[Message]:
        """The messages of a text or conversation, without the end that an answer's text has already. Raises RowRefused
        for a message that holds the template's own tokens."""
        is_text = isinstance(content, str)
        messages = [{"role": role, "content": content}] if isinstance(content, str) else content
        return [self._bare(message, is_text=is_text) for message in messages]

    def _bare(self, message: Message, *, is_text: bool) -> Message:
        content, is_answer = message.get("content"), message["role"] == "assistant"
        if not isinstance(content, str):
            return message
        bare = content
        while is_answer and (end := next((end for end in self.template.ends if bare.rstrip().endswith(end)), None)):
            bare = bare.rstrip().removesuffix(end)
        found = [token for token in (*self.template.role_tokens, *self.template.ends) if token in bare]
        if found:
            who = "answer" if is_answer else "prompt" if is_text else f"{message['role']} message"
            problem = f"The {who} has the chat template's own tokens, such as {found[0]}, so it is rendered already"
            raise RowRefused(problem, "--no-chat uses it as it is" if is_text else "take them out of the message")
        return message if bare == content else {**message, "content": bare}

    def _split(self, row: Row, each: Dialog) -> tuple[Ids, Ids, int]:
        """The ids of the prompt and of what follows it, and at which character of `full` the latter are encoded anew;
        0 if they are part of the encoding of all. Raises RowRefused if the tokens merge where they should not."""
        is_chat = self._is_chat(row)
        encode = self.encoder.chat if is_chat else self.encoder.text
        start = encode(each.start) if row.prompt is not None else []
        full = encode(each.full)
        if full[: len(start)] == start:
            return start, full[len(start) :], 0
        rest = each.full[len(each.start) :]
        assert isinstance(rest, str)
        if is_chat:
            if not each.lead or not rest.startswith(each.lead):
                raise merged(self.template, each, row.template)
            self.findings.append(SPLIT)
        return start, self.encoder.chat(rest), len(each.start)

    def rendered(self, row: Row) -> list[tuple[Ids, Ids]]:
        """The ids of a row's prompt and of what follows it, for each completion. Raises PerlError if it can't be
        rendered."""
        parts = []
        self.findings = []
        for each in self._dialogs(row, None):
            start, rest, _ = self._split(row, each)
            self.findings += [each.finding] if each.finding else []
            parts.append((start, self._ended(rest)))
        return parts

    def learned(self, row: Demonstration, loss_on: LossOn) -> tuple[Ids, list[bool]]:
        """A demonstration's ids, and for each whether it is learned. Raises PerlError if it can't be rendered."""
        self.findings = []
        (each,) = self._dialogs(row, loss_on)
        start, rest, anew = self._split(row, each)
        self.findings += [each.finding] if each.finding else []
        ids = start + self._ended(rest)
        if not self._is_chat(row):
            return ids, [loss_on == "all"] * len(start) + [True] * (len(ids) - len(start))
        learned = [loss_on == "all"] * len(ids)
        places = self.encoder.places(each.full[anew:]) if each.turns or each.mute else []
        shift = len(start) if anew else 0
        for spans, value in ((each.turns, True), (each.mute, False)):
            for begin, end in spans:
                first, last = (bisect_left(places, at - anew) + shift for at in (begin, end))
                if not anew and places[first : first + 1] != [begin]:
                    self._check_begin(each, places, begin)
                last = len(ids) if end == len(each.full) else last  # with the EOS that the template may lack
                learned[first:last] = [value] * (last - first)
        return ids, learned

    def _check_begin(self, each: Dialog, places: list[int], begin: int) -> None:
        """Raises RowRefused if an answer begins within a token, unless only its leading white space belongs to it."""
        place = bisect_left(places, begin)
        part = self.template.text(each.full)[begin : places[place] if place < len(places) else None]
        if part.strip():
            raise merged(self.template, Dialog(each.full[:begin], each.full), NONE)
        self.findings.append(BLANK)

    # Parts of rows

    def prompt_ids(self, prompt: Content, template: Template = NONE) -> Ids:
        """The tokens that a policy is given. Raises PerlError if a conversation can't be rendered."""
        return self.rendered(Prompt(prompt, template=template))[0][0]

    def completion_ids(self, prompt: Content, completion: Content, template: Template = NONE) -> Ids:
        """The tokens after the prompt's, with EOS and, in a chat, the template's tail. Raises PerlError if they can't
        be rendered."""
        return self.rendered(Demonstration(prompt, completion, template))[0][1]

    def whole_ids(self, content: Content, template: Template = NONE) -> Ids:
        """The tokens of a text or conversation without a separate prompt, ended like a completion."""
        return self.rendered(Demonstration(None, content, template))[0][1]

    def scored_ids(self, prompt: Content, written: Ids, template: Template = NONE) -> Ids:
        """What a reward model reads: the prompt and exactly the tokens a policy wrote. If it ended, it has the end that
        the reward model was trained on: the template's, or in a text the tokenizer's EOS."""
        start = self.prompt_ids(prompt, template)
        if not self.ended(written):
            return start + written
        if self._is_chat(Prompt(prompt)):
            return [*start, *written[:-1], *self._closings.get(written[-1], self.closing)]
        return [*start, *written[:-1], self.tokenizer.eos_token_id]

    def read_ids(self, prompt: Content, text: str, template: Template = NONE, *, ended: bool = True) -> Ids:
        """What a reward model of another tokenizer reads for a decoded completion: its own template's rendering of the
        conversation, without its end if the completion was cut off. Raises PerlError if it can't be rendered."""
        if not self._is_chat(Prompt(prompt)):
            ids = self.encoder.text(str(prompt) + text)
        else:
            asked, answer = self._turns(prompt, "user"), [{"role": "assistant", "content": text}]
            ids = self.encoder.chat(self.template.conversation(joined(asked, answer)[0], template))
        ids = self._ended(ids)
        if ended:
            return ids
        last = max(place for place, token in enumerate(ids) if token in self.eos_ids)
        closing = self.closing if ids[-len(self.closing) :] == self.closing else ids[last:]
        return ids[: len(ids) - len(closing)]

    def opened(self, prompt: Ids) -> str:
        """The part of an answer that its prompt has already: `<think>`, if the chat template opens it."""
        text = str(self.tokenizer.decode(prompt[-8:])).rstrip()
        return f"{OPENED}\n" if text.endswith(OPENED) and not text.endswith(CLOSED) else ""

    def text(self, ids: Ids) -> str:
        """The tokens as text, without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def without_start(self, text: str, count: int) -> str | None:
        """The text without its first `count` tokens; None if nothing would be left."""
        if self.tokenizer.is_fast:
            offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            left = text[offsets[count][0] :] if count < len(offsets) else ""
        else:
            left = str(self.tokenizer.decode(self.encoder.chat(text)[count:]))
        return left if left.strip() else None

    def ended(self, written: Ids) -> bool:
        """Whether a completion ended with an EOS; otherwise it was cut off."""
        return bool(written) and written[-1] in self.eos_ids

    @cached_property
    def closing(self) -> Ids:
        """The ids with which the chat template ends an answer: an EOS, and what follows it."""
        return self._closing([{"role": "assistant", "content": "b"}])

    @cached_property
    def _closings(self) -> dict[int, Ids]:
        """The ends of an answer and of one that calls a tool, by their EOS."""
        ends = [self.closing]
        if self.template.traits.calls:
            call = {"type": "function", "function": {"name": "b", "arguments": {"c": "d"}}}
            ends.append(self._closing([{"role": "assistant", "content": None, "tool_calls": [call]}]))
        return {end[0]: end for end in reversed(ends)}

    def _closing(self, answer: list[Message]) -> Ids:
        try:
            asked: list[Message] = [{"role": "user", "content": "a"}]
            ids = self.encoder.chat(self.template.conversation([*asked, *answer], {}))
        except RowRefused:
            return [self.tokenizer.eos_token_id]
        start = len(ids)
        while start and (ids[start - 1] in self.eos_ids or self._is_space(ids[start - 1])):
            start -= 1
        end = next((index for index in range(start, len(ids)) if ids[index] in self.eos_ids), None)
        return [self.tokenizer.eos_token_id] if end is None else ids[end:]

    @property
    def tail(self) -> Ids:
        """The ids that the chat template puts after the EOS that a policy writes."""
        return self.closing[1:]

    def _is_space(self, token: int) -> bool:
        return not str(self.tokenizer.decode([token])).strip()

    def _ended(self, ids: Ids) -> Ids:
        for token in reversed(ids):
            if token in self.eos_ids:
                return ids
            if not self._is_space(token):
                break  # only white space may follow EOS
        return [*ids, self.tokenizer.eos_token_id]


def of_demonstration(render: Renderer, row: Demonstration, *, loss_on: LossOn = "assistant") -> Columns:
    """`input_ids` and `labels`, which are `IGNORED` for tokens without loss: by default all but those of the
    assistant's turns after the prompt, each with the token that ends it."""
    ids, learned = render.learned(row, loss_on)
    return {"input_ids": ids, "labels": [token if kept else IGNORED for token, kept in zip(ids, learned, strict=True)]}


def of_preference(render: Renderer, row: Preference | Thumb) -> Columns:
    """What a reward model reads: `chosen_ids` and `rejected_ids`, or `input_ids` and `label` (1.0 for a thumbs up)."""
    read = [start + rest for start, rest in render.rendered(row)]
    if isinstance(row, Thumb):
        return {"input_ids": read[0], "label": float(row.label)}
    return {"chosen_ids": read[0], "rejected_ids": read[1]}


def of_prompt(render: Renderer, row: Prompt) -> Columns:
    """A prompt's token `ids`, and the `row` itself."""
    return {"row": row, "ids": render.rendered(row)[0][0]}
