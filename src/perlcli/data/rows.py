"""What a row of data is, once its format is understood."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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
class Found:
    """A row as its source has it, and where it stands there; where it can't be read, what is wrong with it."""

    place: str
    raw: Raw | None
    fault: str = ""


@dataclass
class DataReport:
    """What became of the rows of one source: nothing is left out without a count."""

    source: str
    format: str
    read: int = 0
    kept: int = 0
    fingerprint: str = ""
    dropped: dict[str, list[int]] = field(default_factory=dict)  # reason -> row numbers, from 1

    def drop(self, reason: str, number: int) -> None:
        """Count a row out."""
        self.dropped.setdefault(reason, []).append(number)
        self.kept -= 1

    def line(self) -> str:
        """The report in one line for the terminal."""
        text = f"{self.source}: {self.format}, {self.kept:,} of {self.read:,} rows"
        for reason, numbers in self.dropped.items():
            shown = ", ".join(map(str, numbers[:3])) + ("…" if len(numbers) > 3 else "")
            text += f"; left out {len(numbers):,} {reason} (rows {shown})"
        return text

    def summary(self) -> dict[str, Any]:
        """The report as the run's record keeps it."""
        dropped = {reason: {"count": len(rows), "first_rows": rows[:10]} for reason, rows in self.dropped.items()}
        return {
            "source": self.source, "format": self.format, "read": self.read, "kept": self.kept,
            "fingerprint": self.fingerprint, "dropped": dropped,
        }  # fmt: skip
