"""A comparison report as one page of HTML that needs nothing else: no script, no font, no picture from outside."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from perlcli.comparison.render import tables, words
from perlcli.comparison.render.pictures import Picture
from perlcli.comparison.results import ArmResult, Comparison, Report

TEMPLATE = Path(__file__).with_name("report.html.jinja")


@dataclass(frozen=True)
class ArmRow:
    """A row of the arms' tables."""

    label: str
    arm: ArmResult
    notes: list[int]  # the numbers of its remarks
    style: str  # the class of the row: failed, best or none


def page(report: Report, folder: Path, pictures: Sequence[Picture]) -> str:
    """The report as HTML, with the pictures of the folder inside; every text of its content is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        report=report,
        pictures=pictures,
        words=words,
        tables=tables,
        arm_rows=_arm_rows,
        encoded=lambda picture: base64.b64encode((folder / picture.path).read_bytes()).decode("ascii"),
    )


def _arm_rows(comparison: Comparison) -> list[ArmRow]:
    """The arms, with the headline's marked as the best if there are others."""
    _, marks = tables.footnotes(comparison)
    best = words.chosen(comparison)
    rows = []
    for label, arm, notes in zip(words.labels(comparison.arms), comparison.arms, marks, strict=True):
        style = ""
        if arm.failure:
            style = "failed"
        elif arm is best and len(marks) > 1:
            style = "best"
        rows.append(ArmRow(label, arm, notes, style))
    return rows
