"""The record of a run, and the folder that keeps it: what people and programs read afterwards."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_type_hints

from perlcli import checkpoints, device, disk, liveness
from perlcli import settings as definitions
from perlcli.errors import Interrupted, PerlError, shorten
from perlcli.markdown import inline
from perlcli.private import hidden, hidden_in
from perlcli.values import fits, is_plain

SCHEMA_VERSION = 4
RECORD, SETTINGS, METRICS, SAMPLES = "record.json", "settings.yaml", "metrics.jsonl", "samples.jsonl"
CARD, PROOF, MERGE = "README.md", "proof.json", "merge"
SEVERAL = ("compare-full", "quickstart")  # commands of several runs, each with a folder and record of its own
HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
STEP, STEP_CPU = "seconds/step", "seconds/step_cpu"  # of a step: by the wall's clock, and of the process's processors
CHECKPOINTS, OPTIMIZER = "checkpoints", "optimizer.pt"
PROMPTS = "prompts.bin"
CARD_OF_ADAPTER = ["library_name: peft", "tags: [perl, lora, trl]"]
PACKAGES = ("perlcli", "torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes")

Status = Literal["running", "finished", "failed", "interrupted"]


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
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as side:
        try:
            side.writelines(part.encode() if isinstance(part, str) else part for part in parts)
            side.flush()
            os.chmod(side.name, 0o644)  # the temporary file's 0600 would lock out the user's own tools
            os.replace(side.name, path)
        except BaseException:
            Path(side.name).unlink(missing_ok=True)
            raise


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


class Run:
    """A run in progress: its record and its folder, which is written to from `claim` on."""

    def __init__(self, settings: definitions.Stage) -> None:
        values = definitions.flat(settings)
        self.folder = Path(values["output"]).expanduser()
        self.parts: list[str] = []  # what the folder holds from `claim` on, as long as it stands
        self.prompts = b""  # digests of the prompts that are trained on, for later evaluations
        self._values = values
        self._clock = time.monotonic()
        self.record = RunRecord(
            command=definitions.command_of(settings),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            process=liveness.mark(),
            settings=values,
            seed=first_of(values.get("seed", 0)),
        )

    def note(self, text: str) -> None:
        """Tell the user one line, and keep it in the record."""
        self.record.notes.append(text)
        disk.tell(text)

    def claim(self) -> None:
        """Make the folder this run's own: until here nothing is written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.record.versions, self.record.git_commit = package_versions(), git_commit()
        self.record.memory["before_mb"] = device.resident_mb()
        if self._values.get("overwrite"):
            _empty(self.folder)
        self.write()  # first: without a record the folder would be no run's, and be refused the next time
        self.parts = [RECORD]
        write_settings(self.folder / SETTINGS, self._values)
        if self.prompts:
            write_whole(self.folder / PROMPTS, [self.prompts])

    def write(self) -> None:
        """Bring `record.json` up to date."""
        self.record.elapsed_seconds = self.elapsed
        write_record(self.folder, self.record)

    @property
    def elapsed(self) -> float:
        """Seconds since the run began."""
        return round(time.monotonic() - self._clock, 1)

    @property
    def stands(self) -> bool:
        """Whether the folder is still this run's: one that a library made again has no record."""
        return (self.folder / RECORD).exists()

    def check_stands(self) -> None:
        """Raise RunFailed where the folder, or a part of it, was deleted."""
        if lost := disk.vanished(self.folder, self.parts, way_on(self)):
            raise lost

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Add a line to `metrics.jsonl` or `samples.jsonl`, whose texts are the data's and the model's own."""
        self.check_stands()
        row = row if name == SAMPLES else hidden_in(dict(row))
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


def first_of(value: Any) -> Any:
    """A value, or the first of several."""
    return value[0] if isinstance(value, tuple) else value


@contextmanager
def recording(run: Run) -> Iterator[Run]:
    """Claim the run's folder, and keep in its record how the run ended.

    Raises PerlError where the run goes on with another that had other data or another base, and RunFailed where the
    disk fails or the folder vanishes.
    """
    if run.record.settings.get("resume"):
        _check_same(run)
    try:
        run.claim()
        yield run
        if (run.folder / CARD).exists() or run.record.command == MERGE:
            write_whole(run.folder / CARD, [hidden(card(run.record))])
        checkpoints.clear(run.folder / CHECKPOINTS)
        run.record.status, run.record.files = "finished", file_bytes(run.folder)
        run.write()
    except BaseException as error:
        failure = disk.failure(error, run.folder, run.parts, way_on(run))
        _keep_failure(run, failure or error)
        if failure is not None:
            raise failure from error
        raise


def _keep_failure(run: Run, error: BaseException) -> None:
    """Keep in the record why a run ended, as far as there is a place and room for it."""
    stopped = isinstance(error, KeyboardInterrupt | Interrupted)
    run.record.status = "interrupted" if stopped else "failed"
    run.record.failure = error.problem if isinstance(error, PerlError) else f"{type(error).__name__}: {error}"
    checkpoints.clear(run.folder / CHECKPOINTS)  # on a full disk, room for the record
    if run.stands:
        with suppress(OSError):  # the error itself tells of a disk that fails
            run.write()
    else:
        disk.remove_empty(run.folder / CHECKPOINTS, run.folder)


def go_on(run: Run) -> str:
    """The command that goes on with a run."""
    return shlex.join(["perl", run.record.command, "--config", str(run.folder / SETTINGS), "--resume"])


def way_on(run: Run) -> str:
    """What to type when a disk that failed the run is well again."""
    if "resume" not in run.record.settings:
        return "the same command with --overwrite"
    return go_on(run) if (run.folder / SETTINGS).exists() else "the same command with --resume"


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


def check_output(settings: definitions.Stage) -> None:
    """Refuse an output folder whose content this run would destroy or mix with its own."""
    values = definitions.flat(settings)
    folder = Path(values["output"]).expanduser()
    standing = next((place for place in (folder, *folder.parents) if place.exists()), folder)
    if standing.exists() and not standing.is_dir():
        raise PerlError(f"--output {folder}: {standing} is a file", "name a folder")
    if closed := disk.why_closed(folder):
        raise PerlError(f"--output {folder}: {closed}", "name a folder that can be written to, or make room there")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    ours = (folder / RECORD).exists()
    if values.get("resume") and ours:
        _check_resumable(folder, values)
    if (values.get("overwrite") or values.get("resume")) and not ours:
        raise PerlError(
            f"--output {folder} is not empty and not a run of perlcli", "name another folder, or empty it yourself"
        )
    if not values.get("overwrite") and not values.get("resume"):
        ways = (
            "--resume to go on, --overwrite to replace it, or"
            if "resume" in values
            else "--overwrite to replace it, or"
        )
        raise PerlError(f"--output {folder} is not empty", f"{ways} another --output")
    reads = [values.get(name) for name in ("model", "data", "eval_data", "anchor", "peft")] + list(
        values.get("reward", ())
    )
    inside = [name for name in reads if name and is_inside(name, folder)]
    if values.get("overwrite") and inside:
        raise PerlError(f"--overwrite would delete {inside[0]}, which this run reads", "name another --output")


FUNCTION = "the reward function "
LENGTH = {"max_steps", "num_train_epochs"}
MAY_CHANGE = LENGTH | {
    "save_steps", "save_total_limit", "report_to", "resume", "overwrite", "dry_run",
    "output", "trust_remote_code", "strict", "recipe", "max_eval_samples",
}  # fmt: skip


def _check_resumable(folder: Path, values: Mapping[str, Any]) -> None:
    """Refuse to go on with a run that has done all its steps, or under settings that would make it another run."""
    found, values = read_record(folder), hidden_in(dict(values))  # as the record has them
    is_named = values["resume"] != definitions.LATEST
    if is_named and found.command in SEVERAL:
        raise PerlError(f"--resume {values['resume']}: every run goes on from its own last checkpoint", "name none")
    if is_named:
        _check_named(folder, Path(values["resume"]).expanduser())
    kept = hidden_in(found.settings).items()
    old = {name: tuple(value) if isinstance(value, list) else value for name, value in kept}
    fixed = LENGTH if found.command in SEVERAL else set()  # the runs that finished stay as they are
    changed = [name for name in values if name not in MAY_CHANGE - fixed and old.get(name) != values[name]]
    if changed:
        told = "; ".join(f"{name} was {old.get(name)}, now {values[name]}" for name in changed)
        raise PerlError(f"--resume: the run in {folder} had other settings: {told}", "go on with the same ones")
    _check_longer(old, values)
    if found.command in SEVERAL:
        return  # what hasn't finished runs again
    steps, epochs = values["max_steps"], values["num_train_epochs"]
    longer = steps > found.steps if steps is not None else (epochs or 0) > (found.settings.get("num_train_epochs") or 0)
    if found.status == "finished" and not longer:
        raise PerlError(
            f"The run in {folder} is complete ({found.steps} steps)", "a larger --max-steps goes on from there"
        )


def _check_longer(old: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Refuse to go on for fewer steps or epochs than the run was to have."""
    for name in sorted(LENGTH):
        was, now = old.get(name), values.get(name)
        if was and now and now < was:
            problem = f"--resume: --{definitions.dashed(name)} was {was:g}, now {now:g}: it may grow, not shrink"
            raise PerlError(problem, f"leave it at {was:g}, or begin a run of its own with another --output")


