"""The experiment trackers of `--report-to`, by their names in transformers."""

from __future__ import annotations

from importlib.util import find_spec

from perlcli.errors import PerlError, nearest

# The module that transformers looks for, and the package that has it. Those that log nothing by themselves are missing.
TRACKERS = {
    "azure_ml": ("azureml", "azureml-mlflow"),
    "clearml": ("clearml", "clearml"),
    "codecarbon": ("codecarbon", "codecarbon"),
    "comet_ml": ("comet_ml", "comet_ml"),
    "dagshub": ("dagshub", "dagshub"),
    "dvclive": ("dvclive", "dvclive"),
    "mlflow": ("mlflow", "mlflow"),
    "neptune": ("neptune", "neptune"),
    "swanlab": ("swanlab", "swanlab"),
    "tensorboard": ("tensorboard", "tensorboard"),
    "trackio": ("trackio", "trackio"),
    "wandb": ("wandb", "wandb"),
}
OTHERS = ("none", "all")


def names(report_to: str) -> list[str]:
    """The trackers in the value of `--report-to`."""
    return [name.strip() for name in report_to.split(",")]


def check(report_to: str) -> None:
    """Raises PerlError for a tracker that transformers doesn't know, or that isn't installed."""
    wanted = [name for name in names(report_to) if name not in OTHERS]
    unknown = [name for name in wanted if name not in TRACKERS]
    if unknown:
        known = (*OTHERS, *TRACKERS)
        problem = f"--report-to must be the names of experiment trackers, not '{unknown[0]}'"
        raise PerlError(problem, nearest(unknown[0], known) or f"known trackers: {', '.join(TRACKERS)}")
    missing = [name for name in wanted if find_spec(TRACKERS[name][0]) is None]
    if missing:
        problem = f"--report-to {', '.join(missing)}: not installed"
        raise PerlError(problem, f"pip install {' '.join(TRACKERS[name][1] for name in missing)}")
