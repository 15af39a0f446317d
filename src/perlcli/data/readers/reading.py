"""What the readers share: the options of reading, and prompts and answers as chats or as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from perlcli.data import fields
from perlcli.data.fields import UNLABELLED, BadField
from perlcli.data.readers.labels import Labels
from perlcli.data.readers.messages import content, conversation, turn
from perlcli.data.rows import Content, Message, Raw, Template, Thumb, Unjudged
from perlcli.settings import DataSettings
from perlcli.text import shorten

TIED = "with tied scores"  # the reason in the report


@dataclass(frozen=True, slots=True)
class Reading:
    """How rows are read: as chats or as text (`chat`), and what the options say."""

    chat: bool = True
    best_worst: bool = False  # of a ranking only the best and the worst answer, not all pairs
    score_field: str | None = None
    labels: Labels = field(default_factory=Labels)


def reading(options: DataSettings, *, chat: bool) -> Reading:
    """The options of reading. Raises PerlError for a --label-map that can't be read."""
    return Reading(chat, options.pairs == "best-worst", options.score_field, Labels(options))


def asked(prompt: str, how: Reading) -> Content:
    """A question as the user's turn, or as text."""
    return [{"role": "user", "content": prompt}] if how.chat else prompt


def answered(answer: str, how: Reading) -> Content:
    """An answer; as text it starts with the space that separates it from the prompt, as in TRL's data."""
    return turn(answer) if how.chat else " " + answer.strip()


def reply(answer: Content, how: Reading) -> Content:
    """An answer that is text or messages already."""
    return answered(answer, how) if isinstance(answer, str) else answer


def opened(raw: Raw, prompt: Content, how: Reading) -> Content:
    """The prompt with the row's `system` prompt and `history` before it. Raises BadField if they can't be read."""
    start = _history(raw)
    system = system_of(raw)
    if not start and not system:
        return prompt
    if isinstance(prompt, str) and not how.chat:
        return "\n\n".join([*([system] if system else []), *(str(said["content"]) for said in start), prompt])
    turns = [*start, {"role": "user", "content": prompt}] if isinstance(prompt, str) else [*start, *prompt]
    return with_system(system, turns)


def system_of(raw: Raw) -> str:
    """The system prompt in a column of the row; empty if it has none."""
    return fields.optional_text(raw, "system") or fields.optional_text(raw, "system_prompt")


def with_system(system: str, turns: list[Message]) -> list[Message]:
    """A conversation with a system prompt first. Raises BadField if it starts with another one."""
    if not system.strip():
        return turns
    if turns[0]["role"] != "system":
        return [{"role": "system", "content": system}, *turns]
    if turns[0]["content"] != system:
        raise BadField("the column system and the first message are two different system prompts")
    return turns


def _history(raw: Raw) -> list[Message]:
    """The earlier rounds of a conversation, each a list of question and answer, as LLaMA-Factory writes them; or
    messages."""
    rounds = raw.get("history")
    if isinstance(rounds, str) and rounds.strip():
        rounds = fields.parsed(raw, "history") if rounds.lstrip().startswith("[") else rounds
    if fields.is_null(rounds) or not rounds:
        return []
    if isinstance(rounds, list) and isinstance(rounds[0], Mapping):
        return conversation(rounds, "history")
    turns: list[Message] = []
    for item in rounds if isinstance(rounds, list) else [rounds]:
        if not isinstance(item, list) or len(item) != 2 or not all(isinstance(said, str) for said in item):
            raise BadField(f"history must be a list of [question, answer] pairs, not {shorten(rounds)}")
        turns += [{"role": "user", "content": item[0]}, {"role": "assistant", "content": item[1]}]
    return turns


def thumb(
    prompt: Content, completion: Content, raw: Raw, how: Reading, name: str = "label", template: Template | None = None
) -> Thumb | Unjudged:
    """A completion with the row's label; if it has none, only the prompt is of use."""
    up = how.labels.read(raw.get(name), name)
    more = template or {}
    return Unjudged(prompt, UNLABELLED, more) if up is None else Thumb(prompt, completion, up, more)


def optional_content(raw: Raw, name: str) -> Content | None:
    """The value of a field that is text or a conversation; None if it is null or missing."""
    return None if fields.is_null(raw.get(name)) else content(raw, name)
