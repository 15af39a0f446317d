"""The kinds of rows, and the report of what became of the rows of one source."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from perlcli.text import clip, counted

Raw = Mapping[str, object]  # a row's columns, as its source has them
# A message of a conversation: role, content, and what else chat templates read (tool_calls, name, reasoning_content …).
Message = dict[str, Any]
Content = str | list[Message]  # plain text, or the messages of a conversation
Template = dict[str, Any]  # what a row passes to the chat template: tools, enable_thinking …


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A completion to imitate; without a prompt, the completion is the entire text or conversation."""

    prompt: Content | None
    completion: Content
    template: Template = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Preference:
    """Two completions of one prompt, the preferred one first; without a prompt, two complete texts or conversations."""

    prompt: Content | None
    chosen: Content
    rejected: Content
    margin: float | None = None  # how much better the chosen one is, which the loss takes into account
    template: Template = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Thumb:
    """A completion that got a thumbs up (True) or a thumbs down (False)."""

    prompt: Content
    completion: Content
    label: bool
    template: Template = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt to answer; `extra` has the row's other columns, which reward functions receive by name."""

    prompt: Content
    extra: dict[str, object] = field(default_factory=dict)
    template: Template = field(default_factory=dict)


def with_all_columns(rows: Sequence[Prompt]) -> list[Prompt]:
    """The rows with the same columns in each, None where a row has none, as `datasets` has them: a reward function sees
    a column in every batch or in none."""
    names = dict.fromkeys(name for row in rows for name in row.extra)
    return [replace(row, extra=dict.fromkeys(names) | row.extra) for row in rows]


Row = Demonstration | Preference | Thumb | Prompt


@dataclass(frozen=True, slots=True)
class Unjudged:
    """A prompt whose completions have no verdict, with the reason: only the prompt is of use."""

    prompt: Content | None
    why: str
    template: Template = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ranking:
    """Answers to one prompt, each with its score: the higher, the better."""

    prompt: Content
    answers: list[tuple[Content, float]]
    template: Template = field(default_factory=dict)
    is_graded: bool = True  # whether the scores are on a scale of their own, and not only an order


def says_nothing(message: Message) -> bool:
    """Whether a message has neither text nor tool calls."""
    return not (message["content"] or "").strip() and not message.get("tool_calls")


def is_blank(content: Content) -> bool:
    """Whether a content is empty or only white space, without tool calls."""
    return not content.strip() if isinstance(content, str) else all(map(says_nothing, content))


def is_empty(row: Row) -> bool:
    """Whether the completion is blank, or one of the turns in it that are learned; of a pair only the chosen one
    counts, as an empty answer can be the worse."""
    if isinstance(row, Prompt):
        return False
    completion = row.chosen if isinstance(row, Preference) else row.completion
    return is_blank(completion) or any(map(says_nothing, learned_turns(completion)))


def learned_turns(content: Content) -> list[Message]:
    """The assistant's turns of a conversation, without those of weight 0; empty for a text."""
    turns = [] if isinstance(content, str) else content
    return [turn for turn in turns if turn["role"] == "assistant" and turn.get("weight") != 0]


def text_of(content: Content) -> str:
    """A content as one readable text, for samples."""
    if isinstance(content, str):
        return content
    if len(content) == 1:
        return _said(content[0])
    return "\n".join(f"{message['role']}: {_said(message)}" for message in content)


def _said(message: Message) -> str:
    calls = message.get("tool_calls") or []
    shown = [json.dumps(call.get("function", call), ensure_ascii=False, default=str) for call in calls]
    return "\n".join([*([message["content"]] if message["content"] else []), *shown])


def completions(row: Row) -> list[Content]:
    """A row's completions, in order."""
    if isinstance(row, Preference):
        return [row.chosen, row.rejected]
    return [] if isinstance(row, Prompt) else [row.completion]


Numbers = list[int]  # of rows in their source, from 1
SHOWN_ROWS, KEPT_ROWS = 3, 10
LONGEST_LIST = 600  # characters of the names of columns


@dataclass(frozen=True, slots=True)
class SourceRow:
    """A row as its source has it and its place there; `raw` is None if it can't be read, and `fault` says why."""

    place: str
    raw: Raw | None
    fault: str = ""
    count: int = 1  # rows of the source that it was put together from
    rest: Raw = field(default_factory=dict)  # columns that --columns leaves out
    renamed: Raw = field(default_factory=dict)  # the completion that it reads, under its own name


