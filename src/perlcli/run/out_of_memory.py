"""Memory that ran out: whose, while doing what, and what to change. The same error wherever it happens."""

from __future__ import annotations

import errno
import re
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType

from perlcli import device
from perlcli.errors import Interrupted, RunFailed
from perlcli.run.record import RunRecord
from perlcli.text import size

# How errors of a GPU, of main memory and of cuBLAS are worded or named.
MARKS = ("out of memory", "outofmemoryerror", "allocate memory", "memoryerror", "status_alloc_failed")
UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
AMOUNT = r"([\d.]+) (bytes|[KMGT]iB)"
ASKED = re.compile(rf"tried to allocate {AMOUNT}", re.IGNORECASE)
FREE = re.compile(rf"total capacity of {AMOUNT} of which {AMOUNT} is free")
OWN = re.compile(rf"this process has {AMOUNT} memory in use")
MUCH = 1e9  # bytes that other processes hold on the GPU: from here on worth mentioning
LOADING, ADDING = "while loading the base in {precision}", "while adding an adapter"
MERGING, SAVING = "while merging", "while saving"
# Where an error passed through: how the module's name starts, its functions (any if empty), and what it was doing. The
# innermost place counts: sampling for a training step is sampling.
PLACES = (
    ("perlcli.model.loading", "", LOADING),
    ("perlcli.model.roles", "new_adapter load_adapter add_adapter", ADDING),
    ("perlcli.model.scorers", "", "while scoring"),
    ("perlcli.training.rewards", "", "while scoring"),
    ("perlcli.model.log_probs", "log_probs", "while computing log-probabilities"),
    ("perlcli.rollouts.local", "sample", "while sampling"),
    ("transformers.generation.", "", "while sampling"),
    ("trl.", "_generate_single_turn", "while sampling"),
    ("trl.", "_get_per_token_logps_and_entropies", "while computing log-probabilities"),
    ("torch.optim.", "", "in the optimiser's step"),
    ("transformers.", "training_step", "in a training step"),
    ("transformers.", "evaluate", "in evaluation"),
    ("peft.", "merge_and_unload", MERGING),
    ("perlcli.training.merging", "", MERGING),
    ("", "save_pretrained", SAVING),
    ("perlcli.training.policies", "save", SAVING),
    ("", "_save", SAVING),
)
CURES = {  # by option; for what grows with the batch
    "per_device_train_batch_size": "a smaller --per-device-train-batch-size with more --gradient-accumulation-steps",
    "per_device_eval_batch_size": "a smaller --per-device-eval-batch-size",
    "gradient_checkpointing": "--gradient-checkpointing true",
    "max_length": "a smaller --max-length",
    "max_completion_length": "a smaller --max-completion-length",
}
USELESS = (1, "true")  # values of these options that leave nothing to change


class OutOfMemory(RunFailed):
    """A run that found too little memory."""


def failure(error: BaseException, record: RunRecord | None = None) -> OutOfMemory | None:
    """The error in plain words if memory ran out, also if another error has replaced that one; None for any other.
    `record` is the run's: its command and settings decide which options the hint names."""
    if not isinstance(error, Exception) or isinstance(error, OutOfMemory | Interrupted):
        return None
    chain = list(_chain(error))
    cause = next(filter(is_cause, chain), None)
    if cause is None:
        return None
    text, on_gpu = str(cause), not _is_of_main_memory(cause)
    place, precision = _place(chain[: chain.index(cause) + 1])
    where = f" {place.format(precision=precision)}" if place else ""
    whose = "The GPU's memory" if on_gpu else "This machine's memory"
    problem = f"{whose} is too small (out of memory{where}){_figures(text)}"
    return OutOfMemory(problem, _hint(text, record, place, on_gpu=on_gpu))


def is_cause(error: BaseException) -> bool:
    """Whether this error itself says that memory ran out."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, not imported here
        return True
    is_from_library = isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError"
    return is_from_library and is_named_in(str(error))


def is_named_in(text: str) -> bool:
    """Whether an error's text or the failure of a record says that memory ran out."""
    return any(mark in text.lower() for mark in MARKS)


def _is_of_main_memory(cause: BaseException) -> bool:
    return isinstance(cause, MemoryError | OSError) or "allocate memory" in str(cause)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, then what it was raised from or while handling, to the first one."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _place(chain: Sequence[BaseException]) -> tuple[str, str]:
    """The words of PLACES for where memory ran out (empty if unknown), and the precision of the base if one was being
    loaded. `chain` ends with the cause."""
    for error in reversed(chain):
        for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
            words = next((words for *where, words in PLACES if _is_in(frame, *where)), "")
            settings = frame.f_locals.get("settings") if words == LOADING else None
            if words and (words != LOADING or settings is not None):
                return words, device.precision(settings) if settings is not None else ""
    return "", ""


def _is_in(frame: FrameType, module: str, functions: str) -> bool:
    is_module = f"{frame.f_globals.get('__name__')}.".startswith(module)
    return is_module and (not functions or frame.f_code.co_name in functions.split())


def _figures(text: str) -> str:
    """How much was asked for and how much was free, as far as the error says it."""
    asked, free = ASKED.search(text), FREE.search(text)
    parts = [f"{size(_bytes(asked[1], asked[2]))} asked for"] if asked else []
    if free:
        parts.append(f"{size(_bytes(free[3], free[4]))} of {size(_bytes(free[1], free[2]))} free")
    return f": {', '.join(parts)}" if parts else ""


def _bytes(amount: str, unit: str) -> float:
    return float(amount) * UNITS[unit]


def _hint(text: str, record: RunRecord | None, place: str, *, on_gpu: bool) -> str:
    """What to type, by the options that the command has."""
    total, own = FREE.search(text), OWN.search(text)
    if total and own:
        others = _bytes(total[1], total[2]) - _bytes(total[3], total[4]) - _bytes(own[1], own[2])
        if others > MUCH:
            return f"other processes use {size(others)} of this GPU: stop them, or choose a GPU with {device.VISIBLE}"
    if record is not None and record.command == "merge" and on_gpu:
        return f"{device.VISIBLE}= perl merge … merges on the CPU"
    cures = _cures(record, place) if record is not None else []
    if not cures and on_gpu:
        return f"{device.VISIBLE} chooses another GPU; perl estimate predicts what a run needs"
    if not cures:
        return "stop other programs; perl doctor shows how much is free"
    return "try " + " or ".join(filter(None, (", ".join(cures[:-1]), cures[-1])))


def _cures(record: RunRecord, place: str) -> list[str]:
    """What to change in a run's settings."""
    values, is_batch = record.settings, place not in (LOADING, ADDING, MERGING, SAVING)
    cures = [words for name, words in CURES.items() if is_batch and values.get(name, 1) not in USELESS]
    if record.command == "merge" and values.get("dtype") == "float32":
        cures.append("--dtype bfloat16")
    if values.get("full"):
        cures.append("an adapter instead of --full")
    elif not values.get("load_in_4bit", True):
        cures.append("--load-in-4bit" + (" instead of --load-in-8bit" if values.get("load_in_8bit") else ""))
    return cures
