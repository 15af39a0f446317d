"""Reads rows of well-known datasets as they were published: as chats if the model has a chat template, else as text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping

from perlcli.data import fields
from perlcli.data.fields import BadField, SetAside
from perlcli.data.readers.hh import hh_text, hh_turns, is_hh
from perlcli.data.readers.reading import TIED, Reading, answered, asked, thumb
from perlcli.data.rows import Content, Demonstration, Message, Preference, Prompt, Ranking, Raw, Row, Thumb, Unjudged
from perlcli.text import shorten

# --- Anthropic HH (https://huggingface.co/datasets/Anthropic/hh-rlhf): each conversation is one string


def read_hh(raw: Raw, how: Reading) -> Row:
    """The shared turns are the prompt; what follows the last `Assistant:` is the completion."""
    chosen, rejected = _hh_turns(raw, "chosen"), _hh_turns(raw, "rejected")
    start = fields.shared(chosen[:-1], rejected[:-1])
    while start and chosen[start - 1]["role"] != "user":
        start -= 1  # a prompt ends with the user's turn
    if not start:
        raise BadField("chosen and rejected do not start with the same turn")
    prompt, answers = chosen[:start], (chosen[start:], rejected[start:])
    if how.chat:
        return Preference(prompt, *answers)
    opening = "\n\nAssistant:"
    chosen_text, rejected_text = (hh_text(turns).removeprefix(opening) for turns in answers)
    return Preference(hh_text(prompt) + opening, chosen_text, rejected_text)


def _hh_turns(raw: Raw, name: str) -> list[Message]:
    value = fields.need(raw, name, "a conversation as text")
    if not isinstance(value, str) or not is_hh(value):
        raise BadField(f"{name} is not a `\\n\\nHuman: … \\n\\nAssistant: …` text: {shorten(value)}")
    return hh_turns(value)


# --- Stanford Human Preferences (https://huggingface.co/datasets/stanfordnlp/SHP; SHP-2 has the same columns)


def read_shp(raw: Raw, how: Reading) -> Preference | Unjudged:
    """A post and two comments on it; `labels` is 1 where A is preferred, 0 where B is."""
    post, a, b = fields.text(raw, "history"), fields.text(raw, "human_ref_A"), fields.text(raw, "human_ref_B")
    prompt = asked(post if how.chat else f"POST: {post}\n\nRESPONSE:", how)
    is_first = how.labels.read(raw.get("labels"), "labels")
    if is_first is None:
        return Unjudged(prompt, fields.UNLABELLED)
    if raw.get("score_A") is not None and raw["score_A"] == raw.get("score_B"):
        return Unjudged(prompt, TIED)
    chosen, rejected = (a, b) if is_first else (b, a)
    return Preference(prompt, answered(chosen, how), answered(rejected, how))


def shp_limits(ratio: float | None, per_post: int | None) -> Callable[[Raw], None]:
    """A check that raises SetAside for rows beyond the limits, as weak preferences are noise, and some posts have
    hundreds of pairs: SHP's card recommends a score ratio of 2 and 5 pairs per post, of which the first are kept."""
    seen: Counter[str] = Counter()

    def limit(raw: Raw) -> None:
        if ratio is not None and _score_ratio(raw) < ratio:
            raise SetAside(f"with a score ratio below {ratio:g}")
        if per_post is not None:
            post = str(fields.need(raw, "post_id", "the id of the post"))
            if seen[post] >= per_post:
                raise SetAside(f"beyond the first {per_post} of their post")
            seen[post] += 1

    return limit


def _score_ratio(raw: Raw) -> float:
    """The preferred comment's score divided by the other's: from its own column, else from the two scores."""
    if raw.get("score_ratio") is not None:
        return fields.number(raw, "score_ratio")
    low, high = sorted((fields.number(raw, "score_A"), fields.number(raw, "score_B")))
    if low <= 0:
        raise BadField(f"score_A and score_B must be above 0 for a ratio, not {shorten(low)}")
    return high / low


