"""Proposes `--columns` for a row of an unknown format, by the names of its columns; rather none than a wrong one."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping

from perlcli.data.columns import MEANINGS, MEDIA, QUESTIONS, chosen, decoded
from perlcli.data.fields import BadField, SetAside, number_of
from perlcli.data.formats import detect
from perlcli.data.readers.reading import Reading
from perlcli.data.rows import Raw
from perlcli.data.uses import converted


def words_in(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


# What the words in a column's name say about it. The first target with a word of it has the column.
WORDS = {
    "system": "system",
    "chosen": "chosen better best preferred good winner winning accepted positive pos",
    "rejected": "rejected worse worst dispreferred bad loser losing negative neg",
    "score": "score reward",
    "label": "label rating thumb thumbs feedback verdict stars vote",
    "messages": "messages conversation chat dialog dialogue",
    "prompt": "prompt question query instruction input inputs ask asked request user problem",
    "completion": "completion answer response output reply assistant bot solution summary target targets",
    "text": "text document content body",
}
ONLY = {"q": "prompt", "a": "completion"}  # names of one letter; `model_a` is no answer
# The last word of columns about a row, and words of judgements that no option can name.
ABOUT = words_in("id ids index idx model name count type kind source url date time length tokens lang")
# Words of columns that are a thumb if they are true or false.
VERDICTS = words_in("safe correct acceptable accepted approved passed helpful desirable")
JUDGEMENTS = words_in("preference winner winning preferred better choice verdict judgement")
CHOICES = ("choices", "options")  # of a question
PAIRS = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))
JUDGED = (("prompt", "completion", "score"), ("prompt", "completion", "label"))
NEEDED = {
    "sft": (*PAIRS, *JUDGED, ("prompt", "completion"), ("messages",), ("text",)),
    "reward": (*PAIRS, *JUDGED),
    "rl": (("prompt",), ("messages",)),
}
PLAIN = re.compile(r"[\w.-]+")
SPACED = re.compile(r"""(?:[\w.=,-]|"[\w. -]*")+""")
LONGEST_LABEL = 30  # characters


def proposal(raw: Raw, use: str) -> str:
    """A `--columns` with which a row of an unknown format can be used, without losing a part of the question or of its
    judgement; empty if the names of its columns say too little."""
    found = candidates(raw)
    fitting = (names for names in NEEDED[use] if all(name in found for name in names))
    names = next(fitting, ())
    if "prompt" in names and "system" in found:
        names = ("system", *names)
    if not names or any(len(found[name]) > 1 for name in names):
        return ""
    columns = {name: found[name][0] for name in names}
    if left_out(raw, found, columns, use) or not _works(raw, columns, use):
        return ""
    given = ",".join(f"{name}={_quoted(column)}" for name, column in columns.items())
    # A shell removes quotes: enough where they only keep spaces together, but not around commas and its own signs.
    return f"--columns {given if SPACED.fullmatch(given) else shlex.quote(given)}"


def rivals(raw: Raw, use: str) -> str:
    """What to do about columns of which several may be the prompt or the completion; empty if there are none, or if a
    stage needs more than these."""
    found = candidates({name: value for name, value in raw.items() if not isinstance(value, Mapping)})
    answers, prompts = found.get("completion", []), found.get("prompt", [])
    if len(answers) > 1 and use != "rl" and len({SIDE.sub("", name) for name in answers}) == 1:
        way = "write them as chosen and rejected, the better one first, or name the better one in a column winner"
        return f"{_listed(answers)} be answers: {way}"
    is_enough = use != "reward" or "label" in found or "score" in found
    if len(answers) > 1 and use != "rl" and len(prompts) == 1 and is_enough:
        given = {"prompt": prompts[0], "completion": answers[0]}
        given |= {} if use == "sft" else {name: found[name][0] for name in ("score", "label") if name in found}
        columns = ",".join(f"{name}={_quoted(column)}" for name, column in given.items())
        return f"{_listed(answers)} be the answer: choose one, such as --columns {columns}"
    if len(prompts) > 1 and is_enough:
        return f"{_listed(prompts)} be parts of the prompt: join them into one column"
    return ""


SIDE = re.compile(r"[_ -]?(?:\d+|[a-zA-Z])$")  # what tells several answers apart


def _listed(columns: list[str]) -> str:
    return ", ".join(columns[:-1]) + f" and {columns[-1]} may " + ("both" if len(columns) == 2 else "all")


def _quoted(column: str) -> str:
    return column if PLAIN.fullmatch(column) else '"' + column + '"'


def candidates(raw: Raw) -> dict[str, list[str]]:
    """The columns, also nested ones, that by their names and values may be a prompt, an answer, a label and so on."""
    paths = {str(name): value for name, value in raw.items() if not isinstance(value, Mapping)}
    for name, value in raw.items():
        if isinstance(value, Mapping):
            paths |= {f"{name}.{key}": item for key, item in value.items() if not isinstance(item, Mapping)}
    found: dict[str, list[str]] = {}
    for path, value in list(paths.items())[:100]:
        words = _words(path)
        if words and words[-1] not in ABOUT and (name := _target(words, value)):
            found.setdefault(name, []).append(path)
    return found


def _words(path: str) -> list[str]:
    return re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", path).lower())


def _target(words: list[str], value: object) -> str:
    """What a column with these words in its name is; empty if that is unknown, or its value is of another kind."""
    if len(words) == 1 and words[0] in ONLY:
        return ONLY[words[0]]
    if isinstance(value, bool) and VERDICTS.intersection(words):
        return "label"
    names = [name for name, known in WORDS.items() if words_in(known).intersection(words)]
    judges = [name for name in names if name in ("score", "label")]
    if judges:
        is_of_one = "chosen" in names or "rejected" in names
        return "" if is_of_one else _judgement(judges[0], value)
    if not names or not isinstance(value, str | list):
        return ""
    if names[0] == "messages":
        turns = decoded(value)
        return "messages" if isinstance(turns, list) and turns and isinstance(turns[0], Mapping) else ""
    return names[0]


def _judgement(name: str, value: object) -> str:
    """Whether a column of this name has scores or labels: 0, 1, true and false are labels, other numbers scores."""
    if isinstance(value, str) and len(value) > LONGEST_LABEL:
        return ""
    if not isinstance(value, str | int | float):
        return ""
    is_thumb = isinstance(value, bool) or str(value) in ("0", "1", "-1")
    return "score" if name == "score" and not is_thumb and number_of(value) is not None else "label"


def left_out(raw: Raw, found: Mapping[str, list[str]], columns: Mapping[str, str], use: str) -> list[str]:
    """The columns that some other choice would read as a part of the question or of the judgement. Reward functions
    receive what `perl rl` leaves out, so there only the question counts."""
    named = ("system", "prompt") if use == "rl" else ("system", "prompt", "chosen", "rejected", "score", "label")
    others = [path for name in (*named, "messages") for path in found.get(name, [])]
    known = {*MEDIA, *QUESTIONS, *CHOICES, *(() if use == "rl" else MEANINGS)}
    others += [str(name) for name in raw if str(name).lower() in known or (use != "rl" and _is_verdict(str(name)))]
    return [path for path in others if path not in columns.values()]


def _is_verdict(path: str) -> bool:
    """Whether a column says which of several answers is better; a score of one of them does not."""
    words = _words(path)
    return bool(JUDGEMENTS.intersection(words)) and not {"score", "rating"}.intersection(words)


def _works(raw: Raw, columns: Mapping[str, str], use: str) -> bool:
    """Whether the row can be read with these columns; what its label means is a question for --label-map."""
    taken, *_ = chosen(raw, columns)
    if "label" in taken:
        taken["label"] = True
    known = detect(taken)
    if known is None or use not in known.uses:
        return False
    try:
        converted(known, taken, use, Reading(), {})
    except SetAside:
        return True
    except BadField:
        return False
    return True
