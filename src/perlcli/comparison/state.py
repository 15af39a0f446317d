"""A comparison in progress: its settings, runs, folder and report."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from perlcli import device, settings
from perlcli.comparison import jobs
from perlcli.comparison.jobs import Job, Planned
from perlcli.comparison.results import Report
from perlcli.run.lifecycle import Run


@dataclass
class State:
    """A comparison in progress."""

    given: settings.CompareFull
    run: Run
    report: Report
    plans: Mapping[str, Sequence[Planned]]  # by stage
    measures_memory: bool  # in separate processes
    done: int = 0

    @property
    def folder(self) -> Path:
        """The comparison's folder."""
        return self.run.folder

    @property
    def total(self) -> int:
        """How many runs the comparison takes."""
        return sum(len(self.jobs(stage)) for stage in self.plans)

    def jobs(self, stage: str) -> list[Job]:
        """The runs of a stage, in order."""
        return list(jobs.jobs(self.given, stage, self.plans[stage], memory=self.measures_memory))

    def run_folder(self, job: Job) -> Path:
        """The folder of a job's run."""
        return self.folder / job.stage / job.folder

    def log_of(self, job: Job) -> Path:
        """The file with what a job's process printed."""
        return self.run_folder(job).with_suffix(".log")


def measures_memory() -> bool:
    """Whether memory is measured in separate processes: on a CPU, where freed memory may stay resident."""
    return device.kind() == "cpu" and sys.platform == "linux"
