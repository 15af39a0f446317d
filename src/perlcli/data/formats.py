"""The known formats: how each is recognised by its columns, and what its rows become for each stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile

from perlcli.data import fields, published
from perlcli.data.fields import BadField, SetAside
from perlcli.data.rows import Content, Demonstration, Preference, Prompt, Raw, Row, Thumb, Unjudged, is_blank
from perlcli.errors import PerlError
from perlcli.text import clip, markdown_table

ALL = frozenset({"sft", "reward", "rl"})
ANSWERS = frozenset({"sft", "rl"})

# The columns that each stage accepts, for the error about a file with others.
NEEDS = {
    "sft": "prompt and completion, messages, or text",
    "reward": "chosen and rejected (prompt optional), or prompt, completion and label",
    "rl": "prompt (or any format that has one: prompt and completion, chosen and rejected, messages)",
}


# --- TRL's formats, standard and conversational (https://huggingface.co/docs/trl/dataset_formats)


def read_pair(raw: Raw, chat: bool) -> Preference:
    """A preference; if the row has no prompt, the turns that both conversations start with are the prompt."""
    chosen, rejected = fields.content(raw, "chosen"), fields.content(raw, "rejected")
    prompt = fields.content(raw, "prompt") if raw.get("prompt") is not None else None
    if prompt is not None and not _repeats(prompt, chosen, rejected):
        fields.same_kind(prompt, chosen, rejected)
        return Preference(prompt, chosen, rejected)
    fields.same_kind(chosen, rejected)
    if isinstance(chosen, str) or isinstance(rejected, str):
        return Preference(None, chosen, rejected)
    start = fields.shared(chosen[:-1], rejected[:-1])
    while start and chosen[start - 1]["role"] == "assistant":
        start -= 1  # a completion starts with the assistant's turn
    return Preference(chosen[:start] or None, chosen[start:], rejected[start:])


def _repeats(prompt: Content, *conversations: Content) -> bool:
    """Whether both conversations start with the prompt's text, as in HuggingFaceH4/ultrafeedback_binarized."""
    return isinstance(prompt, str) and all(
        not isinstance(turns, str) and any(turn["content"].strip() == prompt.strip() for turn in turns[:2])
        for turns in conversations
    )


def read_thumb(raw: Raw, chat: bool) -> Thumb | Unjudged:
    """A completion with its label."""
    prompt, completion = fields.content(raw, "prompt"), fields.content(raw, "completion")
    fields.same_kind(prompt, completion)
    return fields.thumb(prompt, completion, raw)


def read_demonstration(raw: Raw, chat: bool) -> Row:
    """A prompt and the completion to imitate."""
    prompt, completion = fields.content(raw, "prompt"), fields.content(raw, "completion")
    fields.same_kind(prompt, completion)
    return Demonstration(prompt, completion)


def read_messages(raw: Raw, chat: bool) -> Row:
    """A complete conversation."""
    return Demonstration(None, fields.messages(fields.need(raw, "messages", "a list of messages"), "messages"))


def read_text(raw: Raw, chat: bool) -> Row:
    """A complete text."""
    return Demonstration(None, fields.text(raw, "text"))


def read_prompt(raw: Raw, chat: bool) -> Row:
    """A prompt to answer."""
    return Prompt(fields.content(raw, "prompt"))


# --- All formats


@dataclass(frozen=True)
class Format:
    """A format: its name and columns, the stages it serves, its reader, and what else distinguishes it from others."""

    name: str
    columns: tuple[str, ...]
    uses: frozenset[str]
    read: Callable[[Raw, bool], Row | Unjudged | list[Row]]
    what: str  # for the documentation
    is_it: Callable[[Raw], bool] = lambda raw: True


# In the order in which they are tried: the first that fits is the format.
FORMATS = (
    Format(
        "hh",
        ("chosen", "rejected"),
        ALL,
        published.read_hh,
        "Anthropic HH: texts of `\\n\\nHuman: …` and `\\n\\nAssistant: …`",
        lambda raw: "prompt" not in raw and published.is_hh(raw["chosen"]),
    ),
    Format("pairs", ("chosen", "rejected"), ALL, read_pair, "preferences, with or without `prompt`"),
    Format(
        "shp",
        ("history", "human_ref_A", "human_ref_B", "labels"),
        ALL,
        published.read_shp,
        "Stanford Human Preferences, SHP-2; see `--shp-score-ratio`, `--shp-per-post`",
    ),
    Format(
        "summarize-from-feedback",
        ("info", "summaries", "choice"),
        ALL,
        published.read_comparison,
        "OpenAI's TL;DR comparisons",
    ),
    Format(
        "taskmaster",
        ("context", "generation", "reward"),
        ALL,
        published.read_taskmaster,
        "Taskmaster `reward_*.json`: thumbs on the agent's next action",
    ),
    Format("thumbs", ("prompt", "completion", "label"), ALL, read_thumb, "thumbs: 0/1, true/false"),
    Format(
        "android-control",
        ("action",),
        ALL,
        published.read_android,
        "AndroidControl steps as text: `goal` or `instruction`, `history`, `screen`, `label`",
        lambda raw: "goal" in raw or "instruction" in raw,
    ),
    Format("prompt-completion", ("prompt", "completion"), ANSWERS, read_demonstration, "demonstrations"),
    Format("messages", ("messages",), ANSWERS, read_messages, "conversations"),
    Format("sharegpt", ("conversations",), ANSWERS, published.read_sharegpt, "conversations with `from` and `value`"),
    Format(
        "taskmaster-dialogs",
        ("utterances",),
        ANSWERS,
        published.read_dialog,
        "Taskmaster dialogs: each action of the agent becomes a row",
    ),
    Format("alpaca", ("instruction", "output"), ANSWERS, published.read_alpaca, "instructions, some with `input`"),
    Format("tldr", ("subreddit", "title", "post"), ANSWERS, published.read_tldr, "Reddit posts; `summary` for sft"),
    Format(
        "prompts", ("prompt",), frozenset({"rl"}), read_prompt, "prompts; other columns are passed to reward functions"
    ),
    Format("text", ("text",), frozenset({"sft"}), read_text, "complete texts"),
)
NAMES = {known.name: known for known in FORMATS}


