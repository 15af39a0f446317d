"""The settings of a run itself, whatever it trains: its recipe, folder, seed and checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from perlcli.settings.declaring import flag, option, place

LATEST = "latest"  # what --resume means without a checkpoint
ONCE = ("dry_run", "time", "overwrite", "resume", "auto_batch")  # apply to one call and do not describe the run


@dataclass(frozen=True)
class RecipeSettings:
    """Run"""

    recipe: str | None = place(
        "Start from the settings of one of the paper's tasks: a name (see `perl recipes`) or a YAML file. --config "
        "and the command line override them.",
        unset="none",
    )


@dataclass(frozen=True)
class RunSettings:
    """Run"""

    output: str | None = place("Output folder of the run.", short="-o", unset="{}")
    seed: int = option("Seed for initialisation, data order and sampling.", default=0, ge=0, lt=2**32)
    dry_run: bool = flag("Only check and print the settings: load no weights, train nothing, write nothing.")
    overwrite: bool = flag("Replace a non-empty output folder.")


@dataclass(frozen=True)
class KeepSettings:
    """Run"""

    time: bool = flag("With --dry-run: also load the model, time two steps and guess how long the run takes.")
    resume: str | None = place(
        "Resume from the last complete checkpoint in the output folder, or from the given CHECKPOINT.",
        unset="start a new run",
        metavar="[CHECKPOINT]",
    )
    save_steps: int = option("Steps between checkpoints.", default=500, gt=0)
    save_minutes: float = option(
        "Also save a checkpoint when a step ends so many minutes after the last one; 0: only by --save-steps.",
        default=10.0,
        ge=0,
    )
    save_total_limit: int = option("Number of checkpoints to keep (the newest).", default=2, gt=0)
    report_to: str = option(
        "Experiment trackers, comma-separated, named as in transformers (tensorboard, wandb, …).", default="none"
    )
