"""The record of a run, and the folder that keeps it: what people and programs read afterwards."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

from perlcli import checkpoints
from perlcli import settings as definitions
from perlcli.errors import PerlError, shorten
from perlcli.markdown import inline
from perlcli.private import hidden_in
from perlcli.values import fits, is_plain

SCHEMA_VERSION = 4
RECORD, SETTINGS, METRICS, SAMPLES = "record.json", "settings.yaml", "metrics.jsonl", "samples.jsonl"
CARD, PROOF, MERGE = "README.md", "proof.json", "merge"
SEVERAL = ("compare-full", "quickstart")  # commands of several runs, each with a folder and record of its own
HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
STEP, STEP_CPU = "seconds/step", "seconds/step_cpu"  # of a step: by the wall's clock, and of the process's processors
CHECKPOINTS, OPTIMIZER = "checkpoints", "optimizer.pt"
PROMPTS = "prompts.bin"
HALF = ".half"  # ends the name of a file that is being written
CARD_OF_ADAPTER = ["library_name: peft", "tags: [perl, lora, trl]"]
PACKAGES = ("perlcli", "torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes")

Status = Literal["running", "finished", "failed", "interrupted"]


def command_line(folder: Path, command: str, *words: str) -> str:
    """What to type to run again what a folder has the settings of, with further words."""
    return shlex.join(["perl", command, "--config", str(folder / SETTINGS), *words])


def said(text: str, default: Any = dataclasses.MISSING, factory: Any = dataclasses.MISSING) -> Any:
    """A field of the record with the sentence that the documented schema has for it."""
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
        "The process of the run: pid, started (an opaque mark of its start) and host (a digest of the machine's name). "
        "By it `perl runs` tells a run at work from one that was killed.", factory=dict,
    )  # fmt: skip
    elapsed_seconds: float = said("Wall-clock seconds from start to end, loading included.", 0.0)
    settings: dict[str, Any] = said("Every option as resolved: what `settings.yaml` holds.", factory=dict)
    trl_settings: dict[str, Any] = said("The TRL config in use, every field.", factory=dict)
    versions: dict[str, str] = said("Versions of Python and the packages that decide the result.", factory=dict)
    git_commit: str | None = said("Commit of the working directory, where it is a git checkout.", None)
    seed: int = said("Seed of initialisation, data order and sampling.", 0)
    device: dict[str, Any] = said("Device name, type, threads and precision of the base.", factory=dict)
    model: dict[str, Any] = said(
        "name as given, base, adapter it started from, architecture; fingerprints of the base's weights, the "
        "adapter's, the tokenizer, the anchor that was named and the rewards (a function's is its file's); peft: what "
        "the --peft file held.",
        factory=dict,
    )
    data: dict[str, dict[str, Any]] = said(
        "Per role (train, eval), what became of the rows: see the data report below.", factory=dict
    )
    steps: int = said("Optimiser steps done.", 0)
    tokens: int = said("Tokens that went through training, prompts and completions.", 0)
    peak_memory_mb: float = said("Peak memory: CUDA allocated on a GPU, resident set of the process on a CPU.", 0.0)
    trainable_parameters: int = said("Parameters that trained.", 0)
    total_parameters: int = said("Parameters in memory, each counted once.", 0)
    memory: dict[str, Any] = said(
        "before_mb: what the process held before the weights were loaded. Training: training_mb, its peak above that "
        "(on a GPU: of tensors) and reserved_mb (a GPU's, as torch reserves it). `rl`: base_copies, counted from the "
        "live tensors, and mb of the base and of what each role adds.", factory=dict,
    )  # fmt: skip
    files: dict[str, int] = said(
        "Bytes on disk: weights, of what was trained, and optimizer, its state in the last checkpoint.", factory=dict
    )
    guards: dict[str, Any] = said(
        "What the checks found: shift of each reward against its own proof, the probe before the first step, KL at the "
        "start, what trained, and that the rest did not change.", factory=dict,
    )  # fmt: skip
    notes: list[str] = said("What the run said about its choices: kind of data, sharing, warnings.", factory=list)
    metrics: dict[str, Any] = said("Final metrics of the stage.", factory=dict)


def write_json(path: Path, content: Any) -> None:
    """Write JSON by way of a file beside it, without the user's home and secrets."""
    write_whole(path, [json.dumps(hidden_in(content), indent=2, ensure_ascii=False, default=str) + "\n"])


def write_whole(path: Path, parts: Iterable[str | bytes]) -> None:
    """Write text or bytes to the side and rename the file, so that a reader never sees half of it."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=HALF, delete=False) as side:
        try:
            side.writelines(part.encode() if isinstance(part, str) else part for part in parts)
            side.flush()
            os.fsync(side.fileno())  # else a machine that goes down could leave an empty file: a run without a record
            os.chmod(side.name, 0o644)  # the temporary file's 0600 would lock out the user's own tools
            os.replace(side.name, path)
        except BaseException:
            Path(side.name).unlink(missing_ok=True)
            raise


def is_half_written(path: Path) -> bool:
    """Whether a file is one that `write_whole` was killed at."""
    return path.name.startswith(".") and path.name.endswith(HALF) and path.is_file()


def write_record(folder: Path, record: RunRecord) -> None:
    """Write the record of a run's folder."""
    write_json(folder / RECORD, dataclasses.asdict(record))


