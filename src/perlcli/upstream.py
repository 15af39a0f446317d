"""Silences needless output of the libraries, and sets up torch's allocator, with the reasons. A variable that the user
has set keeps its value."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from perlcli.redaction import hidden
from perlcli.text import one_line

VARIABLES = {
    "TOKENIZERS_PARALLELISM": "false",  # else a line at each fork of a data loader
    "HF_HUB_DISABLE_TELEMETRY": "1",  # nothing is reported unless --report-to says so
    "TRANSFORMERS_VERBOSITY": "error",  # "newly initialised: score.weight" is the head that we train
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",  # our own line shows the progress
    "HF_HUB_VERBOSITY": "error",  # logs every retry; the error at the end says it once
}
# A GPU's memory in segments that can grow: otherwise what freed tensors of other sizes leave can't always be used, and
# a run ends without memory although enough is free. torch reads either name, and has such segments on Linux only.
ALLOCATOR, ALLOCATORS = "PYTORCH_ALLOC_CONF", ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
LOGGERS = {
    "trl": "RLOOTrainer warns that it was given a loaded model: by design, one base serves every role",
    "bitsandbytes": "names optional CPU kernels that aren't installed; the built-in ones are as accurate",
    "torch.distributed.elastic": "warns about redirects on Windows and macOS, which we do not use",
}
WARNINGS = (
    # transformers has renamed what TRL and peft still use
    (r"`(is_)?gradient_checkpointing\w*` is deprecated", FutureWarning),
    # torch, on pinned memory without an accelerator: transformers asks for it by default
    (r".*pin_memory.*", UserWarning),
    # bitsandbytes warns at each layer that LLM.int8 casts its input to float16, which is documented
    (r"MatMul8bitLt: inputs will be cast.*", UserWarning),
    # peft can't ask the Hub for the vocabulary of a local base, and warns at each save
    (r"Could not find a config file in .*", UserWarning),
    # peft warns of a second adapter on a model: policy, anchor and reward share one by design
    (r".*already found a `peft_config` attribute.*", UserWarning),
    (r"Already found a `peft_config` attribute.*", UserWarning),
    # torch, of a GPU that it can't use: the first lines of a run and perl doctor say it, with the reason
    (r"CUDA initialization: .*", UserWarning),
    # peft 0.21, of the pattern that it writes itself for an adapter on experts, and then applies to their parameters
    # (peft/tuners/tuners_utils.py looks for it among modules only): until it looks among parameters too
    (r"The following (rank|alpha)_pattern keys did not match any targeted module.*\[.\.\*\\+\.\w+.\]", RuntimeWarning),
    # torch.jit in a dependency, on Python versions that deprecate what it uses
    (r".*torch\.jit.*", DeprecationWarning),
)


def hush() -> None:
    """Silences what does not concern the user, and lets a GPU's memory grow. Called before the libraries are imported,
    so it only sets environment variables, logging and warnings."""
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    if sys.platform == "linux" and not any(name in os.environ for name in ALLOCATORS):
        os.environ[ALLOCATOR] = "expandable_segments:True"
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    for message, category in WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
    warnings.formatwarning = _as_line
    logging.setLogRecordFactory(Line)


class Line(logging.LogRecord):
    """A log line of a library, without the user's home and secrets."""

    def getMessage(self) -> str:
        return hidden(super().getMessage())


def _as_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning in one line, without the path of the library that it comes from."""
    return hidden(f"{category.__name__}: {one_line(str(message))}\n")


def hush_bars() -> None:
    """Silences progress bars and an error line of datasets for which there are no environment variables."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs an error before raising it
    transformers.logging.disable_progress_bar()
