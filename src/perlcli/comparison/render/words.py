"""The words and numbers of a comparison report, the same for terminal, Markdown, page and pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from perlcli.arms import DORA, FULL, KINDS, LORA
from perlcli.comparison.contrasts import speed_of
from perlcli.comparison.figures import WARM_UP
from perlcli.comparison.results import ArmResult, Comparison, Report, RunFigures
from perlcli.run import metrics, summary
from perlcli.text import counted, megabytes, number, one_line

STAGES = {
    "sft": "Supervised fine-tuning",
    "reward": "Reward model",
    "rl": "Reinforcement learning",
    "eval": "Evaluation",
}
DOES = {"sft": "fine-tunes the policy", "reward": "trains the reward model", "rl": "trains the policy by RL"}
SPOKEN = {LORA: "LoRA", DORA: "DoRA", FULL: "full tuning"}
PHASES = ("sampling", "scoring", "anchor", "learning")
NONE = "-"
KILO = ("", "k", "M", "B", "T")


def count(parts: float) -> str:
    """A number of parameters: 32,896 is 32.9k."""
    power = 0
    while abs(parts) >= 999.5 and power < len(KILO) - 1:
        parts, power = parts / 1000, power + 1
    return f"{parts:.3g}{KILO[power]}" if power else f"{parts:,.0f}"


def share(ratio: float) -> str:
    """A ratio in per cent, with a decimal below ten."""
    return f"{ratio:.0%}" if ratio >= 0.0995 else f"{ratio * 100:.2g}%"


def times(ratio: float) -> str:
    """A ratio as a multiple: 1.90x."""
    return f"{ratio:.2f}x" if ratio < 9.995 else f"{ratio:,.1f}x"


def quality(name: str, value: float) -> str:
    """A quality metric, in per cent if it is a share."""
    return summary.figure(name, float(value))  # a whole number in JSON is a share, too


def shortest(names: Iterable[str]) -> dict[str, str]:
    """Each path or Hub id, as few of its last parts as distinguish it from the others."""
    parts = {name: name.rstrip("/").split("/") for name in names}
    for depth in range(1, max(map(len, parts.values()), default=0) + 1):
        short = {name: "/".join(part[-depth:]) for name, part in parts.items()}
        if len(set(short.values())) == len(parts):
            return short
    return {name: name for name in parts}


def labels(arms: Sequence[ArmResult]) -> list[str]:
    """What each arm is called next to the others: its name, after its model's if there are several models."""
    models = shortest(arm.model for arm in arms)
    return [one_line(arm.name if len(models) == 1 else f"{models[arm.model]} · {arm.name}") for arm in arms]


def baseline_word(comparison: Comparison) -> str:
    """What the ratios are to, in a word."""
    is_full = {arm.is_full for arm in comparison.arms if arm.is_baseline}
    return FULL if is_full == {True} else "baseline"


def title(report: Report) -> str:
    """The report's title, made of the stages if it has none."""
    return report.title or "Comparison: " + ", ".join(STAGES.get(c.stage, c.stage) for c in report.comparisons)


def state(report: Report) -> str:
    """How far the comparison got, if it isn't finished."""
    if report.status == "finished":
        return ""
    arms = [arm for comparison in report.comparisons for arm in comparison.arms]
    done = sum(bool(arm.finished) for arm in arms)
    return f"The comparison is {report.status}: {done} of {len(arms)} arms have figures so far."


def headline(comparison: Comparison) -> str:
    """The comparison in one sentence: its most telling arm against that arm's baseline."""
    arm = chosen(comparison)
    if arm is None:
        failed = [f"{spoken(arm)}: {failure(arm)}" for arm in comparison.arms if arm.failure]
        return f"No run finished: {'; '.join(failed)}." if failed else "No run finished."
    baseline = next((other for other in comparison.arms if other.is_baseline and other.model == arm.model), None)
    models = shortest(other.model for other in comparison.arms)
    place = f"On {models[arm.model]}, " if len(models) > 1 else ""
    if baseline is not None and baseline is not arm and baseline.failure:
        place += f"{spoken(baseline)}: {failure(baseline)}; "
    result, cost = _result(comparison.stage, arm, baseline), _cost(comparison.stage, arm)
    both = "; ".join(filter(None, (f"{spoken(arm)} {cost}", result)))
    sentence = f"{place}{both}." if cost else f"{place}{spoken(arm)}: {result}."
    return f"F{sentence[1:]}" if sentence.startswith("full tuning") else sentence


def spoken(arm: ArmResult) -> str:
    """An arm's name in a sentence, with LoRA, DoRA and full tuning as people write them."""
    kind = arm.name.partition(" ")[0]
    if kind not in KINDS:
        return arm.name
    word = kind.partition("-")[0]
    return SPOKEN[word] + arm.name.removeprefix(word)


