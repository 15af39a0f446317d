"""Placeholder until the renderer lands."""

from pathlib import Path

from perlcli import figures


def write_all(report, folder):
    (Path(folder) / figures.REPORT).write_text(figures.write(report))


def terminal(report):
    return (
        "\n".join(
            f"{c.stage} {a.name} {a.memory_mb} {a.steps_per_second} {a.quality} {a.ratios} {a.remarks} {a.failure}"
            for c in report.comparisons
            for a in c.arms
        )
        + "\n"
        + "\n".join(w for c in report.comparisons for w in c.warnings)
    )
