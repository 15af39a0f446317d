"""Rows as well-known data sets were published, in our own shape: chats where the model has a template, else text."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from perlcli.data.fields import (
    BadField,
    SetAside,
    is_missing,
    label,
    listed,
    mapping,
    messages,
    need,
    number,
    optional_list,
    optional_text,
    parsed,
    text,
)
from perlcli.data.rows import Content, Demonstration, Message, Preference, Prompt, Raw, Row, Thumb, Unjudged
from perlcli.data.standard import UNLABELLED, shared, thumb
from perlcli.text import shorten

TIED = "with tied scores"  # the reason in the report


def _asked(prompt: str, chat: bool) -> Content:
    return [{"role": "user", "content": prompt}] if chat else prompt


def _answered(answer: str, chat: bool, gap: str = " ") -> Content:
    """An answer; in text it stands behind a gap after the prompt's last word, as in TRL's data."""
    return [{"role": "assistant", "content": answer.strip()}] if chat else gap + answer.strip()


# --- Anthropic HH (https://huggingface.co/datasets/Anthropic/hh-rlhf): one string a conversation

HH_TURN = re.compile(r"\n\n(Human|Assistant): ?")


def is_hh(value: Any) -> bool:
    """Whether a value is a conversation as Anthropic HH writes them."""
    return isinstance(value, str) and value.startswith("\n\nHuman:") and "\n\nAssistant:" in value


def read_hh(raw: Raw, chat: bool) -> Row:
    """The shared turns are the prompt; what follows the last `Assistant:` is the completion."""
    chosen, rejected = _hh_turns(raw, "chosen"), _hh_turns(raw, "rejected")
    start = shared(chosen[:-1], rejected[:-1])
    while start and chosen[start - 1]["role"] != "user":
        start -= 1  # a prompt ends with the person's turn
    if not start:
        raise BadField("chosen and rejected share no opening turn")
    prompt, answers = chosen[:start], (chosen[start:], rejected[start:])
    if chat:
        return Preference(prompt, *answers)
    return Preference(
        _hh_text(prompt) + "\n\nAssistant:", *(_hh_text(turns)[len("\n\nAssistant:") :] for turns in answers)
    )


def _hh_turns(raw: Raw, name: str) -> list[Message]:
    value = need(raw, name, "a conversation as text")
    if not is_hh(value):
        raise BadField(f"{name} is not a `\\n\\nHuman: … \\n\\nAssistant: …` text: {shorten(value)}")
    parts = HH_TURN.split(value)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]


def _hh_text(turns: list[Message]) -> str:
    names = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in turns)


# --- Stanford Human Preferences (https://huggingface.co/datasets/stanfordnlp/SHP; SHP-2 has the same columns)


def read_shp(raw: Raw, chat: bool) -> Preference | Unjudged:
    """A post and two comments on it; `labels` is 1 where A is preferred, 0 where B is."""
    post, a, b = text(raw, "history"), text(raw, "human_ref_A"), text(raw, "human_ref_B")
    prompt = _asked(post if chat else f"POST: {post}\n\nRESPONSE:", chat)
    is_first = label(raw, "labels")
    if is_first is None:
        return Unjudged(prompt, UNLABELLED)
    if raw.get("score_A") is not None and raw["score_A"] == raw.get("score_B"):
        return Unjudged(prompt, TIED)
    chosen, rejected = (a, b) if is_first else (b, a)
    return Preference(prompt, _answered(chosen, chat), _answered(rejected, chat))


def shp_limits(ratio: float | None, per_post: int | None) -> Callable[[Raw], None]:
    """What sets aside the rows beyond SHP's limits, which its card takes as 2 and 5: weak preferences are noise, and
    some posts have hundreds of pairs. Of a post the first rows that pass stay."""
    seen: Counter[str] = Counter()

    def limit(raw: Raw) -> None:
        if ratio is not None and _score_ratio(raw) < ratio:
            raise SetAside(f"with a score ratio below {ratio:g}")
        if per_post is not None:
            post = str(need(raw, "post_id", "the id of the post"))
            if seen[post] >= per_post:
                raise SetAside(f"beyond {per_post} of their post")
            seen[post] += 1

    return limit


def _score_ratio(raw: Raw) -> float:
    """The preferred comment's score over the other's: its own column, else from the two scores."""
    if raw.get("score_ratio") is not None:
        return number(raw, "score_ratio")
    low, high = sorted((number(raw, "score_A"), number(raw, "score_B")))
    if low <= 0:
        raise BadField(f"score_A and score_B must be above 0 to give a ratio, not {shorten(low)}")
    return high / low


# --- OpenAI's TL;DR (https://huggingface.co/datasets/openai/summarize_from_feedback, arXiv 2009.01325): comparisons,
# and the filtered posts with their own summaries. The prompt is the paper's, which trl-lib/tldr has ready-made.


def _tldr_prompt(raw: Mapping[str, Any]) -> str:
    subreddit = text(raw, "subreddit").removeprefix("r/")
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {text(raw, 'title')}\n\nPOST: {text(raw, 'post')}\n\nTL;DR:"


def read_comparison(raw: Raw, chat: bool) -> Preference | Unjudged:
    """Two summaries of a Reddit post, or of a news article, and the number of the better one."""
    info = mapping(raw, "info", "post, title and subreddit")
    try:
        is_news = info.get("post") is None and info.get("article") is not None
        prompt = f"ARTICLE: {text(info, 'article')}\n\nTL;DR:" if is_news else _tldr_prompt(info)
    except BadField as fault:
        raise BadField(f"info: {fault}") from fault
    summaries = listed(raw, "summaries", "two summaries")
    if len(summaries) != 2:
        raise BadField(f"summaries must be two, not {len(summaries)}")
    for summary in summaries:
        if not isinstance(summary, Mapping) or not isinstance(summary.get("text"), str):
            raise BadField(f"summaries holds {shorten(summary)}, which is not a summary with a text")
    choice = raw.get("choice")
    if is_missing(choice):
        return Unjudged(_asked(prompt, chat), UNLABELLED)
    if isinstance(choice, bool) or choice not in (0, 1):
        raise BadField(f"choice must be 0 or 1, not {shorten(choice)}")
    better, worse = (_answered(summaries[index]["text"], chat) for index in (int(choice), 1 - int(choice)))
    return Preference(_asked(prompt, chat), better, worse)


def read_tldr(raw: Raw, chat: bool) -> Row:
    """A Reddit post, with its author's summary where the row has one."""
    prompt = _asked(_tldr_prompt(raw), chat)
    if raw.get("summary") is None:
        return Prompt(prompt)
    return Demonstration(prompt, _answered(text(raw, "summary"), chat))


