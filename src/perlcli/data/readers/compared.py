"""Reads datasets in which two answers were compared, or good answers are listed next to bad ones."""

from __future__ import annotations

import re
from collections import ChainMap
from typing import Any, cast

from perlcli.data import fields
from perlcli.data.fields import UNLABELLED, BadField
from perlcli.data.readers.messages import content, conversation, turn
from perlcli.data.readers.plain import read_chat_pair, read_pair, read_question_pair
from perlcli.data.readers.reading import ALONE, TIED, Reading, answered, asked, opened, question, reply
from perlcli.data.rows import Content, Preference, Ranking, Raw, Unjudged
from perlcli.text import shorten

Two = tuple[Content, Content]


def _two(raw: Raw, one: str, other: str, how: Reading) -> Two:
    return answered(fields.text(raw, one), how), answered(fields.text(raw, other), how)


def _compared(prompt: Content, answers: Two, is_first: bool | None) -> Preference | Unjudged:
    """The pair in its order; a tie if neither is better."""
    if is_first is None:
        return Unjudged(prompt, TIED)
    return Preference(prompt, *(answers if is_first else (answers[1], answers[0])))


def _by_strength(prompt: Content, answers: Two, raw: Raw, name: str) -> Preference | Unjudged:
    """NVIDIA's scale: below 0 the first answer is better, above 0 the second, 0 is a tie."""
    if fields.is_missing(raw.get(name)):
        return Unjudged(prompt, UNLABELLED)
    strength = fields.number(raw, name)
    return _compared(prompt, answers, None if strength == 0 else strength < 0)


def read_helpsteer3(raw: Raw, how: Reading) -> Preference | Unjudged:
    """HelpSteer3 (https://huggingface.co/datasets/nvidia/HelpSteer3): a conversation and two responses."""
    prompt = conversation(fields.need(raw, "context", "a list of messages"), "context")
    first, second = (turn(fields.text(raw, name)) for name in ("response1", "response2"))
    return _by_strength(prompt, (first, second), raw, "overall_preference")


def read_helpsteer2_preference(raw: Raw, how: Reading) -> Preference | Unjudged:
    """The preferences of HelpSteer2 (https://huggingface.co/datasets/nvidia/HelpSteer2, folder preference)."""
    prompt = asked(fields.text(raw, "prompt"), how)
    return _by_strength(prompt, _two(raw, "response_1", "response_2", how), raw, "preference_strength")


def read_pku(raw: Raw, how: Reading) -> Preference | Unjudged:
    """PKU-SafeRLHF (https://huggingface.co/datasets/PKU-Alignment/PKU-SafeRLHF): by helpfulness, or with --score-field
    safer_response_id by safety."""
    prompt, name = asked(fields.text(raw, "prompt"), how), how.score_field or "better_response_id"
    answers = _two(raw, "response_0", "response_1", how)
    if fields.is_missing(raw.get(name)):
        return Unjudged(prompt, UNLABELLED)
    better = fields.number(raw, name)
    if better not in (0, 1):
        raise BadField(f"{name} must be 0 or 1, not {shorten(raw[name])}")
    return _compared(prompt, answers, better == 0)


def read_webgpt(raw: Raw, how: Reading) -> Preference | Unjudged:
    """WebGPT's comparisons (https://huggingface.co/datasets/openai/webgpt_comparisons)."""
    prompt = asked(fields.text(fields.mapping(raw, "question", "full_text"), "full_text"), how)
    first, second = fields.number(raw, "score_0"), fields.number(raw, "score_1")
    return _compared(prompt, _two(raw, "answer_0", "answer_1", how), None if first == second else first > second)


def read_stack_pair(raw: Raw, how: Reading) -> Preference:
    """Stack Exchange, paired (https://huggingface.co/datasets/lvwerra/stack-exchange-paired): j is better than k."""
    return Preference(asked(fields.text(raw, "question"), how), *_two(raw, "response_j", "response_k", how))


def read_judgebench(raw: Raw, how: Reading) -> Preference | Unjudged:
    """JudgeBench (https://huggingface.co/datasets/ScalerLab/JudgeBench)."""
    verdict = fields.text(raw, "label").replace(" ", "")
    known = {"A>B": True, "B>A": False, "A=B": None}
    if verdict not in known:
        raise BadField(f"label must be A>B or B>A, not {shorten(raw['label'])}")
    answers = _two(raw, "response_A", "response_B", how)
    return _compared(asked(fields.text(raw, "question"), how), answers, known[verdict])


# --- Arena (https://huggingface.co/datasets/lmsys/chatbot_arena_conversations, lmarena-ai/arena-human-preference-140k)


def read_arena(raw: Raw, how: Reading) -> Preference | Unjudged:
    """Two conversations with different models, and the winner."""
    winner = fields.text(raw, "winner")
    names = {"model_a": ("conversation_a", "conversation_b"), "model_b": ("conversation_b", "conversation_a")}
    if winner not in names and not winner.startswith(("tie", "both")):
        raise BadField(f"winner must be model_a, model_b or tie, not {shorten(winner)}")
    better, worse = names.get(winner, names["model_a"])
    pair = read_pair({"chosen": raw.get(better), "rejected": raw.get(worse)}, how)
    return pair if winner in names else Unjudged(pair.prompt, TIED)


