"""Reads exports of labelling tools: Argilla (https://docs.argilla.io) and Label Studio (https://labelstud.io)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from perlcli.data import fields
from perlcli.data.fields import UNLABELLED, BadField
from perlcli.data.readers.messages import content
from perlcli.data.readers.reading import TIED, Reading, asked, opened, reply
from perlcli.data.rows import Content, Ranking, Raw, Thumb, Unjudged
from perlcli.text import shorten

PROMPTS = ("prompt", "question", "instruction", "query", "input", "text")
ANSWERS = ("response", "answer", "completion", "generation", "output", "reply", "chosen", "rejected", "summary")
TIES = ("tie", "equal", "same", "both", "neither", "none", "draw")
SIDES = {"left": 0, "right": 1, "a": 0, "b": 1}
EXPORTED = ("id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time")  # Label Studio's JSON_MIN


# --- Argilla


def read_argilla(raw: Raw, how: Reading) -> Ranking | Thumb | Unjudged:
    """A record as Argilla exports it: `fields`, and the annotators' `responses` to its questions."""
    given = fields.mapping(raw, "fields", "the texts of the record")
    answers: dict[str, list[object]] = {}
    for name, value in _argilla_answers(raw.get("responses")):
        answers.setdefault(name, []).append(value)
    is_open = raw.get("status") in ("pending", "draft", "discarded")
    return _judged(given, "fields", {} if is_open else answers, how)


def _argilla_answers(responses: object) -> Iterator[tuple[str, object]]:
    """Questions with one annotator's answer: version 2 lists the answers by question, version 1 by annotator."""
    if isinstance(responses, Mapping):
        for name, items in responses.items():
            for item in items if isinstance(items, list) else ():
                if isinstance(item, Mapping):
                    yield str(name), item.get("value")
    for response in responses if isinstance(responses, list) else ():
        values = response.get("values") if isinstance(response, Mapping) else None
        if isinstance(values, Mapping) and response.get("status", "submitted") == "submitted":
            for name, item in values.items():
                yield str(name), item.get("value") if isinstance(item, Mapping) else item


RESPONSES = ".responses"


def is_flat_argilla(raw: Raw) -> bool:
    """Whether a row has the columns of Argilla's export to the Hub."""
    return any(str(name).endswith(RESPONSES) for name in raw)


def read_flat_argilla(raw: Raw, how: Reading) -> Ranking | Thumb | Unjudged:
    """A record as Argilla exports it to the Hub: a column for each field, `QUESTION.responses` for each question."""
    answers = {}
    for column in raw:
        if column.endswith(RESPONSES) and isinstance(values := raw[column], list):
            answers[column.removesuffix(RESPONSES)] = values
    names = [name for name in raw if name.startswith((*PROMPTS, *ANSWERS, "system")) and "." not in name]
    is_open = raw.get("status") in ("pending", "draft", "discarded")
    return _judged({name: raw[name] for name in names}, "the row", {} if is_open else answers, how)


# --- Label Studio


def read_label_studio(raw: Raw, how: Reading) -> Ranking | Thumb | Unjudged:
    """A task as Label Studio exports it to JSON: `data`, and the results of each annotation that was not skipped."""
    answers: dict[str, list[object]] = {}
    for annotation in fields.optional_list(raw, "annotations", "annotations"):
        if not isinstance(annotation, Mapping) or annotation.get("was_cancelled"):
            continue
        results = annotation.get("result")
        for result in results if isinstance(results, list) else ():
            if isinstance(result, Mapping) and isinstance(result.get("value"), Mapping):
                answers.setdefault(str(result.get("from_name")), []).append(_chosen(result["value"]))
    return _judged(fields.mapping(raw, "data", "the texts of the task"), "data", answers, how)


def _chosen(value: Raw) -> object:
    found = next((value[key] for key in ("selected", "choices", "rating", "number", "ranker") if key in value), value)
    return found[0] if isinstance(found, list) and len(found) == 1 else found


