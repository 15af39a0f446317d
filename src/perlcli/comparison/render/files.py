"""A comparison report in all its forms: tables, Markdown, JSON, CSV, pictures, one page. Pure: no model, no clock."""

from __future__ import annotations

from pathlib import Path

from perlcli.comparison import results
from perlcli.comparison.render import pages, pictures, tables
from perlcli.comparison.results import Report
from perlcli.redaction import hidden_in
from perlcli.run.files import write_whole

MARKDOWN, PAGE, ARMS, RUNS = "report.md", "report.html", "report.csv", "report-runs.csv"


def write_all(report: Report, folder: Path) -> None:
    """Write every form of the report into the folder from which its runs' folders are seen."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / results.REPORT, [results.write(report)])
    render(report, folder)


def render(report: Report, folder: Path) -> None:
    """Write every form but the JSON, which the report was read from."""
    report = hidden_in(report)
    drawn = pictures.draw(report, folder)
    write_whole(folder / MARKDOWN, [tables.markdown(report, [(item.stage, item.path, item.caption) for item in drawn])])
    write_whole(folder / ARMS, [tables.arms_csv(report)])
    write_whole(folder / RUNS, [tables.runs_csv(report)])
    write_whole(folder / PAGE, [pages.page(report, folder, drawn)])
