"""What a run says of shared prompts."""

from __future__ import annotations

from perlcli.model.shared_prompts import Sharer
from perlcli.run.lifecycle import Run


def try_out(sharer: Sharer, run: Run) -> None:
    """Try sharing before the first step, and note why it isn't possible."""
    sharer.try_out()
    if sharer.why_not:
        run.note(f"Each row is read from its start, also where rows start alike: {sharer.why_not}.")


def conclude(sharer: Sharer, run: Run) -> None:
    """Record how many tokens were given and read in training, and note how many were saved."""
    count = sharer.count
    run.record.shared = count.summary()
    if count.saved:
        share = count.saved / count.given
        run.note(f"Shared prompts: {count.read:,} tokens were read in place of {count.given:,} ({share:.0%} less).")