# --- OpenAI's TL;DR (https://huggingface.co/datasets/openai/summarize_from_feedback, arXiv 2009.01325): comparisons,
# and the filtered posts with their authors' summaries. The prompt is the paper's, as in trl-lib/tldr.


def _tldr_prompt(raw: Raw) -> str:
    subreddit, title, post = (fields.text(raw, name) for name in ("subreddit", "title", "post"))
    return f"SUBREDDIT: r/{subreddit.removeprefix('r/')}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"


def read_comparison(raw: Raw, how: Reading) -> Preference | Unjudged:
    """Two summaries of a Reddit post, or of a news article, and the number of the better one."""
    info = fields.mapping(raw, "info", "post, title and subreddit")
    try:
        is_news = info.get("post") is None and info.get("article") is not None
        prompt = f"ARTICLE: {fields.text(info, 'article')}\n\nTL;DR:" if is_news else _tldr_prompt(info)
    except BadField as fault:
        raise BadField(f"info: {fault}") from fault
    summaries = fields.listed(raw, "summaries", "two summaries")
    if len(summaries) != 2:
        raise BadField(f"summaries must be a list of two summaries, not of {len(summaries)}")
    texts = [_summary(summary) for summary in summaries]
    choice = raw.get("choice")
    if fields.is_missing(choice):
        return Unjudged(asked(prompt, how), fields.UNLABELLED)
    if not isinstance(choice, int | float) or isinstance(choice, bool) or choice not in (0, 1):
        raise BadField(f"choice must be 0 or 1, not {shorten(choice)}")
    better, worse = texts if choice == 0 else reversed(texts)
    return Preference(asked(prompt, how), answered(better, how), answered(worse, how))


def _summary(value: object) -> str:
    summary = value.get("text") if isinstance(value, Mapping) else None
    if not isinstance(summary, str):
        raise BadField(f"summaries contains {shorten(value)}, which is not a summary with a text")
    return summary


def read_tldr(raw: Raw, how: Reading) -> Row:
    """A Reddit post, with its author's summary if the row has one."""
    prompt = asked(_tldr_prompt(raw), how)
    if raw.get("summary") is None:
        return Prompt(prompt)
    return Demonstration(prompt, answered(fields.text(raw, "summary"), how))


# --- Taskmaster (https://github.com/google-research-datasets/Taskmaster): TM-3 and TM-4, released with the PERL paper


def read_taskmaster(raw: Raw, how: Reading) -> Thumb | Unjudged:
    """A reward row: the dialog so far is the prompt, the agent's next action the completion, 1.0 a thumbs up."""
    context, action = fields.parsed(raw, "context"), fields.parsed(raw, "generation")
    if not isinstance(context, list):
        raise BadField(f"context must be a list of turns, not {shorten(context)}")
    lines = [_turn(turn, "context") for turn in context]
    answer = _turn(action, "generation").removeprefix("agent: ")
    return thumb(_dialog(lines, how), answered(answer, how), raw, how, "reward")


def _dialog(lines: list[str], how: Reading) -> Content:
    return asked("\n".join([*lines, "agent:"]), how)


def _turn(turn: object, name: str) -> str:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
        raise BadField(f"{name} contains {shorten(turn)}, which is not a turn with a role")
    said = turn.get("text", turn.get("api", turn.get("response")))
    if said is None:
        raise BadField(f"{name} contains a turn without text, api or response: {shorten(turn)}")
    return f"{turn['role']}: {_spelled(said)}"


