"""The words and numbers of a comparison report, the same for terminal, Markdown, page and pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from perlcli.comparison.results import FULL, WARM_UP, Arm, Comparison, Report, Spread, speed_of
from perlcli.run import metrics
from perlcli.run import summary as texts
from perlcli.text import megabytes, number, one_line

STAGES = {
    "sft": "Supervised fine-tuning", "reward": "Reward model", "rl": "Reinforcement learning", "eval": "Evaluation",
}  # fmt: skip
DOES = {"sft": "fine-tunes the policy", "reward": "trains the reward model", "rl": "trains the policy by RL"}
PHASES = ("sampling", "scoring", "anchor", "learning")
NONE = "-"
THOUSAND, KILO = 1000, ("", "k", "M", "B", "T")


def count(parts: float) -> str:
    """A number of parameters or bytes: 32,896 is 32.9k."""
    power = 0
    while abs(parts) >= 999.5 and power < len(KILO) - 1:
        parts, power = parts / THOUSAND, power + 1
    return f"{parts:.3g}{KILO[power]}" if power else f"{parts:,.0f}"


def share(ratio: float) -> str:
    """A ratio in per cent: with a decimal below ten."""
    return f"{ratio:.0%}" if ratio >= 0.0995 else f"{ratio * 100:.2g}%"


def times(ratio: float) -> str:
    """A ratio as a multiple: 1.90x."""
    return f"{ratio:.2f}x" if ratio < 9.995 else f"{ratio:,.1f}x"


def quality(name: str, found: Spread) -> str:
    """A figure of quality, shares in per cent."""
    return texts.figure(name, float(found.value))


def interval(name: str, found: Spread) -> str:
    """How far a figure of quality spreads; empty where nothing is known of it."""
    if found.low == found.high:
        return ""
    return f"{texts.figure(name, float(found.low))} to {texts.figure(name, float(found.high))}"


def shortest(names: Iterable[str]) -> dict[str, str]:
    """Each path or hub id by as many of its last parts as tell it from the others."""
    known = list(dict.fromkeys(names))
    parts = {name: name.rstrip("/").split("/") for name in known}
    found = {name: name for name in known}
    for depth in range(max((len(part) for part in parts.values()), default=0), 0, -1):
        tried = {name: "/".join(part[-depth:]) for name, part in parts.items()}
        if len(set(tried.values())) == len(known):
            found = tried
    return found


def labels(arms: Sequence[Arm]) -> list[str]:
    """What each arm is called beside the others: its name, of several models behind its model's."""
    models = shortest(arm.model for arm in arms)
    shown = [arm.name if len(models) == 1 else f"{models[arm.model]} · {arm.name}" for arm in arms]
    return [one_line(name) for name in shown]


def baseline_word(comparison: Comparison) -> str:
    """What the ratios are to, in a word."""
    kinds = {arm.kind for arm in comparison.arms if arm.is_baseline}
    return FULL if kinds == {FULL} else "baseline"


def title(report: Report) -> str:
    """The report's title."""
    return report.title or "Comparison: " + ", ".join(STAGES.get(c.stage, c.stage) for c in report.comparisons)


def state(report: Report) -> str:
    """How far the comparison got, where it is not at its end; else nothing."""
    if report.status == "finished":
        return ""
    arms = [arm for comparison in report.comparisons for arm in comparison.arms]
    done = sum(any(run.status == "finished" for run in arm.runs) for arm in arms)
    return f"The comparison is {report.status}: {done} of {len(arms)} arms have figures so far."


def headline(comparison: Comparison) -> str:
    """The comparison in one sentence: the arm that stands for it against its baseline."""
    arm = chosen(comparison)
    if arm is None:
        failed = [f"{spoken(arm)}: {failure(arm)}" for arm in comparison.arms if arm.failure]
        return f"No run has come to its end: {'; '.join(failed)}." if failed else "No run has come to its end."
    baseline = next((other for other in comparison.arms if other.is_baseline and other.model == arm.model), None)
    models = shortest(other.model for other in comparison.arms)
    place = f"On {models[arm.model]}, " if len(models) > 1 else ""
    if baseline is not None and baseline is not arm and baseline.failure:
        place += f"{spoken(baseline)}: {failure(baseline)}; "
    judged = _judged(comparison.stage, arm, baseline)
    cost = _cost(comparison.stage, arm)
    told = "; ".join(filter(None, (f"{spoken(arm)} {cost}", judged))) if cost else f"{spoken(arm)}: {judged}"
    sentence = f"{place}{told}."
    return f"F{sentence[1:]}" if sentence.startswith("full tuning") else sentence


def spoken(arm: Arm) -> str:
    """An arm's name in a sentence: LoRA and full tuning as people write them."""
    for word, written in (("lora", "LoRA"), ("dora", "DoRA"), (FULL, "full tuning")):
        if arm.name == word or arm.name.startswith((f"{word} ", f"{word}-4bit", f"{word}-8bit")):
            return written + arm.name.removeprefix(word)
    return arm.name


