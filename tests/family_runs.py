"""What each stage makes of every family of models. Writes docs/models.json, from which docs/models.md is made.

python tests/family_runs.py              # all families, about 8 minutes on two cores; then `make docs`
python tests/family_runs.py llama hybrid # some families or kinds; only prints what came of them
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest import mock

from families import FAMILIES, QUESTIONS, Family, build

OUTCOMES = Path(__file__).parents[1] / "docs" / "models.json"
LIBRARIES = ("transformers", "trl", "peft")
STAGES = ("sft", "reward", "rl", "eval", "merge")
OK, REFUSED, FAILED, NOTHING = "ok", "refused", "failed", "-"  # NOTHING: no earlier stage left what this one needs
# Batches of all rows, so that the first one has the same rows in any order
STEPS = ("--max-steps", "2", "--per-device-train-batch-size", str(len(QUESTIONS)), "--gradient-accumulation-steps", "1")
SHORT = (*STEPS, "--learning-rate", "1e-2", "--max-length", "480", "--lora-r", "4")
SAMPLED = ("--max-length", "480", "--max-completion-length", "6")
Models = Mapping[str, Path]


@dataclass(frozen=True)
class Outcome:
    """What became of a stage: OK, REFUSED before weights were loaded, FAILED or NOTHING; with its error."""

    stage: str
    result: str
    error: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.result}: {self.error}" if self.error else self.result


def brevity(completions: list[Any], **_: Any) -> list[float]:
    """A reward for short answers, where there is no reward model."""
    return [-float(len(str(completion))) for completion in completions]


def write_data(folder: Path) -> None:
    """Write demonstrations, pairs and prompts as JSONL."""
    for name, keys in (("demonstrations", ("completion",)), ("pairs", ("chosen", "rejected")), ("prompts", ())):
        rows = []
        for question, *answers in QUESTIONS:
            turns = {key: [{"role": "assistant", "content": text}] for key, text in zip(keys, answers, strict=False)}
            rows.append({"prompt": [{"role": "user", "content": question}], **turns})
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def run_family(
    family: Family, data: Path, folder: Path, stages: Collection[str] = STAGES, precision: Sequence[str] = ()
) -> list[Outcome]:
    """What becomes of the family in each stage, on what the stages before it made. The model is in `folder/base`, and
    each stage's output in a folder of its name."""
    models = {"base": build(family, folder / "base")}
    outcomes = []
    for stage in stages:
        line = words(stage, models, data)
        if line is None:
            outcomes.append(Outcome(stage, NOTHING))
            continue
        merged = ("--dtype", "bfloat16") if precision else ()  # a merge has the base's stored dtype otherwise
        options = precision if stage != "merge" else merged
        outcomes.append(run_stage([stage, *map(str, line), *options], folder / stage))
        if outcomes[-1].result == OK:
            models[stage] = folder / stage
    gc.collect()
    return outcomes


def words(stage: str, models: Models, data: Path) -> Sequence[object] | None:
    """The options of a stage on the models that there are; None if there is no adapter to merge."""
    policy = models.get("rl", models.get("sft"))
    reward = models.get("reward", f"{Path(__file__).stem}:brevity")
    if stage == "merge":
        adapter = policy or models.get("reward")
        return adapter and (adapter,)
    if stage in ("sft", "reward"):
        rows = {"sft": "demonstrations", "reward": "pairs"}[stage]
        return ("--model", models["base"], "--data", data / f"{rows}.jsonl", *SHORT)
    sampled = ("--model", policy or models["base"], "--reward", reward, "--data", data / "prompts.jsonl", *SAMPLED)
    return sampled if stage == "eval" else (*sampled, *STEPS, "--learning-rate", "1e-2", "--num-generations", "2")