def read_arena_55k(raw: Raw, how: Reading) -> Preference | Unjudged:
    """LMSYS's 55k battles (https://huggingface.co/datasets/lmsys/lmsys-arena-human-preference-55k), whose prompts and
    responses are JSON lists, one item for each round."""
    rounds = {name: _rounds(raw, name) for name in ("prompt", "response_a", "response_b")}
    if len({len(items) for items in rounds.values()}) > 1:
        raise BadField("prompt, response_a and response_b must have the same number of rounds")
    chats = []
    for name in ("response_a", "response_b"):
        chats.append(
            [
                {"role": role, "content": said}
                for both in zip(rounds["prompt"], rounds[name], strict=True)
                for role, said in zip(("user", "assistant"), both, strict=True)
            ]
        )
    wins = [how.labels.read(raw.get(name), name) for name in ("winner_model_a", "winner_model_b")]
    better, worse = chats if wins[0] else reversed(chats)
    pair = read_pair({"chosen": better, "rejected": worse}, how)
    return pair if wins[0] != wins[1] else Unjudged(pair.prompt, TIED)


def _rounds(raw: Raw, name: str) -> list[str]:
    found = fields.parsed(raw, name)
    if not isinstance(found, list) or not found or not all(isinstance(item, str) for item in found):
        raise BadField(f"{name} must be a JSON list of texts, not {shorten(raw[name])}")
    return found


# --- Two answers in columns that differ in their last letter or digit, and a column that says which is better

REPLY = "response|answer|completion|output|generation|reply|summary"
ANSWER = re.compile(rf"((?:\w*[_ -])?(?:{REPLY}))(?:[_ -]?(\d)|[_ -]?([ab])|[_ -]([c-z]))", re.IGNORECASE)
SIDES = (("a", "b"), ("1", "2"), ("0", "1"))
VERDICTS = ("winner", "preferred", "preference", "better", "choice", "verdict", "label")
NEITHER = ("tie", "both", "neither", "equal", "same", "draw")


def has_verdict(raw: Raw) -> bool:
    """Whether a row has two answers, a question and a column with the verdict."""
    asks = ("messages", "prompt", "question", "instruction", "input")
    has_question = any(raw.get(name) is not None for name in asks)
    return has_question and bool(_sides(raw)) and any(name in raw for name in VERDICTS)


def _sides(raw: Raw) -> list[tuple[str, str]]:
    """The last letter or digit and the name of the two columns with answers; empty if there aren't exactly two."""
    matches = [match for name in raw if (match := ANSWER.fullmatch(name))]
    found = sorted((_side(match), match[0]) for match in matches)
    is_one_stem = len({match[1] for match in matches}) == 1
    return found if is_one_stem and tuple(side for side, _ in found) in SIDES else []


def _side(match: re.Match[str]) -> str:
    return (match[2] or match[3] or match[4]).lower()


def read_verdict(raw: Raw, how: Reading) -> Preference | Unjudged:
    """Two answers and the better one, which --score-field names if several columns could."""
    (one, first), (other, second) = _sides(raw)
    verdict = how.score_field or next(name for name in VERDICTS if name in raw)
    won = None if fields.is_missing(raw.get(verdict)) else _winner(raw, verdict, (one, other))
    better, worse = (second, first) if won == other else (first, second)
    row = ChainMap({"chosen": raw[better], "rejected": raw[worse]}, cast(Any, raw))
    reader = read_chat_pair if "messages" in raw else read_question_pair if raw.get("prompt") is None else read_pair
    pair = reader(row, how)
    if fields.is_missing(raw.get(verdict)):
        return Unjudged(pair.prompt, UNLABELLED, pair.template)
    if won is None:
        return Unjudged(pair.prompt, TIED, pair.template)
    return Unjudged(pair.prompt, ALONE, pair.template) if fields.is_null(raw[worse]) else pair


def _winner(raw: Raw, verdict: str, sides: tuple[str, str]) -> str | None:
    """The side that a verdict names by itself or by the end of a name, such as `model_a`; None for a tie."""
    value = raw[verdict]
    word = str(value).strip().lower() if isinstance(value, str | int) and not isinstance(value, bool) else ""
    if word.startswith(NEITHER):
        return None
    side = re.split(r"[_ -]", word)[-1]
    if side not in sides and (match := ANSWER.fullmatch(word)):
        side = _side(match)
    if side not in sides:
        raise BadField(f"{verdict} must be {sides[0]}, {sides[1]} or tie, not {shorten(value)}")
    return side


# --- Lists of good and bad answers


def has_lists(raw: Raw) -> bool:
    """Whether chosen and rejected are lists of texts."""
    return all(
        isinstance(raw.get(name), list) and all(isinstance(item, str) for item in raw[name])  # type: ignore[attr-defined]
        for name in ("chosen", "rejected")
    ) and bool(raw["chosen"])


def read_lists(raw: Raw, how: Reading) -> Ranking:
    """RewardBench 2 (https://huggingface.co/datasets/allenai/reward-bench-2) and RM-Bench
    (https://huggingface.co/datasets/THU-KEG/RM-Bench): each chosen answer is better than each rejected one."""
    answers = []
    for name, score in (("chosen", 1.0), ("rejected", 0.0)):
        for item in fields.listed(raw, name, "answers"):
            if not isinstance(item, str):
                raise BadField(f"{name} contains {shorten(item)}, which is not text")
            answers.append((item, score))
    given = question(content(raw, "prompt"), how)
    prompt = opened(raw, asked(given, how) if isinstance(given, str) else given, how)
    return Ranking(prompt, [(reply(answer, how), score) for answer, score in answers], is_graded=False)
