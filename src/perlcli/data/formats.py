"""Which format the columns of a source are, and each row of it in our own shape."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from perlcli.data.rows import Content, Demonstration, Message, Preference, Prompt, Row, Thumb
from perlcli.errors import PerlError, shorten

Raw = Mapping[str, Any]
SHOWN_FAULTS = 10

# What each use of data accepts, for the error that says which columns are needed.
NEEDS = {
    "sft": "prompt and completion; messages; or text",
    "reward": "chosen and rejected (prompt optional); or prompt, completion and label",
    "rl": "prompt (or any format that holds one: prompt and completion, chosen and rejected, messages)",
}


class BadField(Exception):
    """A field of a row that is not what its format says."""


def detect(columns: Iterable[str], first: Raw) -> str | None:
    """The name of the format that these columns are, or None."""
    found = set(columns)
    if {"chosen", "rejected"} <= found:
        if "prompt" not in found and _is_hh(first["chosen"]):
            return "Anthropic HH pairs"
        return "pairs"
    for name, needed in (
        ("Taskmaster thumbs", {"context", "generation", "reward"}),
        ("thumbs", {"prompt", "completion", "label"}),
        ("prompt and completion", {"prompt", "completion"}),
        ("messages", {"messages"}),
        ("prompts", {"prompt"}),
        ("text", {"text"}),
    ):
        if needed <= found:
            return name
    return None


def convert(raws: list[dict[str, Any]], use: str, source: str, *, chat: bool) -> tuple[str, list[Row | None]]:
    """The format's name and every row in our shape for `use` ("sft", "reward" or "rl"); None where it doesn't serve.

    `chat` says whether conversations can be rendered. Raises PerlError with all faulty rows up to ten, then a count.
    """
    name = detect(raws[0], raws[0])
    if name is None or use not in READERS[name][1]:
        columns = ", ".join(map(str, raws[0])) or "none"
        raise PerlError(f"{source} has the columns {columns}; `perl {use}` needs {NEEDS[use]}")
    reader, adapt = READERS[name][0], USES[use]
    rows: list[Row | None] = []
    faults: list[str] = []
    for number, raw in enumerate(raws, start=1):
        try:
            rows.append(adapt(reader(raw, chat), raw))
        except BadField as fault:
            faults.append(f"{source}, row {number}: {fault}")
    if faults:
        more = f"\n… and {len(faults) - SHOWN_FAULTS:,} more rows" if len(faults) > SHOWN_FAULTS else ""
        raise PerlError("\n".join(faults[:SHOWN_FAULTS]) + more, f"the data was read as {name}")
    return name, rows


def _field(raw: Raw, name: str) -> Any:
    if raw.get(name) is None:
        raise BadField(f"{name} is missing" if name not in raw else f"{name} is null")
    return raw[name]


def _content(raw: Raw, name: str) -> Content:
    value = _field(raw, name)
    return value if isinstance(value, str) else _messages(value, name)


def _messages(value: Any, name: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise BadField(f"{name} must be text or a list of messages, not {shorten(value)}")
    for message in value:
        if not (isinstance(message, Mapping) and isinstance(message.get("role"), str)):
            raise BadField(f"{name} holds {shorten(message)}, which is not a message with role and content")
        if not isinstance(message.get("content"), str):
            raise BadField(f"{name} has a message whose content is not text: {shorten(message.get('content'))}")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _label(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.lower() in ("true", "false", "0", "1"):
        return value.lower() in ("true", "1")
    raise BadField(f"label must be 0, 1, true or false, not {shorten(value)}")


def _same_kind(*contents: Content) -> None:
    if len({isinstance(content, str) for content in contents}) > 1:
        raise BadField("text and messages are mixed in one row")


def _read_pair(raw: Raw, chat: bool) -> Row:
    chosen, rejected = _content(raw, "chosen"), _content(raw, "rejected")
    if raw.get("prompt") is not None:
        prompt = _content(raw, "prompt")
        _same_kind(prompt, chosen, rejected)
        return Preference(prompt, chosen, rejected)
    _same_kind(chosen, rejected)
    if isinstance(chosen, str) or isinstance(rejected, str):
        return Preference(None, chosen, rejected)
    shared = _shared(chosen[:-1], rejected[:-1])
    while shared and chosen[shared - 1]["role"] == "assistant":
        shared -= 1  # a completion begins with the assistant's turn
    return Preference(chosen[:shared] or None, chosen[shared:], rejected[shared:])


def _shared(one: list[Message], other: list[Message]) -> int:
    """How many messages two conversations begin with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


def _read_thumb(raw: Raw, chat: bool) -> Row:
    prompt, completion = _content(raw, "prompt"), _content(raw, "completion")
    _same_kind(prompt, completion)
    return Thumb(prompt, completion, _label(_field(raw, "label")))


def _read_demonstration(raw: Raw, chat: bool) -> Row:
    prompt, completion = _content(raw, "prompt"), _content(raw, "completion")
    _same_kind(prompt, completion)
    return Demonstration(prompt, completion)


def _read_messages(raw: Raw, chat: bool) -> Row:
    return Demonstration(None, _messages(_field(raw, "messages"), "messages"))