def run_stage(line: Sequence[str], output: Path) -> Outcome:
    """What becomes of a command line in this process. It is refused if it says why, with exit code 2, before it loads
    weights or writes anything, and its dry run says the same."""
    begun = time.perf_counter()
    # The plots, a fifth of the time, don't depend on the model.
    with loads() as loaded, mock.patch("perlcli.run.plots.save"):
        code, error = run([*line, "--output", str(output)])
    seconds = time.perf_counter() - begun
    if code == 0:
        return Outcome(line[0], OK, seconds=seconds)
    if code != 2 or loaded or output.exists():
        return Outcome(line[0], FAILED, error, seconds)
    code, foretold = run([*line, "--output", str(output), "--dry-run"])
    if (code, foretold) != (2, error):
        return Outcome(line[0], FAILED, f"refused, but not by --dry-run: {error}", seconds)
    return Outcome(line[0], REFUSED, error.replace(f"{output.parent}/", ""), seconds)


def run(line: Sequence[str]) -> tuple[int, str]:
    """The exit code of a command line, and its error, without the hint."""
    from typer.testing import CliRunner

    from perlcli.cli.app import app

    result = CliRunner().invoke(app, list(line))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return 1, f"{type(result.exception).__name__}: {result.exception}"
    _, _, error = result.stderr.rpartition("Error: ")
    return result.exit_code, error.partition("\nHint: ")[0].strip() if result.exit_code else ""


@contextmanager
def loads() -> Iterator[list[str]]:
    """The models whose weights are loaded within the block."""
    from transformers import PreTrainedModel

    found: list[str] = []
    original: Callable[..., Any] = PreTrainedModel.from_pretrained.__func__

    def load(kind: type, name: Any, *values: Any, **options: Any) -> Any:
        found.append(str(name))
        return original(kind, name, *values, **options)

    with mock.patch.object(PreTrainedModel, "from_pretrained", classmethod(load)):
        yield found


# The page


def entry(outcomes: Sequence[Outcome]) -> dict[str, str]:
    """A family in docs/models.json: the outcome of each stage."""
    return {outcome.stage: str(outcome) for outcome in outcomes}


def read_page() -> dict[str, Any]:
    """What docs/models.json says: `versions` of the libraries, and `families` by name."""
    found: dict[str, Any] = json.loads(OUTCOMES.read_text(encoding="utf-8"))
    return found


def write_page(entries: Mapping[str, Mapping[str, str]]) -> None:
    """Write docs/models.json."""
    found = {family.name: entries[family.name] for family in FAMILIES if family.name in entries}
    page = {"versions": {name: version(name) for name in LIBRARIES}, "families": found}
    OUTCOMES.write_text(json.dumps(page, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def versions() -> str:
    """The libraries that the outcomes are of."""
    return ", ".join(f"{name} {number}" for name, number in read_page()["versions"].items())


def page() -> str:
    """The outcomes as Markdown: a table for each kind of model."""
    from perlcli.text import markdown_table

    entries = read_page()["families"]
    parts = []
    for kind, members in groupby(FAMILIES, key=lambda family: family.kind):
        rows = [_row(family.name, entries[family.name]) for family in members]
        parts.append(f"## {kind.capitalize()}\n\n{markdown_table(('family', *STAGES, 'why it is refused'), rows)}")
    return "\n\n".join(parts)


def _row(name: str, outcomes: Mapping[str, str]) -> tuple[str, ...]:
    results, reasons = zip(*(outcomes[stage].partition(": ")[::2] for stage in STAGES), strict=True)
    return (f"`{name}`", *results, "; ".join(dict.fromkeys(filter(None, reasons))))


def main(names: Sequence[str]) -> None:
    """Run the families of these names or kinds, or all, print what came of them, and update the page."""
    chosen = [family for family in FAMILIES if not names or {family.name, family.kind} & {*names}]
    entries = read_page()["families"] if OUTCOMES.exists() else {}
    with tempfile.TemporaryDirectory() as top:
        write_data(Path(top))
        for family in chosen:
            outcomes = run_family(family, Path(top), Path(top) / family.name)
            gc.freeze()  # the libraries' objects, over which each collection would walk
            print(family.name, *(f"{outcome.stage}={outcome.result}({outcome.seconds:.1f})" for outcome in outcomes))
            errors = (f"    {outcome.stage} {outcome}\n" for outcome in outcomes if outcome.error)
            print(*errors, sep="", end="", flush=True)
            entries[family.name] = entry(outcomes)
            write_page(entries)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1:])
