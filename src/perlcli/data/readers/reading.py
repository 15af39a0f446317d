"""What the readers share: the options of reading, and prompts and answers as chats or as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from perlcli.data import fields
from perlcli.data.fields import UNLABELLED, BadField
from perlcli.data.readers.hh import hh_turns, is_hh
from perlcli.data.readers.labels import Labels
from perlcli.data.readers.messages import content, conversation, turn
from perlcli.data.rows import Content, Message, Raw, Template, Thumb, Unjudged
from perlcli.settings import DataSettings
from perlcli.text import shorten

# Reasons in the report.
TIED = "with tied scores"
ALONE = "without another answer to compare"


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


LONG, LONG_QUESTION = 10, 4  # characters from which on a prompt that both answers start with is no coincidence


def question(given: Content, how: Reading) -> Content:
    """A prompt as it is; for a chat, a dialog in the text form of Anthropic HH as its turns."""
    turns = chatted(given, how)
    if turns is given or isinstance(turns, str) or turns[-1]["content"]:
        return turns
    return turns[:-1]  # `Assistant:` is where the answer begins


def chatted(given: Content, how: Reading) -> Content:
    """A content as it is; for a chat, a dialog in the text form of Anthropic HH as its turns."""
    return hh_turns(given) if how.chat and isinstance(given, str) and is_hh(given) else given


def answer_of(raw: Raw, name: str) -> Content:
    """The answer in a field, empty if the field is: tables have no other way to write an empty answer."""
    return "" if name in raw and fields.is_null(raw[name]) else content(raw, name)


def continued(prompt: Content, *answers: Content) -> tuple[Content, ...]:
    """A prompt and its answers, all text or all messages: text with messages is the user's turn in a prompt, the
    assistant's in an answer. Answers that start with the prompt lose it; a system prompt that only they have becomes
    part of the prompt. Raises BadField if only some of them start with it."""
    if all(isinstance(item, str) for item in (prompt, *answers)):
        return (prompt, *_without_text(str(prompt), [str(answer) for answer in answers]))
    given: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    chats = [turn(answer) if isinstance(answer, str) else answer for answer in answers]
    starts = [_repeated(given, chat) for chat in chats]
    if not any(starts):
        return (given, *chats)
    opening = chats[0][: starts[0]]
    if any(chat[:start] != opening for chat, start in zip(chats, starts, strict=True)):
        raise BadField("the answers do not start with the same turns of the prompt")
    return (max(given, opening, key=len), *(chat[start:] for chat, start in zip(chats, starts, strict=True)))


def _repeated(prompt: list[Message], chat: list[Message]) -> int:
    """The number of turns that an answer repeats of its prompt: all up to the user's last one, or only its end."""
    if chat[0]["role"] in ("assistant", "tool"):
        return 0  # a later turn of the user may repeat the prompt
    for end in range(1, len(chat)):
        same = min(end, len(prompt))
        said = [(message["role"], str(message["content"] or "").strip()) for message in prompt[-same:]]
        again = [(message["role"], str(message["content"] or "").strip()) for message in chat[end - same : end]]
        if said == again and any(role == "user" for role, _ in said):
            return end
    return 0


def _without_text(prompt: str, answers: list[str]) -> list[str]:
    """Answers without the prompt, if it is long and all of several start with it."""
    start = prompt.strip()
    rests = [answer.lstrip()[len(start) :] for answer in answers if answer.lstrip().startswith(start)]
    least = LONG_QUESTION if start.endswith(("?", ":")) else LONG
    is_cut = len(answers) > 1 and len(start) >= least and len(rests) == len(answers)
    # An answer may also begin with the words of the question; a prompt that is repeated ends at its last word.
    return rests if is_cut and all(rest.strip() and not (start[-1] + rest[0]).isalnum() for rest in rests) else answers


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


def prompt_of(raw: Raw, *answers: Content) -> Content | None:
    """The prompt in its field; None if it is null or missing, or empty next to answers that are complete
    conversations."""
    value = raw.get("prompt")
    openers = ("system", "developer", "user")
    is_said = all(not isinstance(answer, str) and answer[0]["role"] in openers for answer in answers)
    if fields.is_null(value) or (is_said and (value == [] or (isinstance(value, str) and not value.strip()))):
        return None
    return content(raw, "prompt")