def _check_named(folder: Path, checkpoint: Path) -> None:
    """Refuse a checkpoint that isn't one of the run's own, or isn't whole."""
    if not checkpoint.is_dir():
        raise PerlError(f"--resume {checkpoint}: there is no such checkpoint", "--resume alone takes the last one")
    if checkpoint.parent.resolve() != (folder / CHECKPOINTS).resolve():
        raise PerlError(f"--resume {checkpoint} is not a checkpoint of the run in {folder}", f"--output {folder}")
    if wrong := checkpoints.fault(checkpoint):
        raise PerlError(f"--resume {checkpoint}: it {wrong}", "--resume alone takes the last one that is whole")


def _check_same(run: Run) -> None:
    """Refuse to go on with a run of other data or other weights, whichever role they have: it would be another
    trajectory. A reward function may have been mended; that is told."""
    old = find_record(str(run.folder))
    if old is None:
        return
    before, now = _inputs(old), _inputs(run.record)
    changed = [name for name in now if now[name] and before.get(name) and now[name] != before[name]]
    for name in [name for name in changed if name.startswith(FUNCTION)]:
        changed.remove(name)
        run.note(f"The file of {name} was changed: the steps from here on have another reward than those before.")
    if changed:
        told = "; ".join(f"{name} was {before[name]}, now {now[name]}" for name in changed)
        raise PerlError(
            f"--resume: the run in {run.folder} had other inputs: {told}",
            "go on with the same files, or begin a run of its own with another --output",
        )
    _tell_moved(run, old)


