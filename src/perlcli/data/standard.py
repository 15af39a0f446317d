"""Reads rows in TRL's formats, standard and conversational (https://huggingface.co/docs/trl/dataset_formats)."""

from __future__ import annotations

from perlcli.data.fields import content, label, messages, need, same_kind, text
from perlcli.data.rows import Content, Demonstration, Message, Preference, Prompt, Raw, Row, Thumb, Unjudged

UNLABELLED = "without a label"  # the reason in the report


def read_pair(raw: Raw, chat: bool) -> Preference:
    """A preference; if the row has no prompt, the turns that both conversations start with are the prompt."""
    chosen, rejected = content(raw, "chosen"), content(raw, "rejected")
    prompt = content(raw, "prompt") if raw.get("prompt") is not None else None
    if prompt is not None and not _repeats(prompt, chosen, rejected):
        same_kind(prompt, chosen, rejected)
        return Preference(prompt, chosen, rejected)
    same_kind(chosen, rejected)
    if isinstance(chosen, str) or isinstance(rejected, str):
        return Preference(None, chosen, rejected)
    start = shared(chosen[:-1], rejected[:-1])
    while start and chosen[start - 1]["role"] == "assistant":
        start -= 1  # a completion starts with the assistant's turn
    return Preference(chosen[:start] or None, chosen[start:], rejected[start:])


def _repeats(prompt: Content, *conversations: Content) -> bool:
    """Whether both conversations start with the prompt's text, as in HuggingFaceH4/ultrafeedback_binarized."""
    return isinstance(prompt, str) and all(
        not isinstance(turns, str) and any(turn["content"].strip() == prompt.strip() for turn in turns[:2])
        for turns in conversations
    )


def shared(one: list[Message], other: list[Message]) -> int:
    """The number of messages that two conversations start with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


def read_thumb(raw: Raw, chat: bool) -> Thumb | Unjudged:
    """A completion with its label."""
    prompt, completion = content(raw, "prompt"), content(raw, "completion")
    same_kind(prompt, completion)
    return thumb(prompt, completion, label(raw))


def thumb(prompt: Content, completion: Content, up: bool | None) -> Thumb | Unjudged:
    """A completion with its label; if it has none, only the prompt is of use."""
    return Unjudged(prompt, UNLABELLED) if up is None else Thumb(prompt, completion, up)


def read_demonstration(raw: Raw, chat: bool) -> Row:
    """A prompt and the completion to imitate."""
    prompt, completion = content(raw, "prompt"), content(raw, "completion")
    same_kind(prompt, completion)
    return Demonstration(prompt, completion)


def read_messages(raw: Raw, chat: bool) -> Row:
    """A complete conversation."""
    return Demonstration(None, messages(need(raw, "messages", "a list of messages"), "messages"))


def read_text(raw: Raw, chat: bool) -> Row:
    """A complete text."""
    return Demonstration(None, text(raw, "text"))


def read_prompt(raw: Raw, chat: bool) -> Row:
    """A prompt to answer."""
    return Prompt(content(raw, "prompt"))