def chosen(comparison: Comparison) -> Arm | None:
    """The arm that stands for a comparison: of the largest model, one held against its baseline, LoRA of the rank
    nearest to 16 before others."""
    done = [arm for arm in comparison.arms if not arm.failure]
    order = {"lora": 0, FULL: 2}
    return min(
        done, default=None,
        key=lambda arm: (not arm.ratios, arm.is_baseline, -_size(comparison, arm), order.get(arm.kind, 1),
                         arm.precision in ("4-bit", "8-bit"), abs((arm.rank or 0) - 16)),
    )  # fmt: skip


def _size(comparison: Comparison, arm: Arm) -> int:
    """Parameters of an arm's model, by the arm that has the fewest beside it in memory."""
    return min(
        (other.total_parameters for other in comparison.arms if other.model == arm.model and other.total_parameters),
        default=0,
    )


def failure(arm: Arm) -> str:
    """Why an arm has no figures, beside what it was predicted to take."""
    predicted = f" (predicted {megabytes(arm.predicted_mb)})" if arm.predicted_mb is not None else ""
    return f"{arm.failure}{predicted}"


def _cost(stage: str, arm: Arm) -> str:
    """What an arm takes: against its baseline, else in itself."""
    does = DOES.get(stage)
    if does is None:
        return ""
    memory, speed = arm.ratios.get("memory"), speed_of(arm)
    parts = [
        f"in {share(memory)} of the memory" if memory is not None
        else f"in {megabytes(arm.memory_mb.value)}" if arm.memory_mb else "",
        f"at {times(speed)} the speed" if speed is not None
        else f"at {number(arm.steps_per_second.value)} steps a second" if arm.steps_per_second else "",
    ]  # fmt: skip
    return " ".join(filter(None, (does, *parts)))


def _judged(stage: str, arm: Arm, baseline: Arm | None) -> str:
    """An arm's first figure of quality, against its baseline's where both have it."""
    name = next((metric.name for metric in metrics.compared(stage) if metric.name in arm.quality), None)
    if name is None:
        return ""
    own = f"{metrics.words(name)} {quality(name, arm.quality[name])}"
    if baseline is None or baseline is arm or name not in baseline.quality:
        return own
    chance = ", which may be chance" if arm.may_be_chance else ""
    return f"{own} against {quality(name, baseline.quality[name])}{chance}"


def settings(arm: Arm) -> dict[str, str]:
    """How an arm trained, in words, by the names of the columns."""
    seeds = list(dict.fromkeys(run.seed for run in arm.runs))
    steps = sorted({run.steps for run in arm.runs if run.steps})
    repeats = max((run.repeat for run in arm.runs), default=1)
    return {
        "model": arm.model, "kind": arm.kind, "rank": str(arm.rank) if arm.rank else NONE, "precision": arm.precision,
        "learning rate": f"{arm.learning_rate:g}" if arm.learning_rate else NONE,
        "steps": ", ".join(f"{n:,}" for n in steps) or NONE, "seeds": ", ".join(map(str, seeds)) or NONE,
        "repeats": str(repeats) if repeats > 1 else NONE,
    }  # fmt: skip


def facts(report: Report) -> list[tuple[str, str]]:
    """Where and when it was measured, and with what."""
    device = report.device
    found = [
        ("device", ", ".join(filter(None, (str(device.get("name") or ""), _threads(device))))),
        ("started", report.started.replace("T", " ").replace("+00:00", " UTC")),
        ("took", f"{report.elapsed_seconds:,.0f} s" if report.elapsed_seconds else ""),
        ("versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())),
        ("git commit", report.git_commit or ""),
    ]
    return [(name, value) for name, value in found if value]


def _threads(device: dict[str, object]) -> str:
    threads = device.get("threads")
    return f"{threads} thread{'s' * (threads != 1)}" if threads and device.get("type") != "cuda" else ""


def commands(report: Report) -> list[str]:
    """What to type to have it again: the whole, then each run."""
    runs = [run.command for comparison in report.comparisons for arm in comparison.arms for run in arm.runs]
    return [command for command in dict.fromkeys((report.command, *runs)) if command]


def method(report: Report) -> list[str]:
    """How the figures were counted, a sentence each."""
    on_gpu, is_made = report.device.get("type") == "cuda", report.command.startswith("perl compare-full")
    memory = (
        "Memory is the peak of torch's tensors on the GPU during training; “reserved” is what torch took for them."
        if on_gpu
        else "Memory is the process's peak resident set above what it held before the weights were loaded."
    )
    stages = {comparison.stage for comparison in report.comparisons}
    split = "An RL step is split as the paper counts it: sampling completions, scoring them by the reward, " \
            "log-probabilities for the KL penalty to the anchor, learning."  # fmt: skip
    return [
        *(["Each run is a process of its own, so that no peak leaks into the next."] if is_made else []),
        memory,
        f"Speed counts the steps after the first {WARM_UP}: median, with quartiles. The ratio is the median over steps "
        "of the same number and seed, which train on the same rows. Loading, evaluation and saving don't count.",
        "Quality of one run stands with its 95 % interval (Wilson), where it is a share of rows; of several seeds it "
        "is the mean, with the lowest and the highest.",
        *([split] if "rl" in stages else []),
    ]  # fmt: skip
