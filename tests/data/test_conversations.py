"""Conversations in rows: their roles in other names, their keys, and messages that are written as text."""

import json
from typing import Any

import pytest
from row_samples import Raw, agent, converted, said, user

from perlcli.data import Demonstration, Preference
from perlcli.errors import PerlError

ASK, GOOD, BAD = user("2+2?"), agent("4"), agent("5")
PAIR = Preference(ASK, GOOD, BAD)
GPT = {"from": "gpt", "value": "4"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
NUMPY = "[{'role': 'user', 'content': '2+2?'}\n {'role': 'assistant', 'content': '4'}]"


@pytest.mark.parametrize("written", [json.dumps, repr])
@pytest.mark.parametrize(
    "raw",
    [
        {"prompt": ASK, "chosen": GOOD, "rejected": BAD},
        {"chosen": [*ASK, *GOOD], "rejected": [*ASK, *BAD]},
        {"question": ASK, "chosen": GOOD[0], "rejected": BAD[0]},
        {"conversations": [{"from": "human", "value": "2+2?"}], "chosen": GPT, "rejected": {**GPT, "value": "5"}},
    ],
)
def test_messages_as_json_or_python_text_are_messages(raw: Raw, written: Any) -> None:
    assert converted({name: written(value) for name, value in raw.items()}, use="reward").rows == [PAIR]


@pytest.mark.parametrize("text", ['[{"a": 1}]', '{"role": "cook", "content": "soup"}', "[{'role': 'user'", "[2+2?]"])
def test_other_text_in_brackets_is_text(text: str) -> None:
    assert converted({"prompt": "a", "completion": text}, use="sft").rows == [Demonstration("a", text)]


def test_text_that_looks_like_messages_but_cannot_be_read_is_refused() -> None:
    with pytest.raises(PerlError, match="prompt looks like messages, but is neither JSON nor a Python list: "):
        converted({"prompt": NUMPY, "chosen": "4", "rejected": "5"}, use="reward")


@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value")])
@pytest.mark.parametrize(("asker", "answerer"), [("human", "ai"), ("User", "BOT"), ("prompter", "model")])
def test_known_roles_are_those_of_chat_templates(keys: tuple[str, str], asker: str, answerer: str) -> None:
    turns = [dict(zip(keys, turn, strict=True)) for turn in ((asker, "2+2?"), (answerer, "4"))]
    assert converted({"messages": turns}, use="sft").rows == [Demonstration(None, [*ASK, *GOOD])]


def test_an_unknown_role_is_refused_by_name() -> None:
    with pytest.raises(PerlError, match="messages has a message of the role 'narrator': expected one of human, user"):
        converted({"messages": [*ASK, said("narrator", "He said 4.")]}, use="sft")


@pytest.mark.parametrize(
    ("more", "read"),
    [
        ({"reasoning_content": "two and two"}, {"reasoning_content": "two and two"}),
        ({"tool_calls": [{"name": "add", "arguments": '{"a": 2}'}]}, {"tool_calls": [CALL]}),
        ({"weight": 0, "name": "Ann"}, {"weight": 0, "name": "Ann"}),
    ],
)
def test_turns_with_from_and_value_keep_their_other_keys(more: Raw, read: Raw) -> None:
    turns = [{"from": "human", "value": "2+2?"}, {**GPT, **more}]
    assert converted({"conversations": turns}, use="sft").rows == [Demonstration(None, [*ASK, {**GOOD[0], **read}])]
