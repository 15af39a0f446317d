"""`perl compare-full`: runs the same stage under several arms, and reports what each cost and how good it is."""

from __future__ import annotations

import sys
from dataclasses import replace

from perlcli import device, settings
from perlcli.comparison import jobs, loop, preview
from perlcli.comparison.assembly import State
from perlcli.comparison.results import Report
from perlcli.run import next_steps
from perlcli.run.lifecycle import Run, recording
from perlcli.run.output_folder import check_output
from perlcli.run.record import RunRecord
from perlcli.terminal import say


def run(given: settings.CompareFull) -> RunRecord | None:
    """Run every arm and report on it; None for a dry run, and with --estimate, which only predicts memory."""
    stages = jobs.stages(given)
    output = given.run.output or f"runs/compare-{given.compare.stage}"
    given = replace(given, run=replace(given.run, output=output, seed=given.run.seed or (0,)))
    plans = {stage: jobs.plan(given, stage) for stage in stages}
    preview.check(given, plans)
    if given.compare.estimate:
        say(preview.predicted(plans, given.compare.gpu))
        return None
    check_output(given)
    plans = preview.same_checkpointing(plans)
    measures_memory = device.kind() == "cpu" and sys.platform == "linux"
    state = State(given, Run(given), Report(), plans, measures_memory)
    loop.show_plan(state)
    if given.run.dry_run:
        from perlcli.commands import reward, rl, sft  # only now: they import trl, which the runs' own processes need

        preview.dry_run(plans, output, {"sft": sft.run, "reward": reward.run, "rl": rl.run})
        say("Dry run: nothing was loaded, trained or written.")
        return None
    with recording(state.run):
        loop.run(state)
    say(next_steps.text(state.run.record))
    return state.run.record
