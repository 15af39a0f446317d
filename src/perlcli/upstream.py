"""What the libraries below us print without need, and why each line is silenced.

`hush` comes before their import, so it touches environment, logging and warnings alone. A user who has set one of the
variables keeps it.
"""

from __future__ import annotations

import logging
import os
import warnings

from perlcli.redaction import hidden
from perlcli.text import one_line

VARIABLES = {
    "TOKENIZERS_PARALLELISM": "false",  # else a line at each fork of a data loader
    "HF_HUB_DISABLE_TELEMETRY": "1",  # a run reports to nobody unless --report-to says so
    "TRANSFORMERS_VERBOSITY": "error",  # "newly initialised: score.weight" is the head that we train
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",  # our own line tells how far a stage is
    "HF_HUB_VERBOSITY": "error",  # tells each of its retries; the error at their end says it once
}
LOGGERS = {
    "trl": "RLOOTrainer notes that it was given a loaded model: by design, one base serves every role",
    "bitsandbytes": "names optional CPU kernels that aren't installed; the built-in ones are as right",
    "torch.distributed.elastic": "notes on Windows and macOS redirects that no run of ours uses",
}
WARNINGS = (
    # transformers renames names that TRL and peft still use
    (r"`(is_)?gradient_checkpointing\w*` is deprecated", FutureWarning),
    # torch on pinned memory without an accelerator: transformers asks for it by default
    (r".*pin_memory.*", UserWarning),
    # bitsandbytes LLM.int8 says at each layer that it casts its input to float16: documented behaviour
    (r"MatMul8bitLt: inputs will be cast.*", UserWarning),
    # peft can't ask a hub for the vocabulary of a local base, and says so at each save
    (r"Could not find a config file in .*", UserWarning),
    # peft notes a second adapter on a model: policy, anchor and reward are meant to share one
    (r".*already found a `peft_config` attribute.*", UserWarning),
    (r"Already found a `peft_config` attribute.*", UserWarning),
    # torch.jit inside a dependency, on Python versions that deprecate what it uses
    (r".*torch\.jit.*", DeprecationWarning),
)


def hush() -> None:
    """Silence upstream's lines that don't concern our user."""
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    for message, category in WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
    warnings.formatwarning = _as_line
    logging.setLogRecordFactory(Line)


class Line(logging.LogRecord):
    """A line of a library's log, without the user's home and secrets."""

    def getMessage(self) -> str:
        return hidden(super().getMessage())


def _as_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning in a line, without the path of the library that gives it."""
    return hidden(f"{category.__name__}: {one_line(str(message))}\n")


def hush_bars() -> None:
    """Silence the bars of loading and mapping, and an error line of datasets, which have no environment variable."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs an error that it then raises, and we tell that
    transformers.logging.disable_progress_bar()