def chosen(comparison: Comparison) -> ArmResult | None:
    """The arm that the headline is about; None if none finished. Arms with ratios to a baseline come first, then those
    of the largest model, then LoRA, unquantised and of the rank nearest to 16."""
    size: dict[str, int] = {}  # of a model: the fewest parameters that any of its arms has in memory
    for arm in comparison.arms:
        size[arm.model] = min(filter(None, (size.get(arm.model), arm.total_parameters)), default=0)

    def order(arm: ArmResult) -> tuple[float, ...]:
        by_kind = {LORA: 0, FULL: 2}.get(arm.kind, 1)
        is_quantised = arm.precision in ("4-bit", "8-bit")
        later = -comparison.arms.index(arm) if comparison.stage == "eval" else 0  # of a pipeline's policies, the last
        rank = abs((arm.rank or 0) - 16)
        return not arm.ratios, arm.is_baseline, -size[arm.model], by_kind, is_quantised, rank, later

    return min((arm for arm in comparison.arms if not arm.failure), key=order, default=None)


def failure(arm: ArmResult) -> str:
    """Why an arm has no figures, with the memory that it was predicted to take."""
    predicted = f" (predicted {megabytes(arm.predicted_mb)})" if arm.predicted_mb is not None else ""
    return f"{arm.failure}{predicted}"


def _cost(stage: str, arm: ArmResult) -> str:
    """What an arm takes: relative to its baseline, else in MB and steps per second."""
    if stage not in DOES:
        return ""
    parts = [DOES[stage]]
    memory, speed = arm.ratios.get("memory"), speed_of(arm)
    if memory is not None:
        parts.append(f"in {share(memory)} of the memory")
    elif arm.memory_mb:
        parts.append(f"in {megabytes(arm.memory_mb.value)}")
    if speed is not None:
        parts.append(f"at {times(speed)} the speed")
    elif arm.steps_per_second:
        parts.append(f"at {number(arm.steps_per_second.value)} steps per second")
    return " ".join(parts)


def _result(stage: str, arm: ArmResult, baseline: ArmResult | None) -> str:
    """An arm's first quality metric, against its baseline's if both have it."""
    measured = [metric.name for metric in metrics.compared(stage) if metric.name in arm.quality]
    if not measured:
        return ""
    name = measured[0]
    own = f"{metrics.words(name)} {quality(name, arm.quality[name].value)}"
    if baseline is None or baseline is arm or name not in baseline.quality:
        return own
    chance = ", which may be chance" if arm.may_be_chance else ""
    return f"{own} against {quality(name, baseline.quality[name].value)}{chance}"


def settings(arm: ArmResult) -> dict[str, str]:
    """How an arm trained, in words, by the names of the columns."""
    seeds = list(dict.fromkeys(run.seed for run in arm.runs))
    steps = sorted({run.steps for run in arm.runs if run.steps})
    repeats = max((run.repeat for run in arm.runs), default=1)
    return {
        "model": arm.model,
        "kind": arm.kind,
        "rank": str(arm.rank) if arm.rank else NONE,
        "precision": arm.precision,
        "learning rate": f"{arm.learning_rate:g}" if arm.learning_rate else NONE,
        "steps": ", ".join(f"{n:,}" for n in steps) or NONE,
        "seeds": ", ".join(map(str, seeds)) or NONE,
        "repeats": str(repeats) if repeats > 1 else NONE,
    } | (arm.finished or arm.runs or [RunFigures("", "", "")])[0].setup


def how_title(comparison: Comparison) -> str:
    """The heading above how the arms trained."""
    return "How every arm ran" if len(comparison.arms) > 1 else "How it ran"


def facts(report: Report) -> list[tuple[str, str]]:
    """Where and when it was measured, and with what."""
    device = report.device
    threads = device.get("threads") if device.get("type") != "cuda" else None
    shown_threads = counted(threads, "thread") if isinstance(threads, int) else ""
    known = [
        ("device", ", ".join(filter(None, (str(device.get("name") or ""), shown_threads)))),
        ("started", report.started.replace("T", " ").replace("+00:00", " UTC")),
        ("took", f"{report.elapsed_seconds:,.0f} s" if report.elapsed_seconds else ""),
        ("versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())),
        ("git commit", report.git_commit or ""),
    ]
    return [(name, value) for name, value in known if value]


def commands(report: Report) -> list[str]:
    """What to type to repeat it: all of it, then each run."""
    runs = [run.command for comparison in report.comparisons for arm in comparison.arms for run in arm.runs]
    return [command for command in dict.fromkeys((report.command, *runs)) if command]


def method(report: Report) -> list[str]:
    """How the figures were measured, a few sentences per line."""
    memory = "Memory is the process's peak resident set, minus what it held before the weights were loaded."
    if report.device.get("type") == "cuda":
        memory = "Memory is the peak of torch's tensors on the GPU during training; “reserved” is what torch reserved."
    lines = [
        memory,
        f"Speed counts the steps after the first {WARM_UP}: median, with quartiles. The ratio is the median over steps "
        "of the same number and seed, which train on the same rows. Loading, evaluation and saving don't count.",
        "For a single run, a share of rows has its 95 % interval (Wilson). For several seeds, quality is the mean, "
        "with the lowest and the highest.",
    ]
    if report.command.startswith("perl compare-full"):
        lines.insert(0, "Each run is its own process, so that no peak carries over to the next.")
    if any(comparison.stage == "rl" for comparison in report.comparisons):
        lines.append("Figures of RL are means over the last ten steps, on training prompts.")
        lines.append(
            "An RL step is split as in the paper: sampling completions, scoring them by the reward, log-probabilities "
            "for the KL penalty to the anchor, learning."
        )
    return lines
