"""The results of gpu_proof.py as tables: figures, the aims next to them, and predictions next to measurements."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import measured
from gpu_jobs import FINISHED, LARGE, NO_GPU, NO_MEMORY, REWARD, RL, SMALL, Job
from one_base import SAME

Results = Mapping[str, Mapping[str, Any]]  # by the name of the job
MET, MISSED, OPEN = "met", "missed", "not measured"
MEMORY, SPEED = "memory", "speed"
LAST = 6  # lines of the log of a job that failed
NEAR = 0.1  # how far a prediction may be from its measurement, as a share of it


@dataclass(frozen=True)
class Aim:
    """A ratio of two jobs that is aimed at: memory at most `limit`, or speed at least `limit`."""

    job: str
    baseline: str
    kind: str  # MEMORY or SPEED
    limit: float | None = None  # None: only shown


AIMS = (
    Aim("reward-small-lora", "reward-small-full", MEMORY, 0.25),
    Aim("reward-small-lora-4bit", "reward-small-full", MEMORY, 0.15),
    Aim("reward-small-lora", "reward-small-full", SPEED, 1.5),
    Aim("reward-small-lora-unchecked", "reward-small-full-unchecked", SPEED, 1.5),
    Aim("rl-small-bf16-perl", "rl-small-bf16-perl-unshared", SPEED),
    Aim("rl-small-bf16-perl-merged", "rl-small-bf16-perl", SPEED),
    Aim("reward-small-lora-unchecked", "reward-small-full", SPEED),
    Aim("reward-small-lora-unchecked", "reward-small-lora", SPEED),
    Aim("reward-small-lora-unchecked", "reward-small-full-unchecked", MEMORY),
    *(
        Aim(f"rl-{size}-{precision}-perl", f"rl-{size}-{other}", kind, limit)
        for size in (SMALL, LARGE)
        for precision, other, kind, limit in (
            ("bf16", "bf16-stock", MEMORY, 0.60),
            ("4bit", "4bit-stock", MEMORY, 0.40),
            ("bf16", "bf16-full", MEMORY, 0.25),
            ("4bit", "bf16-full", MEMORY, 0.25),
            ("bf16", "bf16-stock", SPEED, None),
            ("4bit", "4bit-stock", SPEED, None),
        )
    ),
    Aim("rl-small-bf16-perl-4-rewards", "rl-small-bf16-perl", MEMORY),
    Aim("reward-small-lora-8bit-reentrant", "reward-small-lora-8bit-non-reentrant", MEMORY),
)


def ratio(aim: Aim, results: Results) -> tuple[float | None, bool]:
    """The ratio, or None; and whether it is only an upper bound, because the baseline ran out of memory."""
    one, other = results.get(aim.job, {}), results.get(aim.baseline, {})
    if one.get("outcome") != FINISHED:
        return None, False
    if aim.kind == SPEED:
        mine, theirs = one.get("step_s"), other.get("step_s") if other.get("outcome") == FINISHED else None
        return (theirs / mine if mine and theirs else None), False
    is_bound = other.get("outcome") == NO_MEMORY
    mine, theirs = one.get("training_mb"), other.get("peak_mb" if is_bound else "training_mb")
    return (mine / theirs if mine and theirs else None), is_bound


def verdict(aim: Aim, found: float | None, *, is_bound: bool) -> str:
    """Met, missed, or not measured; empty for what is only shown."""
    if aim.limit is None:
        return "" if found is not None else OPEN
    if found is None:
        return OPEN
    is_met = found >= aim.limit if aim.kind == SPEED else found <= aim.limit
    return MET if is_met else OPEN if is_bound else MISSED


def aims(results: Results) -> list[list[str]]:
    """Every ratio with its aim and whether it is met; the last row is the predictions'."""
    rows = []
    for aim in AIMS:
        found, is_bound = ratio(aim, results)
        sign, unit = (">=", "x") if aim.kind == SPEED else ("<=", "")
        shown = "" if found is None else f"{'below ' if is_bound else ''}{found:.2f}{unit}"
        wanted = "" if aim.limit is None else f"{sign} {aim.limit:.2f}{unit}"
        rows.append(
            [f"{aim.job} / {aim.baseline}", aim.kind, shown, wanted, verdict(aim, found, is_bound=is_bound)]
        )  # fmt: skip
    ratios = [found for _, _, _, _, found in compared(results)]
    near = sum(abs(found - 1) <= NEAR for found in ratios)
    state = OPEN if not ratios else MET if near == len(ratios) else MISSED
    rows.append(["perl estimate, by phase", "predicted / measured", f"{near} of {len(ratios)}", "0.90 to 1.10", state])
    return rows


def compared(results: Results) -> Iterator[tuple[str, str, float, float, float]]:
    """Of each prediction that was measured: job, phase, MB predicted, MB measured, and their ratio."""
    for name, one in results.items():
        if one.get("outcome") != FINISHED:
            continue
        for phase, predicted in (one.get("predicted") or {}).items():
            found = (one.get("own") or {}).get(f"{phase}_mb") or one.get(f"{phase}_mb")
            if found and not isinstance(predicted, dict):
                yield name, phase, predicted, found, predicted / found


