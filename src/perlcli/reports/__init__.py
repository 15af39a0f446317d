"""A comparison report in all its forms: tables, Markdown, JSON, CSV, pictures, one page. Pure: no model, no clock."""

from __future__ import annotations

from pathlib import Path

from perlcli import figures
from perlcli.figures import Report
from perlcli.private import hidden_in
from perlcli.record import write_whole
from perlcli.reports import pages, pictures, tables

MARKDOWN, PAGE, ARMS, RUNS = "report.md", "report.html", "report.csv", "report-runs.csv"


def write_all(report: Report, folder: Path) -> None:
    """Write every form of the report into the folder from which its runs' folders are seen."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / figures.REPORT, [figures.write(report)])
    render(report, folder)


def render(report: Report, folder: Path) -> None:
    """Write every form but the JSON, which the report was read from."""
    report = hidden_in(report)
    drawn = pictures.draw(report, folder)
    write_whole(folder / MARKDOWN, [tables.markdown(report, [(item.stage, item.path, item.caption) for item in drawn])])
    write_whole(folder / ARMS, [tables.arms_csv(report)])
    write_whole(folder / RUNS, [tables.runs_csv(report)])
    write_whole(folder / PAGE, [pages.page(report, folder, drawn)])