def detect(raw: Raw) -> Format | None:
    """The format of a row, by its columns; None if none fits."""
    return next((known for known in FORMATS if set(known.columns) <= set(raw) and known.is_it(raw)), None)


def choose(raw: Raw, use: str, source: str, name: str | None) -> Format:
    """The format with this name, else that of `raw`, the first row of a source. Raises PerlError if it does not serve
    the use."""
    columns = clip(", ".join(map(str, raw)), 300) or "none"
    serving = ", ".join(known.name for known in FORMATS if use in known.uses)
    hint = f"formats for perl {use}: {serving}; the README's Data section lists their columns"
    if name is None:
        known = detect(raw)
        if known is None or use not in known.uses:
            raise PerlError(f"{source} has the columns {columns}; `perl {use}` needs {NEEDS[use]}", hint)
        return known
    known = NAMES[name]
    if use not in known.uses:
        raise PerlError(f"--data-format {name} does not work with `perl {use}`, which needs {NEEDS[use]}", hint)
    if not set(known.columns) <= set(raw):
        problem = f"--data-format {name} needs the columns {', '.join(known.columns)}; {source} has {columns}"
        other = detect(raw)
        raise PerlError(problem, f"it looks like {other.name}; leave out --data-format" if other else hint)
    return known


def converted(known: Format, raw: Raw, use: str, chat: bool) -> list[Row]:
    """The rows that a row of the source becomes for a use. Raises BadField for an error in it, and SetAside if the use
    has no use for it."""
    read = known.read(raw, chat)
    return [USES[use](row, raw) for row in (read if isinstance(read, list) else [read])]


def _for_sft(row: Row | Unjudged, raw: Raw) -> Row:
    """A demonstration as it is, the chosen completion of a preference, or a completion with a thumbs up."""
    if isinstance(row, Unjudged):
        raise SetAside(row.why)
    if isinstance(row, Preference):
        return Demonstration(row.prompt, row.chosen)
    if isinstance(row, Thumb):
        if not row.label:
            raise SetAside("with a thumbs down")
        return Demonstration(row.prompt, row.completion)
    if isinstance(row, Prompt):
        raise BadField("summary is missing or null: there is nothing to imitate")  # only in the format tldr
    return row


def _for_reward(row: Row | Unjudged, raw: Raw) -> Row:
    if isinstance(row, Unjudged):
        raise SetAside(row.why)
    if isinstance(row, Preference) and row.chosen == row.rejected:
        raise SetAside("with equal answers")
    if isinstance(row, Demonstration):
        raise SetAside(fields.UNLABELLED)  # only in the format android-control
    return row


# Columns that reward functions don't receive as extra ones: the prompt, its answers, and entire dialogs.
OWN = ("prompt", "completion", "chosen", "rejected", "utterances")


def _for_rl(row: Row | Unjudged, raw: Raw) -> Row:
    """Only the prompt: the row's own, a conversation without its last answer, or the common start of two texts."""
    prompt = row.prompt
    if prompt is None and isinstance(row, Demonstration) and not isinstance(row.completion, str):
        prompt = row.completion[:-1] if row.completion[-1]["role"] == "assistant" else row.completion
    if prompt is None and isinstance(row, Preference) and isinstance(row.chosen, str):
        prompt = _common_start(row.chosen, str(row.rejected)) or None
    if prompt is None or prompt == []:
        raise BadField("no prompt to answer")
    if is_blank(prompt):
        raise SetAside("with an empty prompt")
    return Prompt(prompt, {key: value for key, value in raw.items() if key not in OWN})


def _common_start(one: str, other: str) -> str:
    """What two texts start with in common, up to the last complete word; TRL's implicit prompt may end inside one."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    start = "".join(letter for letter, _ in same)
    end = len(start)
    while end and not start[end - 1].isspace():
        end -= 1
    return start[:end].rstrip()


USES: dict[str, Callable[[Row | Unjudged, Raw], Row]] = {"sft": _for_sft, "reward": _for_reward, "rl": _for_rl}


def table() -> str:
    """The formats as a Markdown table, for the documentation."""
    rows = []
    for known in sorted(FORMATS, key=lambda item: (item.read.__module__ != __name__, item.name)):
        columns = ", ".join(f"`{column}`" for column in known.columns)
        uses = ", ".join(use for use in USES if use in known.uses)
        rows.append((f"`{known.name}`", columns, known.what, uses))
    return markdown_table(("`--data-format`", "columns", "rows", "for"), rows)
