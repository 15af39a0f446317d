"""The record of a run: its documented schema, written and read."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import platform
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

from perlcli import settings as definitions
from perlcli.errors import PerlError
from perlcli.run.files import RECORD, SETTINGS, write_json
from perlcli.settings.types import fits, is_plain
from perlcli.text import markdown_table, shorten

SCHEMA_VERSION = 5
SEVERAL = ("compare-full", "quickstart")  # commands that consist of several runs, each with its own folder and record
PACKAGES = ("perlcli", "torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes")

Status = Literal["running", "finished", "failed", "interrupted"]


def command_line(folder: Path, command: str, *words: str) -> str:
    """What to type to run a command again with the settings that its folder keeps."""
    return shlex.join(["perl", command, "--config", str(folder / SETTINGS), *words])


def said(text: str, default: Any = dataclasses.MISSING, factory: Any = dataclasses.MISSING) -> Any:
    """A field of the record with its sentence in the documented schema."""
    return field(default=default, default_factory=factory, metadata={"help": text})


@dataclass
class RunRecord:
    """The documented, versioned result of a run, as `record.json` keeps it."""

    schema_version: int = said("Version of this schema.", SCHEMA_VERSION)
    command: str = said("The perlcli command: sft, reward, rl, eval, merge, quickstart or compare-full.", "")
    status: Status = said("running, finished, failed or interrupted.", "running")
    failure: str | None = said("Why the run failed, in one line.", None)
    started: str = said("Start, UTC, ISO 8601.", "")
    process: dict[str, Any] = said(
        "The process, for `perl runs`: pid, started (an opaque mark) and host (a digest of the machine's name).",
        factory=dict,
    )
    elapsed_seconds: float = said("Wall-clock seconds from start to end, loading included.", 0.0)
    settings: dict[str, Any] = said(
        "Every option with defaults and recipes resolved, as in `settings.yaml`.", factory=dict
    )
    trl_settings: dict[str, Any] = said("Every field of the TRL config.", factory=dict)
    versions: dict[str, str] = said("Versions of Python and the packages that affect the result.", factory=dict)
    git_commit: str | None = said("Commit of the working directory, if it is a git checkout.", None)
    seed: int = said("Seed of initialisation, data order and sampling.", 0)
    device: dict[str, Any] = said(
        "Device name, type, threads and precision of the base; on a GPU free_mb and total_mb, its memory at the start.",
        factory=dict,
    )
    model: dict[str, Any] = said(
        "name as given, base, adapter it started from, architecture, auto_class (which loads it in transformers); "
        "fingerprints of the base's weights, the adapter, the tokenizer, the anchor (if given) and the rewards (for a "
        "function: of its file); held_bytes: of a quantised base, the bytes in 4 or 8 bits and those in another dtype; "
        "rendering: how rows became tokens (chat, chat_template_kwargs, date, loss_on); peft: the content of the "
        "--peft file.",
        factory=dict,
    )
    data: dict[str, dict[str, Any]] = said("What happened to the rows of train and eval: see below.", factory=dict)
    steps: int = said("Optimiser steps done.", 0)
    tokens: int = said("Tokens trained on, prompts and completions; in RL once each, when they are sampled.", 0)
    peak_memory_mb: float = said("Peak memory: allocated by CUDA on a GPU, the process's resident set on a CPU.", 0.0)
    shared: dict[str, int] = said(
        "Tokens that the base was given in training since the run was last started or resumed, and those that it read: "
        "rows with the same prompt share it.",
        factory=dict,
    )
    trainable_parameters: int = said("Trainable parameters.", 0)
    total_parameters: int = said("Parameters in memory, each counted once.", 0)
    memory: dict[str, Any] = said(
        "before_mb: memory of the process before loading the weights. loading_mb: the peak above that until training "
        "begins; training_mb: from then on (on a CPU, loading included). On a GPU both are of tensors, and reserved_mb "
        "is what torch reserves in training. `rl`: base_copies, counted from the live tensors, and mb of the base and "
        "of what each role adds.",
        factory=dict,
    )
    files: dict[str, int] = said(
        "Bytes of the trained weights and the last checkpoint's optimizer state.", factory=dict
    )
    guards: dict[str, Any] = said(
        "Results of the checks: shift of each reward from its proof, the probe before the first step, KL at the start, "
        "what trained, and that nothing else changed; skipped_steps: in which a gradient overflowed in float16; "
        "unscored: completions without a reward, with --on-reward-error.",
        factory=dict,
    )
    notes: list[str] = said("Notes of the run about its choices: kind of data, sharing, warnings.", factory=list)
    metrics: dict[str, Any] = said("Final metrics of the stage.", factory=dict)
    verdicts: list[str] = said("What the metrics show and what they can't show, in sentences.", factory=list)


def write_record(folder: Path, record: RunRecord) -> None:
    """Write the record of a run's folder."""
    write_json(folder / RECORD, dataclasses.asdict(record))


