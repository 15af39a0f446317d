"""Reads conversations: messages with `role` and `content`, or ShareGPT's turns with `from` and `value`, as chat
templates expect them."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from perlcli.data import fields
from perlcli.data.fields import BadField
from perlcli.data.files import fault_of
from perlcli.data.rows import Content, Message, Raw, Template
from perlcli.text import shorten

CONTENT = "text or a list of messages"
# The names of the roles in datasets, in any case.
SPEAKERS = {
    "user": ("human", "user", "prompter"),
    "assistant": ("gpt", "chatgpt", "assistant", "model", "ai", "bot", "bing", "bard", "function_call", "tool_call"),
    "system": ("system",),
    "developer": ("developer",),
    "tool": ("tool", "observation", "function", "function_response", "tool_response", "ipython"),
}
ROLES = {speaker: role for role, speakers in SPEAKERS.items() for speaker in speakers}
CALLERS = ("function_call", "tool_call")  # turns that are a tool call as JSON, as LLaMA-Factory writes them
# What chat templates read of a message, besides role and content.
READ = (
    "tool_calls",
    "tool_call_id",
    "name",
    "reasoning_content",
    "reasoning",
    "thinking",
    "tool_responses",
    "recipient",
)
# OpenAI's weight and axolotl's train say which turns are learned; function_call is OpenAI's older tool_calls.
OWN = ("role", "content", "from", "value", "weight", "train", "function_call")
TEXTS = ("text", "input_text", "output_text")  # the types of parts that are text, also of OpenAI's Responses API
THOUGHTS = {"thinking": "thinking", "reasoning": "text"}  # of parts that are reasoning, and which key has it
IMAGES = ("image", "video", "audio", "input_image", "input_audio", "file")  # how the types of other parts start


# How messages look as text: an object or a list of them, with a known role.
AS_TEXT = re.compile(r"""\[?\s*\{\s*["']\w+["']\s*:""")
WITH_ROLE = re.compile(rf"""["'](role|from)["']\s*:\s*["']({"|".join(ROLES)})["']""", re.IGNORECASE)
SURELY = re.compile(r"""\[?\s*\{\s*["'](role|from|content|value)["']\s*:""")


def content(raw: Raw, name: str) -> Content:
    """The value of a field that is text, a message or a conversation; also messages as JSON or Python text, as tables
    have them. Raises BadField, as all functions here do."""
    value = decoded(fields.need(raw, name, CONTENT), name)
    return value if isinstance(value, str) else conversation(value, name)


def decoded(value: object, name: str) -> object:
    """Messages that are written as JSON, or as pandas writes Python's lists to CSV; any other value as it is. Raises
    BadField for text that looks like messages but is neither."""
    if not isinstance(value, str) or not AS_TEXT.match(value.lstrip()) or not WITH_ROLE.search(value):
        return value
    found = _literal(value.strip())
    if found is None and SURELY.match(value.lstrip()) and value.rstrip().endswith(("]", "}")):
        raise BadField(f"{name} looks like messages, but is neither JSON nor a Python list: {shorten(value)}")
    items = found if isinstance(found, list) else [found]
    return found if items and all(isinstance(item, Mapping) and _is_message(item) for item in items) else value


def _is_message(item: Raw) -> bool:
    speaker, keys = item.get("role", item.get("from")), {"content", "value", "tool_calls", "function_call"}
    return isinstance(speaker, str) and bool(keys & set(item))


def _literal(text: str) -> object:
    """A list or an object written as JSON or Python; None for anything else."""
    try:
        found = json.loads(text)
        if fault_of(found, text):
            return None
    except (ValueError, RecursionError):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)  # strings with a backslash
                found = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    return found if isinstance(found, list | dict) else None


def conversation(value: object, name: str) -> list[Message]:
    """A conversation: a list of messages or turns, or a single one; also as JSON text, as tables have it."""
    value = decoded(value, name)
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = fields.parsed({name: value}, name)
    if isinstance(value, Mapping) and ("role" in value or "from" in value):
        value = [value]
    if not isinstance(value, list) or not value:
        raise BadField(f"{name} must be {CONTENT}, not {shorten(value)}")
    return [_message(item, name) for round in value for item in _turns(round)]


def _turns(item: object) -> list[object]:
    """A message; or the two of a round with `input` and `output`, as Capybara has them, some with a `system` prompt."""
    if not isinstance(item, Mapping) or {"role", "from"} & set(item) or not {"input", "output"} <= set(item):
        return [item]
    parts = {"system": item.get("system"), "user": item["input"], "assistant": item["output"]}
    if set(item) - {"system", "input", "output"}:
        return [item]
    return [{"role": role, "content": said} for role, said in parts.items() if not fields.is_missing(said)]


def turn(answer: str) -> list[Message]:
    """An answer as the turn of the assistant."""
    return [{"role": "assistant", "content": answer.strip()}]


def turns(raw: Raw, name: str = "conversations") -> list[Message]:
    """The conversation in a field that is ShareGPT's by its name."""
    found = fields.need(raw, name, "a list of turns with from and value")
    found = decoded(found, name)
    if isinstance(found, str) and found.lstrip().startswith("["):
        found = fields.parsed(raw, name)
    given = fields.listed({name: found}, name, "turns with from and value")
    if not isinstance(given[0], Mapping) or not {"role", "from"} & set(given[0]):
        raise BadField(f"{name} contains {shorten(given[0])}, which is not a turn with from and value")
    return conversation(given, name)


def _message(item: object, name: str) -> Message:
    if isinstance(item, Mapping) and "from" in item and "role" not in item:
        item = _turn(item, name)
    if not (isinstance(item, Mapping) and isinstance(item.get("role"), str)):
        raise BadField(f"{name} contains {shorten(item)}, which is not a message with role and content")
    speaker = item["role"].strip().lower()
    if speaker not in ROLES:
        raise BadField(f"{name} has a message of the role {shorten(item['role'])}: expected one of {', '.join(ROLES)}")
    if speaker in CALLERS:
        item = {**item, "content": "", "tool_calls": _listed(fields.parsed(item, "content"))}
    calls = _calls(item, name)
    more = {key: item[key] for key in READ if item.get(key) is not None}
    more |= {"tool_calls": calls} if calls else {}
    if thought := _thought(item.get("content")):
        more.setdefault("reasoning_content", thought)
    if not calls:
        more.pop("tool_calls", None)
    said = _text(item.get("content"), name, may_be_null=bool(calls))
    return {"role": ROLES[speaker], "content": said, **more, **_weight(item)}


def _turn(item: Raw, name: str) -> Message:
    """ShareGPT's turn as a message, with all its other keys."""
    if "value" not in item:
        raise BadField(f"{name} contains {shorten(item)}, which is not a turn with from and value")
    speaker, said = item["from"], item["value"]
    if not isinstance(speaker, str) or speaker.strip().lower() not in ROLES:
        raise BadField(f"{name} has a turn from {shorten(speaker)}: expected one of {', '.join(ROLES)}")
    if not isinstance(said, str) and not (said is None and item.get("tool_calls")):
        raise BadField(f"{name} has a turn whose value is not text: {shorten(said)}")
    more = {key: value for key, value in item.items() if key not in ("from", "value")}
    return {**more, "role": speaker, "content": said}


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _text(value: object, name: str, *, may_be_null: bool) -> str | None:
    """A message's content: text, or parts that are all text and are joined."""
    if isinstance(value, str) or (value is None and may_be_null):
        return value
    if not isinstance(value, list) or not value or not all(isinstance(part, Mapping) for part in value):
        raise BadField(f"{name} has a message whose content is not text: {shorten(value)}")
    texts = []
    for part in value:
        kind = part.get("type", "text")
        if _is_thought(part):
            continue  # it is the message's reasoning
        if isinstance(kind, str) and kind.startswith(IMAGES):
            raise BadField(f"{name} has a message with a part of type {kind}: only text can be used")
        if kind not in TEXTS or not isinstance(part.get("text"), str):
            raise BadField(f"{name} has a message with a part that is not text: {shorten(part)}")
        texts.append(part["text"])
    return "".join(texts)


def _thought(value: object) -> str:
    """The reasoning among the parts of a message's content, as Anthropic's and open models' APIs return it."""
    parts = value if isinstance(value, list) else []
    return "\n\n".join(str(part[THOUGHTS[part["type"]]]) for part in parts if _is_thought(part))


def _is_thought(part: object) -> bool:
    kind = part.get("type") if isinstance(part, Mapping) else None
    return isinstance(part, Mapping) and kind in tuple(THOUGHTS) and isinstance(part.get(THOUGHTS[str(kind)]), str)


def _weight(item: Raw) -> Message:
    """`weight: 0` for a turn that isn't learned; 1 is the default and is left out."""
    for name in ("weight", "train"):
        value = item.get(name)
        if value is None:
            continue
        if not isinstance(value, int | float) or value not in (0, 1):
            raise BadField(f"a message's {name} must be 0 or 1, not {shorten(value)}")
        return {} if value else {"weight": 0}
    return {}


def _calls(item: Raw, name: str) -> list[Any]:
    """A message's tool calls, with their arguments as an object, as chat templates expect them."""
    given = item.get("tool_calls")
    if given is None and item.get("function_call"):
        given = [{"type": "function", "function": item["function_call"]}]
    if isinstance(given, str):
        given = fields.parsed(item, "tool_calls") if given.strip() else None
    if not given:
        return []
    if not isinstance(given, list):
        raise BadField(f"{name} has a message whose tool_calls are not a list: {shorten(given)}")
    return [_call(call, name) for call in given]


def _call(call: object, name: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadField(f"{name} has a message with a tool call that has no name: {shorten(call)}")
    given = {**function}
    if isinstance(given.get("arguments"), str):
        try:
            decoded = json.loads(given["arguments"])
        except (ValueError, RecursionError):
            decoded = None  # as a model may have written it: templates that write text as it is can still use it
        if isinstance(decoded, dict) and not fault_of(decoded, given["arguments"]):
            given["arguments"] = decoded
    if function is call:
        return {"type": "function", "function": given}
    return {"type": "function", **{key: value for key, value in call.items() if value is not None}, "function": given}


def template(raw: Raw) -> Template:
    """What a row passes to the chat template: `tools`, and its own `chat_template_kwargs`."""
    found: Template = {}
    for name in ("tools", "functions"):
        if tools := _tools(raw, name):
            found["tools"] = tools
            break
    options = raw.get("chat_template_kwargs")
    if isinstance(options, str):
        options = fields.parsed(raw, "chat_template_kwargs") if options.strip() else None
    if options is not None and not isinstance(options, Mapping):
        raise BadField(f"chat_template_kwargs must be an object, not {shorten(options)}")
    return found | {key: value for key, value in (options or {}).items() if value is not None}


def _tools(raw: Raw, name: str) -> list[Any]:
    """The tools that a conversation can call: a list, or JSON text as LLaMA-Factory and parquet files have it."""
    if fields.is_missing(given := raw.get(name)):
        return []
    if isinstance(given, str):
        given = fields.parsed(raw, name) if given.strip() else []
    if not isinstance(given, list) or not all(isinstance(tool, Mapping) for tool in given):
        raise BadField(f"{name} must be a list of objects, not {shorten(given)}")
    if name == "functions":  # OpenAI's older form
        return [{"type": "function", "function": dict(tool)} for tool in given]
    return [dict(tool) for tool in given]


def keys_of(values: Iterable[object]) -> set[str]:
    """The keys of all messages in these values, without those that every message has."""
    lists = (value if isinstance(value, list) else [value] for value in values if isinstance(value, list | Mapping))
    messages = (item for items in lists for item in items if isinstance(item, Mapping))
    found = (item for item in messages if "role" in item or "from" in item)
    return {str(key) for item in found for key, value in item.items() if key not in OWN and value is not None}
