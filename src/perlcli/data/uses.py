"""What a row becomes for each stage: demonstrations for sft, pairs or thumbs for reward, prompts for rl."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, takewhile

from perlcli.data import fields
from perlcli.data.fields import BadField
from perlcli.data.formats import Format
from perlcli.data.readers.reading import ALONE, TIED, Reading
from perlcli.data.rows import Content, Demonstration, Preference, Prompt, Ranking, Raw, Row, Thumb, Unjudged, is_blank

Read = Row | Unjudged | Ranking
Made = Row | str  # a row for the stage, or the reason why there is none
DOWN = "with a thumbs down"
WORSE = "with a better answer to the same prompt"
WORSE_ANSWERS = ("rejected", "rejected_response")
VERDICTS = ("kto_tag", "label")  # columns that may have a thumb
# Columns that reward functions don't receive as extra ones: the prompt, its answers, and entire dialogs.
OWN = ("prompt", "completion", "chosen", "rejected", "utterances")


def converted(known: Format, raw: Raw, use: str, how: Reading, columns: Raw) -> list[Made]:
    """The rows that a row of the source becomes for a use, and the reasons for those that are left out; for rl with the
    source's `columns` for reward functions. Raises BadField for an error in the row."""
    read = known.read(raw, how)
    found = read if isinstance(read, list) else [read]
    if use == "rl":
        extra = {key: value for key, value in columns.items() if key not in OWN}
        return [_for_rl(item, extra) for item in (found[:1] if known.key else found)]
    if use == "sft" and (why := _refused(found, raw, how, columns)):
        return [why] * len(found)
    if use == "reward" and any(name in columns and fields.is_null(columns[name]) for name in WORSE_ANSWERS):
        found = [Unjudged(item.prompt, ALONE) if isinstance(item, Preference) else item for item in found]
    made = _for_sft if use == "sft" else _for_reward
    return [row for item in found for row in made(item, how)]


def _refused(rows: Sequence[Read], raw: Raw, how: Reading, columns: Raw) -> str:
    """Why demonstrations are not imitated, by a thumb in a column that their format doesn't have; else empty."""
    if not all(isinstance(row, Demonstration) and not _is_text(row) for row in rows):
        return ""
    name = next((name for name in VERDICTS if name in raw and how.labels.knows(columns[name])), None)
    if name is None:
        return ""
    is_up = how.labels.read(raw[name], name)
    if is_up is None:
        return fields.UNLABELLED
    return "" if is_up else DOWN


def _is_text(row: Demonstration) -> bool:
    """Whether a row is a complete text, whose label is often its class."""
    return row.prompt is None and isinstance(row.completion, str)


def _for_sft(row: Read, how: Reading) -> Iterator[Made]:
    """A demonstration as it is, the chosen completion of a preference, a completion with a thumbs up, the best answer
    of a ranking."""
    if isinstance(row, Unjudged):
        yield row.why
    elif isinstance(row, Preference):
        yield Demonstration(row.prompt, row.chosen, row.template)
    elif isinstance(row, Thumb):
        yield Demonstration(row.prompt, row.completion, row.template) if row.label else DOWN
    elif isinstance(row, Ranking):
        yield from _best(row, how)
    elif isinstance(row, Prompt):
        raise BadField("summary is missing or null: there is nothing to imitate")  # only in the format tldr
    else:
        yield row


def _best(row: Ranking, how: Reading) -> Iterator[Made]:
    if how.labels.threshold is not None and row.is_graded:
        for thumb in _thumbs(row, how.labels.threshold):
            yield from _for_sft(thumb, how)
        return
    best = max(score for _, score in row.answers)
    first = next(place for place, (_, score) in enumerate(row.answers) if score == best)
    for place, (answer, _) in enumerate(row.answers):
        yield Demonstration(row.prompt, answer, row.template) if place == first else WORSE


def _thumbs(row: Ranking, threshold: float) -> Iterator[Thumb]:
    for answer, score in row.answers:
        yield Thumb(row.prompt, answer, score >= threshold, row.template)


def _for_reward(row: Read, how: Reading) -> Iterator[Made]:
    if isinstance(row, Unjudged):
        yield row.why
    elif isinstance(row, Preference):
        yield "with equal answers" if _same(row.chosen, row.rejected) else row
    elif isinstance(row, Ranking):
        yield from _pairs(row, how)
    elif isinstance(row, Demonstration):
        yield fields.UNLABELLED  # only in the format android-control
    else:
        yield row


def _same(one: Content, other: Content) -> bool:
    """Whether two answers are equal but for white space around them."""
    if isinstance(one, str) or isinstance(other, str):
        return str(one).strip() == str(other).strip()
    return [{**turn, "content": (turn["content"] or "").strip()} for turn in one] == [
        {**turn, "content": (turn["content"] or "").strip()} for turn in other
    ]


def _pairs(row: Ranking, how: Reading) -> Iterator[Made]:
    """All pairs of a ranking, or that of the best and the worst answer; or thumbs by --label-threshold."""
    if how.labels.threshold is not None and row.is_graded:
        yield from _thumbs(row, how.labels.threshold)
        return
    ordered = sorted(row.answers, key=lambda answer: -answer[1])
    if len(ordered) < 2:
        yield ALONE
        return
    pairs = [(ordered[0], ordered[-1])] if how.best_worst else list(combinations(ordered, 2))
    # Without grades, answers of the same kind are no ties: they were not compared.
    is_tie = row.is_graded or ordered[0][1] == ordered[-1][1]
    for (better, high), (worse, low) in pairs:
        if high > low:
            yield from _for_reward(Preference(row.prompt, better, worse, template=row.template), how)
        elif is_tie:
            yield TIED


def _for_rl(row: Read, extra: Mapping[str, object]) -> Made:
    """Only the prompt: the row's own, a conversation without its last answer, or the common start of two texts."""
    prompt = row.prompt
    if prompt is None and isinstance(row, Demonstration) and not isinstance(row.completion, str):
        prompt = row.completion[:-1] if row.completion[-1]["role"] == "assistant" else row.completion
    if prompt is None and isinstance(row, Preference) and isinstance(row.chosen, str):
        prompt = _common_start(row.chosen, str(row.rejected)) or None
    if prompt is None or prompt == []:
        raise BadField("no prompt to answer")
    return "with an empty prompt" if is_blank(prompt) else Prompt(prompt, dict(extra), row.template)


def has_prompt(row: Read) -> bool:
    """Whether rl could take a prompt from a row."""
    try:
        return isinstance(_for_rl(row, {}), Prompt)
    except BadField:
        return False


def _common_start(one: str, other: str) -> str:
    """What two texts start with in common, up to the last complete word; TRL's implicit prompt may end inside one."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    start = "".join(letter for letter, _ in same)
    end = len(start)
    while end and not start[end - 1].isspace():
        end -= 1
    return start[:end].rstrip()