@dataclass
class DataReport:
    """What became of the rows of one source: every row that is dropped, truncated or repeated is counted."""

    source: str
    format: str
    read: int = 0
    kept: int = 0
    fingerprint: str = ""
    held_out: int = 0  # set aside by --eval-fraction, or by default
    serves: tuple[str, ...] = ()  # the stages that all rows can be used for
    dropped: dict[str, Numbers] = field(default_factory=dict)  # by reason
    truncated: Numbers = field(default_factory=list)
    repeated: Numbers = field(default_factory=list)  # kept rows that equal an earlier one
    overlap: Numbers = field(default_factory=list)  # held-out rows whose prompt is also trained on
    labels: dict[str, int] = field(default_factory=dict)  # number of thumbs up and down
    tokens: dict[str, int] = field(default_factory=dict)  # percentiles of row lengths, before any row was dropped
    unused: tuple[str, ...] = ()  # columns that nothing reads
    unused_keys: tuple[str, ...] = ()  # keys of messages that nothing reads
    template_keys: tuple[str, ...] = ()  # keys of messages that a chat template may read
    passed: tuple[str, ...] = ()  # columns that only reward functions receive
    rendered: list[str] = field(default_factory=list)  # the ways in which rows became tokens
    findings: dict[str, Numbers] = field(default_factory=dict)  # what to know about the tokens of some rows
    # Of `read`, as a dialog becomes several rows: those beyond the first. Below 0 where rows were put together.
    extra: int = 0

    def take(self, count: int = 1, sources: int = 1) -> None:
        """Count the rows that some rows of the source became."""
        self.extra += count - sources
        self.read += count
        self.kept += count

    def drop(self, reason: str, number: int) -> None:
        """Count a row as dropped."""
        self.dropped.setdefault(reason, []).append(number)
        self.kept -= 1

    def line(self) -> str:
        """How many rows were read, kept and dropped, in one line for the terminal."""
        text = f"{self.source}: {self.format}, {counted(self.read, 'row')} read"
        if self.extra:
            text += f" from {counted(self.read - self.extra, 'source row')}"
        text += f", {self.kept:,} kept"
        if self.held_out:
            text += f", {self.held_out:,} held out for evaluation"
        for reason, numbers in self.dropped.items():
            text += f"; dropped {len(numbers):,} {reason} ({_first(numbers)})"
        return text

    def lines(self) -> list[str]:
        """The full report for the terminal: `line`, then one line for each other finding."""
        report = [self.line(), *self.rendered]
        report += [
            f"{counted(len(numbers), 'row')}: {text} ({_first(numbers)})" for text, numbers in self.findings.items()
        ]
        if self.tokens:
            report.append("tokens per row: " + ", ".join(f"{name} {length:,}" for name, length in self.tokens.items()))
        report += self.columns()
        if self.truncated:
            report.append(f"{counted(len(self.truncated), 'prompt')} cut from the left ({_first(self.truncated)})")
        if self.labels:
            up, down = self.labels["up"], self.labels["down"]
            report.append(f"{up:,} thumbs up, {down:,} thumbs down ({up / max(1, up + down):.1%} up)")
        if self.repeated:
            report.append(f"{counted(len(self.repeated), 'duplicate row')} kept ({_first(self.repeated)})")
        if self.overlap:
            report.append(
                f"Warning: {counted(len(self.overlap), 'held-out row')} with a prompt that is also in the training "
                f"data, so scores will look too good ({_first(self.overlap)})"
            )
        return report

    def columns(self) -> list[str]:
        """The columns and keys of messages that nothing reads, and the columns that only reward functions receive."""
        lists = {
            "columns not used": self.unused,
            "message keys not used": self.unused_keys,
            "columns passed to reward functions": self.passed,
        }
        return [
            f"{what}: {clip(', '.join(map(quoted, names)), LONGEST_LIST)}" for what, names in lists.items() if names
        ]

    def summary(self) -> dict[str, object]:
        """The report as the run's record keeps it."""
        record = {name: _counted(value) if isinstance(value, list) else value for name, value in vars(self).items()}
        for name, groups in (("dropped", self.dropped), ("findings", self.findings)):
            record[name] = {reason: _counted(numbers) for reason, numbers in groups.items()}
        record["rendered"] = self.rendered
        del record["extra"], record["template_keys"]
        return record


def quoted(name: str) -> str:
    """The name of a column, in quotes if it would not be seen without."""
    return name if name.strip() else repr(name)


def _first(numbers: Numbers) -> str:
    distinct = list(dict.fromkeys(numbers))  # the rows of one dialog share its number
    rest = "…" if len(distinct) > SHOWN_ROWS else ""
    return ("row " if len(distinct) == 1 else "rows ") + ", ".join(map(str, distinct[:SHOWN_ROWS])) + rest


def _counted(numbers: Numbers) -> dict[str, object]:
    return {"count": len(numbers), "first_rows": numbers[:KEPT_ROWS]}


@dataclass
class Data:
    """Rows of one kind, and the report of what became of the source's rows."""

    rows: list[Row]
    numbers: Numbers  # each row's number in its source
    report: DataReport
