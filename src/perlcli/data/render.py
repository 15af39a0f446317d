"""Turns content into tokens, the only place that does: training, RL and evaluation all read these ids.

A row is always `prompt ids + completion ids`, split where a policy would start to write, so that a reward model is
trained on exactly the tokens that it will score. A completion ends with EOS, followed in a chat by the template's tail
(often a newline). A completion that a policy wrote is used token by token, never decoded and encoded again; if it was
cut off, it has neither EOS nor tail.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from perlcli.data.cache import TokenCache
from perlcli.data.rows import Content, Demonstration, Message, Preference, Prompt, Row, Thumb, completions
from perlcli.errors import PerlError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = list[int]
Columns = dict[str, Any]  # of a row: lists of token ids, and a label or row next to them
ChatKey = tuple[Hashable, ...]
Key = TypeVar("Key", bound=Hashable)
IGNORED = -100  # the label of a token without loss: the default ignore_index of torch's cross-entropy
PARALLEL = "TOKENIZERS_PARALLELISM"
FORESEEN = 1_000_000  # ids that are kept in memory, at about 36 bytes each


class Renderer:
    """Turns prompts and completions into token ids with one tokenizer. `eos_ids` are ids that end a completion in
    addition to the tokenizer's EOS. Raises PerlError if it has none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        if tokenizer.eos_token_id is None:
            raise PerlError(
                f"The tokenizer of {tokenizer.name_or_path} has no EOS token, so a policy could never stop",
                "use a model whose tokenizer has an EOS token",
            )
        self.eos_ids = tuple(dict.fromkeys([tokenizer.eos_token_id, *eos_ids]))
        self.cache: TokenCache | None = None
        self._texts: dict[str, Ids] = {}
        self._chats: dict[ChatKey, Ids] = {}

    @property
    def chat(self) -> bool:
        """Whether conversations can be rendered."""
        return bool(self.tokenizer.chat_template)

    def foresee(self, rows: Sequence[Row]) -> None:
        """Encode all that the rows will need at once, which is several times faster with a fast tokenizer. The ids are
        the same. Only the latest are kept; the others are encoded when they are needed."""
        if not self.tokenizer.is_fast:
            return
        needed = [content for row in rows for content in _needed(row)]
        texts = [content for content, _ in needed if isinstance(content, str)]
        self._keep(self._texts, {text: text for text in texts if text not in self._texts}, special=True)
        if not self._templates_text:
            return
        chats = {_key(chat, is_prompt): (chat, is_prompt) for chat, is_prompt in needed if not isinstance(chat, str)}
        template, rendered = self.tokenizer.apply_chat_template, {}
        for key, (messages, is_prompt) in chats.items():
            if key not in self._chats:
                with suppress(Exception):  # a model's template may raise anything; that is reported when it is needed
                    rendered[key] = str(template(messages, tokenize=False, add_generation_prompt=is_prompt))
        self._keep(self._chats, rendered, special=False)

    def _keep(self, known: dict[Key, Ids], texts: Mapping[Key, str], *, special: bool) -> None:
        """Encode the texts into `known`, and forget the oldest ones beyond `FORESEEN` ids."""
        if texts:
            batch = list(texts.values())

            def encode() -> list[Ids]:
                with _on_all_cores():
                    return list(self.tokenizer(batch, add_special_tokens=special)["input_ids"])

            ids = self.cache.ids(batch, "text" if special else "chat", encode) if self.cache else encode()
            known |= zip(texts, ids, strict=True)
        total = sum(map(len, known.values()))
        for key in list(known):  # the oldest first, but none of these
            if total <= FORESEEN or key in texts:
                break
            total -= len(known.pop(key))

    def forget(self) -> None:
        """Free what `foresee` encoded."""
        self._texts.clear()
        self._chats.clear()

    @cached_property
    def _templates_text(self) -> bool:
        """Whether a conversation is rendered as text and then encoded; some tokenizers override this."""
        from transformers import PreTrainedTokenizerBase

        own = type(self.tokenizer).apply_chat_template
        return self.chat and own is PreTrainedTokenizerBase.apply_chat_template

    def _encode(self, text: str) -> Ids:
        known = self._texts.get(text)
        return list(self.tokenizer(text)["input_ids"]) if known is None else list(known)

    def prompt_ids(self, prompt: Content) -> Ids:
        """The tokens that a policy is given, as TRL's trainers make them. Raises PerlError if a conversation can't be
        rendered."""
        return self._encode(prompt) if isinstance(prompt, str) else self._template(prompt, is_prompt=True)

    def completion_ids(self, prompt: Content, completion: Content, start: Ids | None = None) -> Ids:
        """The tokens after the prompt's (`start`, if known), with EOS and, in a chat, the template's tail."""
        start = self.prompt_ids(prompt) if start is None else start
        if isinstance(prompt, str) or isinstance(completion, str):
            ids = self._encode(str(prompt) + str(completion))
        else:
            ids = self._template([*prompt, *completion])
        if ids[: len(start)] == start:
            return self._ended(ids[len(start) :])
        if isinstance(completion, str):
            return self._ended(self._plain(completion))
        if len(completion) > 1:
            raise PerlError("This chat template can't render a completion of several messages apart from its prompt")
        # The template renders the prompt differently when an answer follows: take the answer's own tokens.
        return [*self._plain(completion[0]["content"]), *self.closing]

    def whole_ids(self, content: Content) -> Ids:
        """The tokens of a text or conversation without a separate prompt, ended like a completion."""
        return self._ended(self._encode(content) if isinstance(content, str) else self._template(content))

    def scored_ids(self, prompt: Content, written: Ids) -> Ids:
        """What a reward model reads: the prompt and exactly the tokens a policy wrote, with the tail if it ended."""
        tail = self.tail if self.ended(written) and not isinstance(prompt, str) else []
        return [*self.prompt_ids(prompt), *written, *tail]

    def text(self, ids: Ids) -> str:
        """The tokens as text, without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def without_start(self, text: str, count: int) -> str | None:
        """The text without its first `count` tokens; None if nothing would be left."""
        if self.tokenizer.is_fast:
            offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            left = text[offsets[count][0] :] if count < len(offsets) else ""
        else:
            left = str(self.tokenizer.decode(self._plain(text)[count:]))
        return left if left.strip() else None

    def ended(self, written: Ids) -> bool:
        """Whether a completion ended with an EOS; otherwise it was cut off."""
        return bool(written) and written[-1] in self.eos_ids

    def assistant_mask(self, messages: list[Message]) -> list[int]:
        """1 for each token of `whole_ids` that the assistant says, else 0. Raises PerlError if the chat template has no
        `{% generation %}` marks."""
        template: Any = self.tokenizer.apply_chat_template
        mask = list(template(messages, return_dict=True, return_assistant_tokens_mask=True)["assistant_masks"])
        if not any(mask):
            problem = "assistant_only_loss needs a chat template with {% generation %} marks, which this one lacks"
            raise PerlError(problem)
        return mask + [1] * (len(self.whole_ids(messages)) - len(mask))

    @cached_property
    def closing(self) -> Ids:
        """The ids with which the chat template ends an answer: an EOS, and what follows it."""
        ids = self._template([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        start = len(ids)
        while start and (ids[start - 1] in self.eos_ids or self._is_space(ids[start - 1])):
            start -= 1
        end = next((index for index in range(start, len(ids)) if ids[index] in self.eos_ids), None)
        return [self.tokenizer.eos_token_id] if end is None else ids[end:]

    @property
    def tail(self) -> Ids:
        """The ids that the chat template puts after the EOS that a policy writes."""
        return self.closing[1:]

    def _template(self, messages: list[Message], *, is_prompt: bool = False) -> Ids:
        known = self._chats.get(_key(messages, is_prompt)) if self._chats else None
        if known is not None:
            return list(known)
        if not self.chat:
            raise PerlError(
                f"{self.tokenizer.name_or_path} has no chat template, but the data contains conversations",
                "use an instruct model, or data with plain text",
            )
        template: Any = self.tokenizer.apply_chat_template
        try:
            rendered = template(messages, tokenize=True, return_dict=True, add_generation_prompt=is_prompt)
            return list(rendered["input_ids"])
        except Exception as error:  # as in `foresee`
            raise PerlError(f"The chat template can't render {messages!r:.200}: {error}") from error

    def _plain(self, text: str) -> Ids:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _is_space(self, token: int) -> bool:
        return not str(self.tokenizer.decode([token])).strip()

    def _ended(self, ids: Ids) -> Ids:
        for token in reversed(ids):
            if token in self.eos_ids:
                return ids
            if not self._is_space(token):
                break  # only white space may follow EOS
        return [*ids, self.tokenizer.eos_token_id]


@contextmanager
def _on_all_cores() -> Iterator[None]:
    """Let the tokenizer use threads; elsewhere they are off, as it warns about them whenever a process forks."""
    before = os.environ.get(PARALLEL)
    os.environ[PARALLEL] = "true"
    try:
        yield
    finally:
        os.environ[PARALLEL] = before or "false"


def _needed(row: Row) -> Iterator[tuple[Content, bool]]:
    """What is encoded for a row: its prompt (True), and its prompt with each completion (False)."""
    prompt = row.prompt
    if prompt is not None:
        yield prompt, True
    for completion in completions(row):
        if prompt is None:
            yield completion, False
        elif isinstance(prompt, str) and isinstance(completion, str):
            yield prompt + completion, False
        elif not isinstance(prompt, str) and not isinstance(completion, str):
            yield [*prompt, *completion], False


def _key(messages: list[Message], is_prompt: bool) -> ChatKey:
    return (is_prompt, *(tuple(message.items()) for message in messages))


def of_demonstration(
    render: Renderer, row: Demonstration, *, completion_only: bool = True, assistant_only: bool = False
) -> Columns:
    """`input_ids` and `labels`, which are `IGNORED` for tokens without loss, by default those of the prompt."""
    if row.prompt is None:
        ids = render.whole_ids(row.completion)
        if not assistant_only or isinstance(row.completion, str):
            return {"input_ids": ids, "labels": ids}
        mask = render.assistant_mask(row.completion)
        return {"input_ids": ids, "labels": [i if m else IGNORED for i, m in zip(ids, mask, strict=True)]}
    start = render.prompt_ids(row.prompt)
    end = render.completion_ids(row.prompt, row.completion, start)
    return {"input_ids": start + end, "labels": ([IGNORED] * len(start) if completion_only else start) + end}


def of_preference(render: Renderer, row: Preference | Thumb) -> Columns:
    """What a reward model reads: `chosen_ids` and `rejected_ids`, or `input_ids` and `label` (1.0 for a thumbs up)."""
    if isinstance(row, Thumb):
        return {"input_ids": _complete(render, row.prompt, row.completion)[0], "label": float(row.label)}
    chosen, rejected = _complete(render, row.prompt, row.chosen, row.rejected)
    return {"chosen_ids": chosen, "rejected_ids": rejected}


def _complete(render: Renderer, prompt: Content | None, *completions: Content) -> list[Ids]:
    if prompt is None:
        return [render.whole_ids(completion) for completion in completions]
    start = render.prompt_ids(prompt)
    return [start + render.completion_ids(prompt, completion, start) for completion in completions]


def of_prompt(render: Renderer, row: Prompt) -> Columns:
    """A prompt's token `ids`, and the `row` itself."""
    return {"row": row, "ids": render.prompt_ids(row.prompt)}