def read_label_studio_min(raw: Raw, how: Reading) -> Ranking | Thumb | Unjudged:
    """A task as Label Studio exports it to JSON_MIN: the texts and the verdict are columns."""
    texts = [name for name in raw if name.startswith((*PROMPTS, *ANSWERS, "system"))]
    verdicts = [name for name in raw if name not in texts and name not in EXPORTED]
    answers = {name: [_chosen(value) if isinstance(value := raw[name], Mapping) else value] for name in verdicts}
    return _judged({name: raw[name] for name in texts}, "the row", answers, how)


# --- Verdicts of both


def _judged(given: Raw, name: str, answers: Mapping[str, list[object]], how: Reading) -> Ranking | Thumb | Unjudged:
    """One text that got a thumb, or several that were compared, by the votes of all annotators."""
    asks = next((column for column in PROMPTS if column in given), None)
    if asks is None:
        raise BadField(f"{name} has no prompt: found {', '.join(map(str, given)) or 'nothing'}")
    texts = {str(key): value for key, value in given.items() if str(key).startswith(ANSWERS) and value is not None}
    read = {asks, *texts, "system", "system_prompt"}
    if left := [str(key) for key, value in given.items() if key not in read and not fields.is_missing(value)]:
        raise BadField(f"{name} has {', '.join(left)}, of which it is unknown whether they are part of the prompt")
    question = content(given, asks)
    prompt = opened(given, asked(question, how) if isinstance(question, str) else question, how)
    replies = {key: reply(item, how) for key, item in _contents(texts)}
    votes = _votes(answers, how)
    if not votes or not replies:
        return Unjudged(prompt, UNLABELLED)
    if len(replies) == 1:
        return _thumb(prompt, next(iter(replies.values())), votes, how)
    scores = dict.fromkeys(replies, 0.0)
    for vote in votes:
        for key, score in _scores(vote, list(replies)).items():
            scores[key] += score
    return Ranking(prompt, [(replies[key], score) for key, score in scores.items()], is_graded=False)


def _contents(texts: Raw) -> Iterator[tuple[str, Content]]:
    """The answers; a list of texts has several."""
    for name, value in texts.items():
        if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            yield from ((f"{name}-{place}", item) for place, item in enumerate(value, start=1))
        else:
            yield name, content(texts, name)


def _votes(answers: Mapping[str, list[object]], how: Reading) -> list[object]:
    """The answers to the question that --score-field names, or to the only one."""
    votes = {name: [value for value in values if not fields.is_missing(value)] for name, values in answers.items()}
    found = [name for name, values in votes.items() if values]
    if how.score_field is not None:
        return votes.get(how.score_field, [])
    if len(found) > 1:
        raise BadField(f"several questions were answered: {', '.join(found)}; choose one with --score-field")
    return votes[found[0]] if found else []


def _thumb(prompt: Content, answer: Content, votes: Iterable[object], how: Reading) -> Thumb | Unjudged:
    labels = [how.labels.read(vote, "the label") for vote in votes]
    balance = sum(1 if label else -1 for label in labels if label is not None)
    return Thumb(prompt, answer, balance > 0) if balance else Unjudged(prompt, TIED)


def _scores(vote: object, names: list[str]) -> dict[str, float]:
    """What a vote gives the answers it prefers, or each answer by its rank."""
    if isinstance(vote, list) and all(isinstance(item, Mapping) and "rank" in item for item in vote):
        return {names[_place(item.get("value"), names)]: -fields.number(item, "rank") for item in vote}
    if isinstance(vote, str) and vote.lower().startswith(TIES):
        return {}
    return {names[_place(vote, names)]: 1.0}


def _place(vote: object, names: list[str]) -> int:
    """The place of the answer that a vote names: by name, side, letter or number from 1."""
    word = str(vote).strip().lower() if isinstance(vote, str | int) and not isinstance(vote, bool) else ""
    known = {name.lower(): place for place, name in enumerate(names)}
    known |= {str(place + 1): place for place in range(len(names))}
    if len(names) == 2:
        known |= {side: place for side, place in SIDES.items() if side not in known}
    if word not in known:
        raise BadField(f"the verdict must be one of {', '.join(names)}, not {shorten(vote)}")
    return known[word]