def predictions(results: Results) -> list[list[str]]:
    """Predicted and measured MB, by phase."""
    return [
        [name, phase, f"{predicted:,.0f}", f"{found:,.0f}", f"{share:.2f}", MET if abs(share - 1) <= NEAR else MISSED]
        for name, phase, predicted, found, share in compared(results)
    ]


def runs(results: Results, jobs: Sequence[Job]) -> list[list[str]]:
    """Memory and time of the runs that are compared."""
    rows = []
    for job in jobs:
        one = results.get(job.name, {})
        keys = ("loading_mb", "training_mb", "peak_mb", "reserved_mb")
        figures = [number(one.get(key), ",.0f") for key in keys]
        figures += [number(one.get("copies"), ".2f"), number(one.get("step_s"), ".3f")]
        rows.append([job.name, str(one.get("outcome", OPEN)), *figures])
    return rows


def phases(results: Results, jobs: Sequence[Job]) -> list[list[str]]:
    """Where the time of a step of `perl rl` goes."""
    keys = ("sampling", "scoring", "anchor", "learning")
    found = [(job.name, results[job.name].get("phases")) for job in jobs if job.name in results]
    return [[name, *(number(one.get(f"seconds_{key}"), ".3f") for key in keys)] for name, one in found if one]


def speeds(results: Results) -> list[list[str]]:
    """Ways to sample, and their speed relative to sampling as it is."""
    ways = {way: one for result in results.values() for way, one in (result.get("ways") or {}).items()}
    base = ways.get("as it is", {}).get("tokens_s")
    return [
        [
            way, number(one["tokens_s"], ",.0f"), f"{one['tokens_s'] / base:.2f}x" if base else "",
            number(one["token_ms"], ".1f"), number(one["first_s"], ".1f"),
        ]
        for way, one in ways.items()
    ]  # fmt: skip


def checks(results: Results) -> list[list[str]]:
    """What must be right, and whether it is."""
    found = [(name, what, holds) for name, one in results.items() for what, holds in (one.get("checks") or {}).items()]
    for size in (SMALL, LARGE):
        work = [
            tuple(one.get(name) for name in SAME)
            for job, one in results.items()
            if job.startswith(f"rl-{size}") and one.get("outcome") == FINISHED
        ]
        if len(work) > 1:
            found.append((f"rl-{size}-*", "each run reads and writes the same number of tokens", len(set(work)) == 1))
    return [[name, what, "yes" if holds else "NO"] for name, what, holds in found]


def timing(results: Results, jobs: Sequence[Job]) -> list[list[str]]:
    """How each job ended, and what it took."""
    rows = []
    for job in jobs:
        one = results.get(job.name, {})
        reason = str(one.get("error") or "").replace("|", "/").replace("\n", " ")[:160]
        rows.append(
            [job.name, str(one.get("outcome", "left out")), number(one.get("seconds"), ".0f"), f"{job.seconds:.0f}",
             reason]
        )  # fmt: skip
    return rows


def number(value: Any, form: str) -> str:
    """A number in this form; empty if it was not measured."""
    return format(value, form) if isinstance(value, int | float) else ""


def report(results: Results, jobs: Sequence[Job]) -> str:
    """All tables, as Markdown."""
    compared_jobs = [job for job in jobs if job.kind in (RL, REWARD)]
    memory = ["loading MB", "training MB", "peak MB", "reserved MB"]
    notes = [f"- {name}: {note}" for name, one in results.items() for note in one.get("notes") or ()]
    tables = (
        ("Aims", ["ratio", "of", "measured", "aim", ""], aims(results)),
        ("Memory and time", ["run", "outcome", *memory, "bases", "step s"], runs(results, compared_jobs)),
        ("Time of a step of RL", ["run", "sampling s", "scoring s", "anchor s", "learning s"], phases(results, jobs)),
        ("Sampling", ["way", "tokens/s", "speed", "ms/token", "first call s"], speeds(results)),
        ("Predictions", ["run", "phase", "predicted MB", "measured MB", "ratio", ""], predictions(results)),
        ("Checks", ["job", "check", "holds"], checks(results)),
        ("Jobs", ["job", "outcome", "s", "s on an H100", "reason"], timing(results, jobs)),
    )
    parts = [f"## {title}\n\n{measured.markdown(heads, rows)}" for title, heads, rows in tables if rows]
    return "\n\n".join([*parts, "## Notes\n\n" + "\n".join(notes or ["none"])])


def line(name: str, result: Mapping[str, Any], expected: float) -> str:
    """A job's result in a line, followed by the end of its log if it failed."""
    words = [f"{name}: {result['outcome']}, {result['seconds']:.0f} s (H100: {expected:.0f})"]
    words += [f"{key[:-3]} {result[key]:,.0f} MB" for key in ("loading_mb", "training_mb") if result.get(key)]
    words += [f"step {result['step_s']:.3f} s"] if result.get("step_s") else []
    words += [f"{way} {one['tokens_s']:,.0f} tokens/s" for way, one in (result.get("ways") or {}).items()]
    words += [f"NOT: {what}" for what, holds in (result.get("checks") or {}).items() if not holds]
    details = [str(note) for note in result.get("notes") or ()]
    if result["outcome"] not in (FINISHED, NO_GPU):
        details += [*str(result.get("error", "")).splitlines(), *str(result.get("log", "")).splitlines()[-LAST:]]
    return "; ".join(words) + "".join(f"\n    {detail}" for detail in details)