def _spelled(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def read_dialog(raw: Raw, how: Reading) -> list[Row | Unjudged | Ranking]:
    """A dialog: one row for each thing that the agent says or calls, with everything before it as the prompt. The rows
    have the same form as the reward rows."""
    lines: list[str] = []
    rows: list[Row | Unjudged | Ranking] = []
    for turn in fields.listed(raw, "utterances", "turns"):
        for line in _utterance(turn):
            if line.startswith("agent: "):
                rows.append(Demonstration(_dialog(lines, how), answered(line.removeprefix("agent: "), how)))
            lines.append(line)
    if not rows:
        raise BadField("utterances contains no turn of the assistant")
    return rows


def _utterance(turn: object) -> list[str]:
    """A turn's lines: what was said, and its API calls, which follow the user's words and precede the agent's."""
    speakers = {"user": "user", "assistant": "agent"}
    if not isinstance(turn, Mapping) or str(turn.get("speaker")).lower() not in speakers:
        raise BadField(f"utterances contains {shorten(turn)}, which is not a turn with speaker user or assistant")
    who = speakers[str(turn["speaker"]).lower()]
    try:
        said, calls = f"{who}: {fields.text(turn, 'text')}", _calls(turn)
    except BadField as fault:
        raise BadField(f"utterances: {fault}") from fault
    return [said, *calls] if who == "user" else [*calls, said]


def _calls(turn: Raw) -> list[str]:
    """The API calls of a turn: TM-4 has them as annotations in order, TM-3 as `apis` with args and response."""
    lines: list[str] = []
    notes = fields.optional_list(turn, "annotations", "annotations")
    for index, note in enumerate(notes):
        if not isinstance(note, Mapping) or not {"name", "value"} <= set(note):
            raise BadField(f"annotations contains {shorten(note)}, which has no name and value")
        if note["name"] not in ("api_call", "api_response"):
            continue
        try:
            given = _details(notes[index + 1]) if index + 1 < len(notes) else {}
        except BadField as fault:  # in three of TM-4's 500 dialogs, as they were published
            raise SetAside("with a call or response that is not valid JSON") from fault
        lines.append(_call("agent" if note["name"] == "api_call" else "api", note["value"], given))
    for call in fields.optional_list(turn, "apis", "calls"):
        if not isinstance(call, Mapping) or "name" not in call:
            raise BadField(f"apis contains {shorten(call)}, which has no name")
        lines.append(_call("agent", call["name"], call.get("args") or {}))
        lines.append(_call("api", call["name"], call.get("response") or {}))
    return lines


def _details(note: object) -> object:
    """What the annotation after a call says of it, if it belongs to the call."""
    if isinstance(note, Mapping) and note.get("name") in ("request", "response"):
        return fields.parsed(note, "value")
    return {}


def _call(who: str, name: object, given: object) -> str:
    return f"{who}: {_spelled({str(name): given})}"


# --- AndroidControl (https://github.com/google-research/google-research/tree/master/android_control, arXiv 2406.03679)


def read_android(raw: Raw, how: Reading) -> Demonstration | Thumb | Unjudged:
    """A step on a phone: the completion is the action, and the prompt has the goal, the step's instruction, the actions
    so far and the screen as text. Screenshots are not read. A row without a label column is a demonstration."""
    given = {name: fields.optional_text(raw, name) for name in ("goal", "instruction")}
    parts = [f"{name}: {value}" for name, value in given.items() if value]
    if not parts:
        raise BadField("goal and instruction are both missing or empty: expected text in at least one")
    history = raw.get("history") or []
    steps = history if isinstance(history, list) else [history]
    if steps:
        parts += ["history:", *(f"{index}. {_spelled(step)}" for index, step in enumerate(steps, start=1))]
    if screen := fields.optional_text(raw, "screen"):
        parts.append(f"screen: {screen}")
    action = fields.need(raw, "action", "text or an object")
    if not isinstance(action, str | Mapping) or not action:
        raise BadField(f"action must be text or an object, not {shorten(action)}")
    if isinstance(action, Mapping):
        action = {key: value for key, value in action.items() if value is not None}
    prompt, answer = asked("\n".join([*parts, "action:"]), how), answered(_spelled(action), how)
    return thumb(prompt, answer, raw, how) if "label" in raw else Demonstration(prompt, answer)