def _tell_moved(run: Run, old: RunRecord) -> None:
    """Say so where a run goes on on another machine or under other versions, which may round otherwise."""
    before, now = old.versions | old.device, package_versions() | run.record.device
    moved = [f"{name} {before[name]}, now {now[name]}" for name in now if before.get(name, now[name]) != now[name]]
    if moved:
        run.note(f"The steps before were done with {'; '.join(moved)}: what follows may differ by rounding.")


def _inputs(record: RunRecord) -> dict[str, Any]:
    """What a run read, by name: the digest of each."""
    model = record.model
    found = {
        "the base": model.get("fingerprint"), "tokenizer": model.get("tokenizer"),
        f"the adapter {model.get('adapter')}": model.get("adapter_fingerprint"), "the anchor": model.get("anchor"),
        "training data": record.data.get("train", {}).get("fingerprint"),
        "the base's precision": record.device.get("precision"),
    }  # fmt: skip
    functions = {True: FUNCTION, False: "the reward "}
    is_function = {name: ":" in name and not Path(name).exists() for name in model.get("rewards", {})}
    return found | {functions[is_function[name]] + name: mark for name, mark in model.get("rewards", {}).items()}


def is_inside(name: str, folder: Path) -> bool:
    """Whether something local lies in a folder, or is it."""
    path = Path(name).expanduser()
    return path.exists() and path.resolve().is_relative_to(folder.resolve())


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def write_settings(path: Path, values: Mapping[str, Any]) -> None:
    """Write the YAML that reruns this run with `--config`; what only steers one call stays out."""
    import yaml

    whole = bool(values.get("recipe"))  # with what is unset, so that nothing is left for the recipe to fill in again
    kept = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
        if name not in definitions.ONCE and (whole or value is not None)
    }
    write_whole(path, [yaml.safe_dump(hidden_in(kept), sort_keys=False, allow_unicode=True)])


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
