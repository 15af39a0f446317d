"""The known formats: how each is recognised by its columns, and what its rows become for each stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import takewhile

from perlcli.data import published, standard
from perlcli.data.fields import BadField, SetAside
from perlcli.data.rows import (
    DataReport,
    Demonstration,
    Preference,
    Prompt,
    Raw,
    Row,
    SourceRow,
    Thumb,
    Unjudged,
    is_blank,
)
from perlcli.errors import PerlError, nearest
from perlcli.text import clip, counted, markdown_table, shorten

SHOWN_FAULTS = 10
ALL = frozenset({"sft", "reward", "rl"})
ANSWERS = frozenset({"sft", "rl"})

# The columns that each stage accepts, for the error about a file with others.
NEEDS = {
    "sft": "prompt and completion, messages, or text",
    "reward": "chosen and rejected (prompt optional), or prompt, completion and label",
    "rl": "prompt (or any format that has one: prompt and completion, chosen and rejected, messages)",
}


@dataclass(frozen=True)
class Format:
    """A format: its name and columns, the stages it serves, its reader, and what else distinguishes it from others."""

    name: str
    columns: tuple[str, ...]
    uses: frozenset[str]
    read: Callable[[Raw, bool], Row | Unjudged | list[Row]]
    what: str  # for the documentation
    is_it: Callable[[Raw], bool] = lambda raw: True

    def fits(self, raw: Raw) -> bool:
        """Whether a row is in this format, by its columns and `is_it`."""
        return set(self.columns) <= set(raw) and self.is_it(raw)


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
    Format("pairs", ("chosen", "rejected"), ALL, standard.read_pair, "preferences, with or without `prompt`"),
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
    Format("thumbs", ("prompt", "completion", "label"), ALL, standard.read_thumb, "thumbs: 0/1, true/false"),
    Format(
        "android-control",
        ("action",),
        ALL,
        published.read_android,
        "AndroidControl steps as text: `goal` or `instruction`, `history`, `screen`, `label`",
        lambda raw: "goal" in raw or "instruction" in raw,
    ),
    Format("prompt-completion", ("prompt", "completion"), ANSWERS, standard.read_demonstration, "demonstrations"),
    Format("messages", ("messages",), ANSWERS, standard.read_messages, "conversations"),
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
        "prompts",
        ("prompt",),
        frozenset({"rl"}),
        standard.read_prompt,
        "prompts; other columns are passed to reward functions",
    ),
    Format("text", ("text",), frozenset({"sft"}), standard.read_text, "complete texts"),
)
NAMES = {known.name: known for known in FORMATS}


@dataclass
class Faults:
    """Rows of a source with errors: the first ten messages, and how many there are."""

    shown: list[str] = field(default_factory=list)
    count: int = 0
    is_misfit: bool = False  # whether some rows could be read, but not in the format
    hint: str = ""

    def add(self, text: str, *, is_misfit: bool = False) -> None:
        """Count a row with an error."""
        self.count += 1
        self.is_misfit = self.is_misfit or is_misfit
        if self.count <= SHOWN_FAULTS:
            self.shown.append(text)

    def check(self) -> None:
        """Raises PerlError with the messages if there are any."""
        if not self.count:
            return
        lines = list(self.shown)
        if self.count > SHOWN_FAULTS:
            lines.append(f"… and {counted(self.count - SHOWN_FAULTS, 'more row')}")
        raise PerlError("\n".join(lines), self.hint if self.is_misfit else "")


def detect(raw: Raw) -> Format | None:
    """The format of a row, by its columns; None if none fits."""
    return next((known for known in FORMATS if known.fits(raw)), None)


def named(name: str) -> Format:
    """The format with this name. Raises PerlError if there is none."""
    if name not in NAMES:
        known = ", ".join(NAMES)
        raise PerlError(f"--data-format must be one of {known}, not {shorten(name)}", nearest(name, NAMES))
    return NAMES[name]


class Converter:
    """Turns the rows of a source into rows for `use` ("sft", "reward" or "rl").

    The format is the one with this name, else that of the first row. `chat` says whether conversations can be rendered;
    `limit` raises SetAside for rows of SHP that are not wanted.
    """

    def __init__(
        self, use: str, source: str, *, chat: bool, name: str | None = None, limit: Callable[[Raw], None] | None = None
    ) -> None:
        self.use, self.chat, self.name, self.limit = use, chat, name, limit
        self.report = DataReport(source, "")
        self.faults = Faults()
        self._known: Format | None = None

    def take(self, number: int, item: SourceRow) -> list[Row]:
        """The rows that a row of the source becomes: none if it is dropped or has an error, both of which are counted.
        Raises PerlError for the first row if its format does not serve the use."""
        if item.raw is None:
            self.faults.add(f"{item.place}: {item.fault}")
            return []
        if self._known is None:
            self._known = _format(item.raw, self.use, self.report.source, self.name)
            self.report.format = self._known.name
            self.faults.hint = f"the data was read as {self._known.name}; use --data-format for another format"
        try:
            if self.limit is not None and self._known.name == "shp":
                self.limit(item.raw)
            rows = list(_rows(self._known, item.raw, self.use, self.chat))
        except SetAside as reason:
            self.report.take()
            self.report.drop(str(reason), number)
        except BadField as fault:
            self.faults.add(f"{item.place}: {fault}", is_misfit=True)
        else:
            self.report.take(len(rows))
            return rows
        return []


def _format(raw: Raw, use: str, source: str, name: str | None) -> Format:
    """The format for all rows of a source, by its first row. Raises PerlError if there is none for the use."""
    columns = clip(", ".join(map(str, raw)), 300) or "none"
    serving = ", ".join(known.name for known in FORMATS if use in known.uses)
    hint = f"formats for perl {use}: {serving}; the README's Data section lists their columns"
    if name is None:
        known = detect(raw)
        if known is None or use not in known.uses:
            raise PerlError(f"{source} has the columns {columns}; `perl {use}` needs {NEEDS[use]}", hint)
        return known
    known = named(name)
    if use not in known.uses:
        raise PerlError(f"--data-format {name} does not work with `perl {use}`, which needs {NEEDS[use]}", hint)
    missing = [column for column in known.columns if column not in raw]
    if missing:
        other = detect(raw)
        likely = f"it looks like {other.name}; leave out --data-format" if other else hint
        raise PerlError(
            f"--data-format {name} needs the columns {', '.join(known.columns)}; {source} has {columns}", likely
        )
    return known


def _rows(known: Format, raw: Raw, use: str, chat: bool) -> Iterator[Row]:
    made = known.read(raw, chat)
    for row in made if isinstance(made, list) else [made]:
        yield USES[use](row, raw)


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
        raise SetAside(standard.UNLABELLED)  # only in the format android-control
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
    """The formats as a Markdown table, for the README."""
    rows = []
    for known in sorted(FORMATS, key=lambda item: (item.read.__module__ != standard.__name__, item.name)):
        columns = ", ".join(f"`{column}`" for column in known.columns)
        uses = ", ".join(use for use in USES if use in known.uses)
        rows.append((f"`{known.name}`", columns, known.what, uses))
    return markdown_table(("`--data-format`", "columns", "rows", "for"), rows)
