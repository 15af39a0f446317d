"""Reads datasets with several answers to a prompt, each with a rank or scores."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from perlcli.data import fields
from perlcli.data.fields import UNLABELLED, BadField
from perlcli.data.readers.hh import HH_TURN, ROLES
from perlcli.data.readers.messages import content, template
from perlcli.data.readers.reading import Reading, answer_of, answered, asked, continued, opened, question, reply
from perlcli.data.rows import Content, Message, Ranking, Raw, Row, Unjudged
from perlcli.text import shorten

NO_SCORE = ("N/A", "")  # as UltraFeedback has it where the annotator gave none


def read_nectar(raw: Raw, how: Reading) -> Ranking:
    """Nectar (https://huggingface.co/datasets/berkeley-nest/Nectar): answers with their rank, 1 for the best."""
    answers = []
    for item in _items(raw, "answers"):
        text = answered(fields.text(item, "answer"), how)
        answers.append(
            (text, fields.number(item, how.score_field) if how.score_field else -fields.number(item, "rank"))
        )
    return Ranking(_nectar_prompt(fields.text(raw, "prompt"), how), answers)


def _nectar_prompt(text: str, how: Reading) -> Content:
    """The prompt, which is a dialog in the form of Anthropic HH that ends with `Assistant:`."""
    parts = HH_TURN.split(text.rstrip() if not text.endswith("\n\nAssistant: ") else text)
    if not how.chat:
        return text.rstrip()
    if len(parts) < 3:
        return asked(text, how)
    found: list[Message] = [
        {"role": ROLES[who], "content": said.strip()} for who, said in zip(parts[1::2], parts[2::2], strict=True)
    ]
    return found[:-1] if len(found) > 1 and not found[-1]["content"] else found


def read_ultrafeedback(raw: Raw, how: Reading) -> Ranking:
    """UltraFeedback (https://huggingface.co/datasets/openbmb/UltraFeedback). The score is the mean over the aspects, as
    `overall_score` has known mistakes; --score-field names it or an aspect, such as helpfulness."""
    name, answers = how.score_field or "fine-grained_score", []
    for item in _items(raw, "completions"):
        aspects = item.get("annotations")
        aspect = aspects.get(name) if isinstance(aspects, Mapping) else None
        place, key = (aspect, "Rating") if isinstance(aspect, Mapping) else (item, name)
        if place.get(key) is None or str(place[key]) in NO_SCORE:
            continue
        answers.append((answered(fields.text(item, "response"), how), fields.number(place, key)))
    if not answers:
        raise BadField(f"completions has no answer with {name}")
    return Ranking(asked(fields.text(raw, "instruction"), how), answers)


def read_stack(raw: Raw, how: Reading) -> Ranking:
    """Stack Exchange (https://huggingface.co/datasets/HuggingFaceH4/stack-exchange-preferences): answers with the score
    of Askell et al. (arXiv 2112.00861)."""
    name, answers = how.score_field or "pm_score", []
    for item in _items(raw, "answers"):
        answers.append((answered(fields.text(item, "text"), how), fields.number(item, name)))
    return Ranking(asked(fields.text(raw, "question"), how), answers)


def _items(raw: Raw, name: str) -> list[Raw]:
    items = fields.listed(raw, name, "answers")
    found = [item for item in items if isinstance(item, Mapping)]
    if len(found) < len(items):
        raise BadField(f"{name} must be a list of objects, not {shorten(items)}")
    return found


# --- One row for each answer; rows with the same prompt that follow each other were put together

HELPSTEER_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


def read_helpsteer2(raw: Raw, how: Reading) -> list[Row | Unjudged | Ranking]:
    """HelpSteer and HelpSteer2 (https://huggingface.co/datasets/nvidia/HelpSteer2): responses with five attributes, of
    which helpfulness is the score unless --score-field names another one."""
    text = fields.text(raw, "prompt")
    parts = HELPSTEER_TURN.split(text)
    prompt: Content = asked(text, how)
    if how.chat and len(parts) > 1:
        roles = {"User": "user", "Assistant": "assistant"}
        turns = [{"role": roles[who], "content": said} for who, said in zip(parts[1::2], parts[2::2], strict=True)]
        prompt = [{"role": "user", "content": parts[0]}, *turns]
    return _ranked(raw, opened(raw, prompt, how), "response", how.score_field or "helpfulness", how)


def read_scored(raw: Raw, how: Reading) -> list[Row | Unjudged | Ranking]:
    """Completions with a score."""
    given = question(content(raw, "prompt"), how)
    prompt = opened(raw, asked(given, how) if isinstance(given, str) else given, how)
    return _ranked(raw, prompt, "completion", how.score_field or "score", how)


def _ranked(raw: Raw, prompt: Content, name: str, score: str, how: Reading) -> list[Row | Unjudged | Ranking]:
    """The answers that have a score, and one prompt for each that has none."""
    options = template(raw)
    pairs = list(zip(_column(raw, name), _column(raw, score), strict=True))
    rated = [(answer, value) for answer, value in pairs if not fields.is_missing(value)]
    rest: list[Row | Unjudged | Ranking] = [Unjudged(prompt, UNLABELLED, options)] * (len(pairs) - len(rated))
    if not rated:
        return rest
    scores = [fields.number({score: value}, score) for _, value in rated]
    answers = [reply(answer_of({name: answer}, name), how) for answer, _ in rated]
    start, *answers = continued(prompt, *answers)
    return [Ranking(start, list(zip(answers, scores, strict=True)), options), *rest]


def _column(raw: Raw, name: str) -> list[object]:
    """The values of a column in the rows that were put together."""
    value = raw[name] if name in raw else fields.need(raw, name, "a value")
    return value.values if isinstance(value, Together) else [value]


class Together:
    """The values of a column in adjacent rows with the same prompt."""

    def __init__(self, values: list[object]) -> None:
        self.values = values

    def __repr__(self) -> str:
        return repr(self.values)


# What belongs to the prompt of such rows: those that differ in it are read apart.
CONTEXT = ("system", "system_prompt", "history", "tools", "functions", "chat_template_kwargs")


def together(raws: Sequence[Raw], key: str) -> Raw:
    """Adjacent rows as one, whose columns other than those of the prompt have the values of all of them."""
    same = (key, *CONTEXT)
    columns = dict.fromkeys(column for raw in raws for column in raw)
    return {
        column: raws[0].get(column) if column in same else Together([raw.get(column) for raw in raws])
        for column in columns
    }