def _read_text(raw: Raw, chat: bool) -> Row:
    value = _field(raw, "text")
    if not isinstance(value, str):
        raise BadField(f"text must be text, not {shorten(value)}")
    return Demonstration(None, value)


def _read_prompt(raw: Raw, chat: bool) -> Row:
    return Prompt(_content(raw, "prompt"))


# Anthropic HH (https://huggingface.co/datasets/Anthropic/hh-rlhf): one string a conversation.
HH_TURN = re.compile(r"\n\n(Human|Assistant): ?")


def _is_hh(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("\n\nHuman:") and "\n\nAssistant:" in value


def _hh_turns(raw: Raw, name: str) -> list[Message]:
    value = _field(raw, name)
    if not _is_hh(value):
        raise BadField(f"{name} is not a `\\n\\nHuman: … \\n\\nAssistant: …` text: {shorten(value)}")
    parts = HH_TURN.split(value)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": text.strip()} for who, text in zip(parts[::2], parts[1::2], strict=True)]


def _read_hh(raw: Raw, chat: bool) -> Row:
    """The shared turns are the prompt; what follows the last `Assistant:` is the completion."""
    chosen, rejected = _hh_turns(raw, "chosen"), _hh_turns(raw, "rejected")
    shared = _shared(chosen[:-1], rejected[:-1])
    while shared and chosen[shared - 1]["role"] != "user":
        shared -= 1  # a prompt ends with the person's turn
    if not shared:
        raise BadField("chosen and rejected share no opening turn")
    prompt, answers = chosen[:shared], (chosen[shared:], rejected[shared:])
    if chat:
        return Preference(prompt, *answers)
    return Preference(
        _hh_text(prompt) + "\n\nAssistant:", *(_hh_text(turns)[len("\n\nAssistant:") :] for turns in answers)
    )


def _hh_text(turns: list[Message]) -> str:
    names = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in turns)


def _read_taskmaster(raw: Raw, chat: bool) -> Row:
    """Taskmaster reward rows (https://github.com/google-research-datasets/Taskmaster, TM-3 and TM-4): the dialog so far
    is the prompt, the agent's next action the completion, reward 1.0 a thumbs up."""
    context, action = _json(raw, "context"), _json(raw, "generation")
    if not isinstance(context, list):
        raise BadField(f"context must be a list of turns, not {shorten(context)}")
    lines = [_turn(turn, "context") for turn in context]
    answer = _turn(action, "generation").removeprefix("agent: ")
    prompt = "\n".join([*lines, "agent:"])
    label = _label(_field(raw, "reward"))
    if chat:
        return Thumb([{"role": "user", "content": prompt}], [{"role": "assistant", "content": answer}], label)
    return Thumb(prompt, " " + answer, label)


def _json(raw: Raw, name: str) -> Any:
    value = _field(raw, name)
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise BadField(f"{name} is not valid JSON ({error.msg} at character {error.pos})") from error


def _turn(turn: Any, name: str) -> str:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
        raise BadField(f"{name} holds {shorten(turn)}, which is not a turn with a role")
    said = turn.get("text", turn.get("api", turn.get("response")))
    if said is None:
        raise BadField(f"{name} holds a turn with neither text nor api nor response: {shorten(turn)}")
    return f"{turn['role']}: {said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)}"


ALL = frozenset({"sft", "reward", "rl"})
READERS: dict[str, tuple[Callable[[Raw, bool], Row], frozenset[str]]] = {
    "pairs": (_read_pair, ALL),
    "Anthropic HH pairs": (_read_hh, ALL),
    "Taskmaster thumbs": (_read_taskmaster, ALL),
    "thumbs": (_read_thumb, ALL),
    "prompt and completion": (_read_demonstration, ALL - {"reward"}),
    "messages": (_read_messages, ALL - {"reward"}),
    "text": (_read_text, frozenset({"sft"})),
    "prompts": (_read_prompt, frozenset({"rl"})),
}


def _for_sft(row: Row, raw: Raw) -> Row | None:
    """Demonstrations as they are; of preferences the chosen completion, of thumbs the rows with a thumbs up."""
    if isinstance(row, Preference):
        return Demonstration(row.prompt, row.chosen)
    if isinstance(row, Thumb):
        return Demonstration(row.prompt, row.completion) if row.label else None
    return row if isinstance(row, Demonstration) else None


def _for_reward(row: Row, raw: Raw) -> Row | None:
    if isinstance(row, Preference) and row.chosen == row.rejected:
        return None
    return row


def _for_rl(row: Row, raw: Raw) -> Row | None:
    prompt = row.prompt
    if prompt is None and isinstance(row, Demonstration) and not isinstance(row.completion, str):
        prompt = row.completion[:-1] if row.completion[-1]["role"] == "assistant" else row.completion
    if not prompt:
        raise BadField("there is no prompt to answer")
    extra = {key: value for key, value in raw.items() if key not in ("prompt", "completion", "chosen", "rejected")}
    return Prompt(prompt, extra)


USES: dict[str, Callable[[Row, Raw], Row | None]] = {"sft": _for_sft, "reward": _for_reward, "rl": _for_rl}
SET_ASIDE = {"sft": "thumbs down", "reward": "equal pairs", "rl": "without a prompt"}
