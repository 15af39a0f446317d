"""The one way from content to tokens: training, RL and evaluation all read what this module writes.

A row is always `prompt ids + completion ids`, cut where a policy would begin to write, so that a reward model is
trained on exactly the tokens that it will score. A completion ends with EOS, and a chat's with the template's tail
behind it (often one newline). A completion that a policy wrote is taken token by token, never decoded and encoded
again; one that was cut off has neither EOS nor tail.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any

from perlcli.data.cache import TokenCache
from perlcli.data.rows import Content, Message, Row, completions
from perlcli.errors import PerlError

Ids = list[int]
PARALLEL = "TOKENIZERS_PARALLELISM"
FORESEEN = 1_000_000  # ids that are kept, at some 36 bytes each


class Renderer:
    """Turns prompts and completions into token ids with one tokenizer; `eos_ids` are all ids that end a completion."""

    def __init__(self, tokenizer: Any, eos_ids: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        if tokenizer.eos_token_id is None:
            raise PerlError(f"The tokenizer of {tokenizer.name_or_path} has no EOS token", "a policy could never end")
        self.eos_ids = tuple(dict.fromkeys([tokenizer.eos_token_id, *eos_ids]))
        self.cache: TokenCache | None = None
        self._texts: dict[str, Ids] = {}
        self._chats: dict[tuple[Any, ...], Ids] = {}

    @property
    def chat(self) -> bool:
        """Whether conversations can be rendered."""
        return bool(self.tokenizer.chat_template)

    def foresee(self, rows: Sequence[Row]) -> None:
        """Encode what rows will need all at once, which a fast tokenizer does several times faster, with the same ids.

        The latest are kept; what isn't among them is encoded when it is asked for.
        """
        if not self.tokenizer.is_fast:
            return
        needed = [content for row in rows for content in _needed(row)]
        texts = {content: content for content, _ in needed if isinstance(content, str)}
        self._keep(self._texts, {key: text for key, text in texts.items() if key not in self._texts}, special=True)
        rendered: dict[tuple[Any, ...], str] = {}
        for is_prompt in (True, False) if self._templates_text else ():
            chats = {_key(c, last): c for c, last in needed if last == is_prompt and not isinstance(c, str)}
            rendered |= self._rendered({key: c for key, c in chats.items() if key not in self._chats}, is_prompt)
        self._keep(self._chats, rendered, special=False)

    def _rendered(self, chats: dict[Any, list[Message]], is_prompt: bool) -> dict[Any, str]:
        """The conversations as text; without those that can't be rendered, which is told when they are asked for."""
        how = {"tokenize": False, "add_generation_prompt": is_prompt}
        with suppress(Exception):  # of the template, which raises what it likes
            return dict(zip(chats, self.tokenizer.apply_chat_template(list(chats.values()), **how), strict=True))
        found = {}
        for key, messages in chats.items():
            with suppress(Exception):
                found[key] = self.tokenizer.apply_chat_template(messages, **how)
        return found

    def _keep(self, known: dict[Any, Ids], texts: dict[Any, str], *, special: bool) -> None:
        if texts:
            whole = list(texts.values())

            def encode() -> list[Ids]:
                with _on_all_cores():
                    return list(self.tokenizer(whole, add_special_tokens=special)["input_ids"])

            ids = self.cache.ids(whole, "text" if special else "chat", encode) if self.cache else encode()
            known |= zip(texts, ids, strict=True)
        total = sum(map(len, known.values()))
        for key in list(known):  # the oldest first, and none of these
            if total <= FORESEEN or key in texts:
                break
            total -= len(known.pop(key))

    def forget(self) -> None:
        """Let go of what was foreseen."""
        self._texts.clear()
        self._chats.clear()

    @cached_property
    def _templates_text(self) -> bool:
        """Whether a conversation becomes text first, and then ids: some tokenizers have a way of their own."""
        from transformers import PreTrainedTokenizerBase

        ours = type(self.tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template
        return self.chat and ours

    def _encode(self, text: str) -> Ids:
        known = self._texts.get(text)
        return list(self.tokenizer(text)["input_ids"]) if known is None else list(known)

    def prompt_ids(self, prompt: Content) -> Ids:
        """The tokens that a policy is given, as TRL's trainers make them."""
        if isinstance(prompt, str):
            return self._encode(prompt)
        return self._template(prompt, is_prompt=True)

    def completion_ids(self, prompt: Content, completion: Content, start: Ids | None = None) -> Ids:
        """The tokens after the prompt's (`start`, if known), with EOS and, in a chat, the tail of the template."""
        start = self.prompt_ids(prompt) if start is None else start
        if isinstance(prompt, str) or isinstance(completion, str):
            return self._text_completion(str(prompt), str(completion), start)
        whole = self._template([*prompt, *completion])
        if whole[: len(start)] == start:
            return self._ended(whole[len(start) :])
        return self._retokenised(completion)

    def whole_ids(self, content: Content) -> Ids:
        """The tokens of a text or conversation that has no prompt of its own, ended like a completion."""
        if isinstance(content, str):
            return self._ended(self._encode(content))
        return self._ended(self._template(content))

    def scored_ids(self, prompt: Content, written: Ids) -> Ids:
        """What a reward model reads: the prompt and the very tokens a policy wrote, with the tail where it ended."""
        tail = self.tail if self.ended(written) and not isinstance(prompt, str) else []
        return [*self.prompt_ids(prompt), *written, *tail]

    def text(self, ids: Ids) -> str:
        """What tokens say, without special ones."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def without_start(self, text: str, count: int) -> str | None:
        """The text without its first `count` tokens; None where nothing would be left."""
        if self.tokenizer.is_fast:
            found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            left = text[found[count][0] :] if count < len(found) else ""
        else:
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            left = self.tokenizer.decode(ids[count:])
        return left if left.strip() else None

    def ended(self, written: Ids) -> bool:
        """Whether a completion ended by itself; otherwise it was cut off."""
        return bool(written) and written[-1] in self.eos_ids

    def assistant_mask(self, messages: list[Message]) -> list[int]:
        """1 for each token of `whole_ids` that the assistant says; needs a template with generation marks."""
        rendered = self.tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        mask = list(rendered["assistant_masks"])
        if not any(mask):
            raise PerlError(
                "assistant_only_loss needs a chat template with {% generation %} marks, which this one lacks"
            )
        return mask + [1] * (len(self.whole_ids(messages)) - len(mask))

    @cached_property
    def closing(self) -> Ids:
        """What the chat template ends an answer with: an EOS, and what follows it."""
        ids = self._template([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        start = len(ids)
        while start and (ids[start - 1] in self.eos_ids or not self.tokenizer.decode([ids[start - 1]]).strip()):
            start -= 1
        end = next((index for index in range(start, len(ids)) if ids[index] in self.eos_ids), None)
        return [self.tokenizer.eos_token_id] if end is None else ids[end:]

    @property
    def tail(self) -> Ids:
        """What the chat template puts behind the EOS that a policy writes."""
        return self.closing[1:]

    def _template(self, messages: list[Message], *, is_prompt: bool = False) -> Ids:
        known = self._chats.get(_key(messages, is_prompt)) if self._chats else None
        if known is not None:
            return list(known)
        if not self.chat:
            raise PerlError(
                f"{self.tokenizer.name_or_path} has no chat template, and the data holds conversations",
                "use an instruct model, or data with plain text in its columns",
            )
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, add_generation_prompt=is_prompt
            )
        except Exception as error:  # a template is a program of its model's authors and raises what it likes
            raise PerlError(f"The chat template can't render {messages!r:.200}: {error}") from error
        return list(rendered["input_ids"])

    def _text_completion(self, prompt: str, completion: str, start: Ids) -> Ids:
        whole = self._encode(prompt + completion)
        if whole[: len(start)] == start:
            return self._ended(whole[len(start) :])
        return self._ended(list(self.tokenizer(completion, add_special_tokens=False)["input_ids"]))

    def _retokenised(self, completion: list[Message]) -> Ids:
        """The answer's own tokens where the template renders the prompt otherwise once an answer follows."""
        if len(completion) > 1:
            raise PerlError("This chat template can't render a completion of several messages apart from its prompt")
        return [*self.tokenizer(completion[0]["content"], add_special_tokens=False)["input_ids"], *self.closing]

    def _ended(self, ids: Ids) -> Ids:
        for token in reversed(ids):
            if token in self.eos_ids:
                return ids
            if self.tokenizer.decode([token]).strip():
                break  # only white space may stand behind EOS
        return [*ids, self.tokenizer.eos_token_id]


@contextmanager
def _on_all_cores() -> Iterator[None]:
    """Let the tokenizer use its threads, which are off elsewhere: it warns of them wherever a process forks."""
    before = os.environ.get(PARALLEL)
    os.environ[PARALLEL] = "true"
    try:
        yield
    finally:
        os.environ[PARALLEL] = before or "false"


def _needed(row: Row) -> Iterator[tuple[Content, bool]]:
    """What is encoded for a row: its prompt (True), and each of its completions behind it."""
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


def _key(messages: list[Message], is_prompt: bool) -> tuple[Any, ...]:
    """What a conversation is known by, and whether it is a prompt."""
    return (is_prompt, *(tuple(message.items()) for message in messages))