def read_record(folder: Path) -> RunRecord:
    """The record in a run's folder. Raises PerlError if there is none, or it is damaged or of another schema."""
    path = folder / RECORD
    try:
        file = path.stat()
        return copy.deepcopy(_record_in(path, (file.st_dev, file.st_ino, file.st_mtime_ns, file.st_size)))
    except FileNotFoundError:
        raise PerlError(f"{folder} is not the folder of a run: it has no {RECORD}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise PerlError(f"Can't read {path}: {error}") from error


@functools.lru_cache(maxsize=64)  # a run asks for the records of its model and rewards in many places
def _record_in(path: Path, version_on_disk: tuple[int, ...]) -> RunRecord:
    """The record in a file; `version_on_disk` changes when the file does."""
    content = json.loads(path.read_text(encoding="utf-8"))
    known = {item.name for item in dataclasses.fields(RunRecord)}
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version == SCHEMA_VERSION and set(content) != known:
        raise PerlError(f"{path} is damaged: unknown or missing fields: {', '.join(sorted(set(content) ^ known))}")
    if version != SCHEMA_VERSION:
        problem = f"{path} has schema version {version}; this perlcli reads version {SCHEMA_VERSION}"
        raise PerlError(problem, "run it again with this perlcli, or use the version that wrote it")
    invalid = next(_invalid(content), None)
    if invalid is not None:
        raise PerlError(f"{path} is damaged: invalid {invalid}")
    return RunRecord(**content)


def _invalid(content: Mapping[str, Any]) -> Iterator[str]:
    """The invalid values in a record: wrong types, impossible names, settings out of range."""
    if not is_plain(content):
        yield "numbers or characters"
    kinds = get_type_hints(RunRecord)
    yield from (f"{name}: {shorten(value)}" for name, value in content.items() if not fits(value, kinds[name]))
    for name, value in content["metrics"].items():
        if not (value is None or isinstance(value, int | float)):
            yield f"metrics: {name}: {shorten(value)}"
    for name in ("name", "base", "adapter", "fingerprint", "tokenizer"):
        value = content["model"].get(name)
        if not fits(value, str | None) or (value is not None and definitions.place_fault(value)):
            yield f"model: {name}: {shorten(value)}"
    stage = definitions.COMMANDS.get(content["command"])
    known = {item.name: item for item in definitions.options(stage)} if stage else {}
    for name, value in content["settings"].items():
        option, given = known.get(name), tuple(value) if isinstance(value, list) else value
        if option is not None and (not fits(value, option.type) or definitions.misfit(option, given)):
            yield f"settings: {name}: {shorten(value)}"


def find_record(folder: str | None) -> RunRecord | None:
    """The record in a run's folder; None for other folders, Hub ids and None. Raises PerlError if it is damaged."""
    path = None if folder is None else Path(folder).expanduser()
    return read_record(path) if path is not None and (path / RECORD).exists() else None


def field_table(kind: type) -> str:
    """The fields of a documented dataclass with their types and sentences, as a Markdown table."""
    fields = dataclasses.fields(kind)
    rows = [(f"`{item.name}`", str(item.type).replace("|", "or"), item.metadata.get("help", "")) for item in fields]
    return markdown_table(("field", "type", "meaning"), rows)


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect a run's result."""
    installed = {name: version_of(name) for name in PACKAGES}
    return {"python": platform.python_version()} | {name: found for name, found in installed.items() if found}


def version_of(name: str) -> str | None:
    """A package's version; None if it is not installed."""
    from importlib import metadata  # not at the top: `perl --help` doesn't need it, and it is slow to import

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """The commit of the working directory; None if it is not a git checkout."""
    words = ["git", "rev-parse", "--verify", "--quiet", "HEAD"]
    try:
        shown = subprocess.run(words, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return shown.stdout.strip() or None
