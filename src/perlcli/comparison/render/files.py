"""Writes a comparison report in all its forms: JSON, Markdown, CSV, pictures and one HTML page."""

from __future__ import annotations

from pathlib import Path

from perlcli.comparison import results
from perlcli.comparison.render import markdown, pages, pictures, sheets
from perlcli.comparison.results import Report
from perlcli.redaction import hidden_in
from perlcli.run.files import write_whole

MARKDOWN, PAGE, ARMS, RUNS = "report.md", "report.html", "report.csv", "report-runs.csv"


def write_all(report: Report, folder: Path) -> None:
    """Write every form of the report into the folder that its runs' folders are relative to."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / results.REPORT, [results.write(report)])
    render(report, folder)


def render(report: Report, folder: Path) -> None:
    """Write every form but the JSON, which the report was read from."""
    report = hidden_in(report)
    drawn = pictures.draw(report, folder)
    write_whole(folder / MARKDOWN, [markdown.text(report, drawn)])
    write_whole(folder / ARMS, [sheets.arms_csv(report)])
    write_whole(folder / RUNS, [sheets.runs_csv(report)])
    write_whole(folder / PAGE, [pages.page(report, folder, drawn)])