def read_record(folder: Path) -> RunRecord:
    """The record of a run's folder; raises PerlError where there is none or it is not of this schema."""
    path = folder / RECORD
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PerlError(f"{folder} is not the folder of a run: it has no {RECORD}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise PerlError(f"Can't read {path}: {error}") from error
    known = {item.name for item in dataclasses.fields(RunRecord)}
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION or set(content) != known:
        problem = f"{path} has schema version {version}; this perlcli reads version {SCHEMA_VERSION}"
        raise PerlError(problem, "run it again with this perlcli, or use the perlcli that wrote it")
    odd = next(_odd(content), None)
    if odd is not None:
        raise PerlError(f"{path} is damaged: no run writes {odd}")
    return RunRecord(**content)


def _odd(content: Mapping[str, Any]) -> Iterator[str]:
    """What no run writes in a record: values of other types, names that nothing can have, settings that are none."""
    if not is_plain(content):
        yield "such numbers or characters"
    kinds = get_type_hints(RunRecord)
    yield from (f"{name}: {shorten(value)}" for name, value in content.items() if not fits(value, kinds[name]))
    for name, value in content["metrics"].items():
        if not (value is None or isinstance(value, int | float)):
            yield f"metrics: {name}: {shorten(value)}"
    for name in ("name", "base", "adapter", "fingerprint", "tokenizer"):
        value = content["model"].get(name)
        if not fits(value, str | None) or definitions.misfit("model", value):
            yield f"model: {name}: {shorten(value)}"
    stage = definitions.COMMANDS.get(content["command"])
    known = {item.name: item.type for item in definitions.options(stage)} if stage else {}
    for name, value in content["settings"].items():
        is_ours = name not in known or fits(value, known[name])
        if not is_ours or definitions.misfit(name, tuple(value) if isinstance(value, list) else value):
            yield f"settings: {name}: {shorten(value)}"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`; without those that a killed run left half-written."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    return [row for line in lines if (row := _row(line)) is not None]


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and is_plain(row) else None


def find_record(folder: str | None) -> RunRecord | None:
    """The record of a folder that a run of ours left; None for any other folder, hub id or nothing."""
    path = None if folder is None else Path(folder).expanduser()
    return read_record(path) if path is not None and (path / RECORD).exists() else None


def schema_table() -> str:
    """The record's fields as a Markdown table, for the documentation."""
    rows = [f"| `{item.name}` | {item.type} | {item.metadata['help']} |" for item in dataclasses.fields(RunRecord)]
    return "\n".join(["| field | type | meaning |", "| --- | --- | --- |", *rows])


def file_bytes(folder: Path) -> dict[str, int]:
    """Bytes of the weights that a run left, and of the optimiser's state in its last checkpoint."""
    states = [path / OPTIMIZER for path in checkpoints.found(folder / CHECKPOINTS)[:1]]
    files = {"weights": list(folder.glob("*.safetensors")), "optimizer": [path for path in states if path.exists()]}
    return {name: sum(path.stat().st_size for path in found) for name, found in files.items() if found}


def card(record: RunRecord) -> str:
    """The run's model card, in place of the blank form that peft leaves."""
    is_merge = record.command == MERGE
    name = record.model.get("base", "")
    is_of_hub = HUB_NAME.fullmatch(name) is not None
    kind = ["library_name: transformers", "tags: [perl, trl]"] if is_merge else CARD_OF_ADAPTER
    header = [*kind, *([f"base_model: {name}"] if is_of_hub else [])]
    done = f"{record.steps} steps, seed {record.seed}"
    if is_merge:
        done = (
            f"the adapter {inline(record.model['name'])} added to the base's weights: an ordinary model of transformers"
        )
    figures = [
        f"| {inline(key)} | {value:.4g} |" for key, value in record.metrics.items() if isinstance(value, int | float)
    ]
    sources = [f"{role}: {inline(found['source'])} ({found['kept']} rows)" for role, found in record.data.items()]
    version = record.versions.get("perlcli", "")
    lines = [
        "---", *header, "---", "", f"# perl {record.command}", "",
        f"Made by `perl {record.command}` (perlcli {version}) on the base {inline(name)}.", "",
        *(f"- {source}" for source in sources), f"- {done}", "",
        "| metric | value |", "| --- | --- |", *figures, "",
        "`settings.yaml` runs it again, `record.json` has every setting and version.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's result."""
    import platform

    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_commit() -> str | None:
    """The commit of the working directory, or None where there is no git checkout."""
    try:
        shown = subprocess.run(
            ["git", "rev-parse", "--verify", "--quiet", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return shown.stdout.strip() or None