# --- Taskmaster (https://github.com/google-research-datasets/Taskmaster): TM-3 and TM-4, released with the paper


def read_taskmaster(raw: Raw, chat: bool) -> Thumb | Unjudged:
    """A reward row: the dialog so far is the prompt, the agent's next action the completion, 1.0 a thumbs up."""
    context, action = parsed(raw, "context"), parsed(raw, "generation")
    if not isinstance(context, list):
        raise BadField(f"context must be a list of turns, not {shorten(context)}")
    lines = [_turn(turn, "context") for turn in context]
    answer = _turn(action, "generation").removeprefix("agent: ")
    return thumb(_dialog(lines, chat), _answered(answer, chat), label(raw, "reward"))


def _dialog(lines: list[str], chat: bool) -> Content:
    return _asked("\n".join([*lines, "agent:"]), chat)


def _turn(turn: Any, name: str) -> str:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
        raise BadField(f"{name} holds {shorten(turn)}, which is not a turn with a role")
    said = turn.get("text", turn.get("api", turn.get("response")))
    if said is None:
        raise BadField(f"{name} holds a turn with neither text nor api nor response: {shorten(turn)}")
    return f"{turn['role']}: {_spelled(said)}"


def _spelled(said: Any) -> str:
    return said if isinstance(said, str) else json.dumps(said, ensure_ascii=False, default=str)


def read_dialog(raw: Raw, chat: bool) -> list[Row]:
    """A whole dialog: each thing that the agent says or calls, after all before it, in the shape of the reward rows."""
    lines: list[str] = []
    rows: list[Row] = []
    for turn in listed(raw, "utterances", "turns"):
        for line in _utterance(turn):
            if line.startswith("agent: "):
                rows.append(Demonstration(_dialog(lines, chat), _answered(line.removeprefix("agent: "), chat)))
            lines.append(line)
    if not rows:
        raise BadField("utterances holds nothing that the assistant says")
    return rows


def _utterance(turn: Any) -> list[str]:
    """A turn's lines: what was said and, after the user's words or before the agent's own, the calls it led to."""
    speakers = {"user": "user", "assistant": "agent"}
    if not isinstance(turn, Mapping) or str(turn.get("speaker")).lower() not in speakers:
        raise BadField(f"utterances holds {shorten(turn)}, which is not a turn with speaker user or assistant")
    who = speakers[str(turn["speaker"]).lower()]
    try:
        said, calls = f"{who}: {text(turn, 'text')}", _calls(turn)
    except BadField as fault:
        raise BadField(f"utterances: {fault}") from fault
    return [said, *calls] if who == "user" else [*calls, said]


