"""What a row of data is, once its format is understood."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from perlcli.text import counted

Raw = Mapping[str, Any]  # a row as its source has it
Message = dict[str, str]
Content = str | list[Message]  # plain text, or the messages of a conversation


@dataclass(frozen=True, slots=True)
class Demonstration:
    """Something to imitate: the completion after its prompt, or all of it where there is no prompt."""

    prompt: Content | None
    completion: Content


@dataclass(frozen=True, slots=True)
class Preference:
    """Two completions of one prompt, of which the first was preferred; without a prompt, two whole texts."""

    prompt: Content | None
    chosen: Content
    rejected: Content


@dataclass(frozen=True, slots=True)
class Thumb:
    """A completion that got a thumbs up (True) or down (False)."""

    prompt: Content
    completion: Content
    label: bool


@dataclass(frozen=True, slots=True)
class Prompt:
    """Something to answer; the row's other columns go to reward functions by their names."""

    prompt: Content
    extra: dict[str, Any] = field(default_factory=dict)


Row = Demonstration | Preference | Thumb | Prompt


@dataclass(frozen=True, slots=True)
class Unjudged:
    """A prompt whose answers nobody told apart, and why: of use as a prompt alone."""

    prompt: Content
    why: str


def is_blank(content: Content) -> bool:
    """Whether a content says nothing."""
    texts = [content] if isinstance(content, str) else [message["content"] for message in content]
    return not any(text.strip() for text in texts)


def completions(row: Row) -> list[Content]:
    """A row's completions, in order."""
    if isinstance(row, Preference):
        return [row.chosen, row.rejected]
    return [] if isinstance(row, Prompt) else [row.completion]


Numbers = list[int]  # of rows in their source, from 1
SHOWN_ROWS, KEPT_ROWS = 3, 10


@dataclass(frozen=True, slots=True)
class Found:
    """A row as its source has it, and where it stands there; where it can't be read, what is wrong with it."""

    place: str
    raw: Raw | None
    fault: str = ""


@dataclass
class DataReport:
    """What became of the rows of one source: nothing is left out, cut or repeated without a count."""

    source: str
    format: str
    read: int = 0
    kept: int = 0
    extra: int = 0  # of those read: beyond the first that a row of the source, a dialog, became
    fingerprint: str = ""
    dropped: dict[str, Numbers] = field(default_factory=dict)  # by reason
    repeated: Numbers = field(default_factory=list)  # kept rows that equal an earlier one
    truncated: Numbers = field(default_factory=list)
    overlap: Numbers = field(default_factory=list)  # held-out rows whose prompt is trained on
    held_out: int = 0  # set aside by --eval-fraction
    labels: dict[str, int] = field(default_factory=dict)  # thumbs: how many up, how many down
    tokens: dict[str, int] = field(default_factory=dict)  # percentiles of the rows' lengths, before any was left out

    def take(self, count: int = 1) -> None:
        """Count the rows in that a row of the source became."""
        self.extra += max(0, count - 1)
        self.read += count
        self.kept += count

    def drop(self, reason: str, number: int) -> None:
        """Count a row out."""
        self.dropped.setdefault(reason, []).append(number)
        self.kept -= 1

    def line(self) -> str:
        """What was read and what is left, in one line for the terminal."""
        text = f"{self.source}: {self.format}, {self.kept:,} of {counted(self.read, 'row')}"
        if self.extra:
            text += f" (of {self.read - self.extra:,} in the source)"
        if self.held_out:
            text += f"; {self.held_out:,} held out for evaluation"
        for reason, numbers in self.dropped.items():
            text += f"; left out {len(numbers):,} {reason} ({_shown(numbers)})"
        return text

    def lines(self) -> list[str]:
        """The whole report for the terminal: `line`, and a line for each thing else that was found."""
        found = [self.line()]
        if self.tokens:
            found.append("tokens a row: half up to {p50:,}, 90 % up to {p90:,}, 99 % up to {p99:,}, "
                         "the longest {max:,}".format(**self.tokens))  # fmt: skip
        if self.truncated:
            found.append(f"{counted(len(self.truncated), 'prompt')} cut from the left ({_shown(self.truncated)})")
        if self.labels:
            up, down = self.labels["up"], self.labels["down"]
            found.append(f"{up:,} thumbs up, {down:,} thumbs down ({up / max(1, up + down):.1%} up)")
        if self.repeated:
            found.append(f"{counted(len(self.repeated), 'repeat')} of an earlier row, kept ({_shown(self.repeated)})")
        if self.overlap:
            found.append(
                f"Warning: {counted(len(self.overlap), 'held-out row')} with a prompt that is trained on, too: such "
                f"figures flatter ({_shown(self.overlap)})"
            )
        return found

    def summary(self) -> dict[str, Any]:
        """The report as the run's record keeps it."""
        return {
            "source": self.source, "format": self.format, "read": self.read, "kept": self.kept,
            "fingerprint": self.fingerprint, "held_out": self.held_out,
            "dropped": {reason: _told(numbers) for reason, numbers in self.dropped.items()},
            "truncated": _told(self.truncated), "repeated": _told(self.repeated),
            "overlap": _told(self.overlap), "labels": self.labels, "tokens": self.tokens,
        }  # fmt: skip


def _shown(numbers: Numbers) -> str:
    told = list(dict.fromkeys(numbers))  # a dialog gives several rows of its number
    rest = "…" if len(told) > SHOWN_ROWS else ""
    return ("row " if len(told) == 1 else "rows ") + ", ".join(map(str, told[:SHOWN_ROWS])) + rest


def _told(numbers: Numbers) -> dict[str, Any]:
    return {"count": len(numbers), "first_rows": numbers[:KEPT_ROWS]}


@dataclass
class Data:
    """Rows of one kind, and the report of what became of the source's rows."""

    rows: list[Row]
    numbers: Numbers  # each row's number in its source
    report: DataReport