def _calls(turn: Mapping[str, Any]) -> list[str]:
    """The API calls of a turn: TM-4 has them as annotations in their order, TM-3 as `apis` with args and response."""
    lines: list[str] = []
    notes = optional_list(turn, "annotations", "annotations")
    for index, note in enumerate(notes):
        if not isinstance(note, Mapping) or not {"name", "value"} <= set(note):
            raise BadField(f"annotations holds {shorten(note)}, which has no name and value")
        if note["name"] not in ("api_call", "api_response"):
            continue
        after = notes[index + 1] if index + 1 < len(notes) else {}
        detail = after.get("name") if isinstance(after, Mapping) else None
        try:
            given = parsed(after, "value") if detail in ("request", "response") else {}
        except BadField as fault:  # three dialogs of TM-4's 500 are published so
            raise SetAside("with a call or response that is not JSON") from fault
        lines.append(_call("agent" if note["name"] == "api_call" else "api", note["value"], given))
    for call in optional_list(turn, "apis", "calls"):
        if not isinstance(call, Mapping) or "name" not in call:
            raise BadField(f"apis holds {shorten(call)}, which has no name")
        lines.append(_call("agent", call["name"], call.get("args") or {}))
        lines.append(_call("api", call["name"], call.get("response") or {}))
    return lines


def _call(who: str, name: Any, given: Any) -> str:
    return f"{who}: {json.dumps({str(name): given}, ensure_ascii=False, default=str)}"


# --- AndroidControl (https://github.com/google-research/google-research/tree/master/android_control, arXiv 2406.03679)


def read_android(raw: Raw, chat: bool) -> Demonstration | Thumb | Unjudged:
    """A step on a phone, judged: the goal, the instruction of the step, the actions so far and what the screen holds
    in words are the prompt, the action the completion. Screenshots are not read. Without a label, a demonstration."""
    parts = [f"{name}: {optional_text(raw, name)}" for name in ("goal", "instruction") if optional_text(raw, name)]
    if not parts:
        raise BadField("goal and instruction are both missing or empty: expected the text of one")
    history = raw.get("history") or []
    steps = history if isinstance(history, list) else [history]
    parts += ["history:", *(f"{index}. {_spelled(step)}" for index, step in enumerate(steps, start=1))] if steps else []
    parts += [f"screen: {optional_text(raw, 'screen')}"] if optional_text(raw, "screen") else []
    action = need(raw, "action", "text or an object")
    if not isinstance(action, str | Mapping) or not action:
        raise BadField(f"action must be text or an object, not {shorten(action)}")
    kept = {key: value for key, value in action.items() if value is not None} if isinstance(action, Mapping) else action
    prompt, answer = _asked("\n".join([*parts, "action:"]), chat), _answered(_spelled(kept), chat)
    return thumb(prompt, answer, label(raw)) if "label" in raw else Demonstration(prompt, answer)


# --- Instructions


ALPACA = (
    "Below is an instruction that describes a task{more}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}{input}\n\n### Response:"
)


def read_alpaca(raw: Raw, chat: bool) -> Row:
    """Stanford Alpaca (https://github.com/tatsu-lab/stanford_alpaca): its prompts as text, or one message in a chat."""
    instruction, given = text(raw, "instruction"), optional_text(raw, "input")
    answer = text(raw, "output")
    if chat:
        return Demonstration(
            _asked(f"{instruction}\n\n{given}" if given else instruction, chat), _answered(answer, chat)
        )
    more = ", paired with an input that provides further context" if given else ""
    shown = f"\n\n### Input:\n{given}" if given else ""
    return Demonstration(ALPACA.format(more=more, instruction=instruction, input=shown), answer)


SHAREGPT = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "model": "assistant", "bing": "assistant", "bard": "assistant", "system": "system",
    "tool": "tool", "function_call": "assistant", "observation": "tool",
}  # fmt: skip


def read_sharegpt(raw: Raw, chat: bool) -> Row:
    """ShareGPT (as FastChat and Axolotl read it): `conversations` of turns with `from` and `value`."""
    turns = listed(raw, "conversations", "turns with from and value")
    if isinstance(turns[0], Mapping) and "role" in turns[0]:
        return Demonstration(None, messages(turns, "conversations"))
    found: list[Message] = []
    for turn in turns:
        if not isinstance(turn, Mapping) or not {"from", "value"} <= set(turn):
            raise BadField(f"conversations holds {shorten(turn)}, which is not a turn with from and value")
        if not isinstance(turn["from"], str) or turn["from"] not in SHAREGPT:
            raise BadField(f"conversations has a turn from {shorten(turn['from'])}: known are {', '.join(SHAREGPT)}")
        if not isinstance(turn["value"], str):
            raise BadField(f"conversations has a turn whose value is not text: {shorten(turn['value'])}")
        found.append({"role": SHAREGPT[turn["from"]], "content": turn["value"]})
    return Demonstration(None, found)
