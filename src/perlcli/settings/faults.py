"""What is wrong with the values of settings: types, limits, and conflicts between values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from perlcli.errors import PerlError
from perlcli.settings.commands import Settings, command_of
from perlcli.settings.declaring import Option, Values, dashed, flat, options
from perlcli.settings.stages import LORA
from perlcli.settings.types import describe, fits
from perlcli.text import shorten

LARGEST = 2**53  # of numbers: above it a float is no longer exact
LONGEST_PATH, LONGEST_NAME = 4096, 255  # bytes that file systems accept


def check(settings: Settings) -> None:
    """Raises PerlError that lists every value outside its limits and every conflict between values."""
    values = flat(settings)
    faults = [*limit_faults(options(type(settings)), values), *_conflicts(values)]
    if faults:
        raise PerlError("\n".join(faults), f"perl {command_of(settings)} --help lists the options")


def type_fault(item: Option, value: object) -> str:
    """What is wrong with the type of a value from YAML or the command line; empty if nothing."""
    return "" if fits(value, item.type) else f"must be {describe(item.type)}, not {shorten(value)}"


def misfit(item: Option, value: object) -> str:
    """Why no option of this kind can have a value, whatever its limits; empty if it can."""
    if isinstance(value, tuple):
        return next((fault for each in value if (fault := misfit(item, each))), "")
    if isinstance(value, int | float) and not abs(value) <= LARGEST:
        return f"must be a finite number of at most {LARGEST:,}, not {shorten(value)}"
    if not isinstance(value, str):
        return ""
    return place_fault(value) if item.place else _text_fault(value)


def _text_fault(text: str) -> str:
    """Why a text cannot be written to a file; empty if it can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return f"must be text in UTF-8, not {shorten(text)}"
    return f"must be text without NUL characters, not {shorten(text)}" if "\0" in text else ""


def place_fault(text: str) -> str:
    """Why a text cannot name a file, a folder or something on the Hub; empty if it can."""
    if fault := _text_fault(text):
        return fault
    if len(text.encode()) > LONGEST_PATH or max(len(part.encode()) for part in text.split("/")) > LONGEST_NAME:
        return f"is too long for a file name: {shorten(text)}"
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        return f"{shorten(text)}: there is no such home folder"
    try:
        path.resolve()
    except (RuntimeError, OSError):  # which of them depends on the version of Python
        return f"{shorten(text)} is a link that leads to itself"
    return ""


def limit_faults(items: Iterable[Option], values: Values) -> list[str]:
    """A line for every number outside its option's limits, as the command line spells the option."""
    return [f"{item.shown} {fault}" for item in items if (fault := limit_fault(item, values[item.name]))]


def limit_fault(item: Option, value: object) -> str:
    """How a number, or the first in a list, is outside its option's limits; empty if it is within."""
    for number in value if isinstance(value, tuple) else (value,):
        if not isinstance(number, int | float):
            continue
        too_low = (item.gt is not None and number <= item.gt) or (item.ge is not None and number < item.ge)
        too_high = (item.lt is not None and number >= item.lt) or (item.le is not None and number > item.le)
        if too_low or too_high:
            limits = {"above": item.gt, "at least": item.ge, "below": item.lt, "at most": item.le}
            words = [f"{word} {limit}" for word, limit in limits.items() if limit is not None]
            return f"must be {' and '.join(words)}, not {shorten(number)}"
    return ""


def _conflicts(values: Values) -> Iterator[str]:
    quantised = values.get("load_in_4bit") or values.get("load_in_8bit")
    if values.get("load_in_4bit") and values.get("load_in_8bit"):
        yield "--load-in-4bit and --load-in-8bit can't be combined"
    if values.get("full") and quantised:
        yield "--full trains the base's weights, so it can't be combined with a 4-bit or 8-bit base"
    yield from _adapter_conflicts(values)
    if values.get("data") == values.get("eval_data") == "-":
        yield "--data and --eval-data can't both be read from standard input"
    if values.get("overwrite") and values.get("resume"):
        yield "--overwrite and --resume can't be combined"
    if values.get("eval_fraction") is not None and values.get("eval_data") is not None:
        yield "--eval-data and --eval-fraction can't be combined: each chooses the held-out rows"
    yield from _trial_conflicts(values)
    yield from _reward_conflicts(values)
    yield from _sampling_conflicts(values)
    yield from _rollout_conflicts(values)
    yield from _algorithm_conflicts(values)
    yield from _generation_conflicts(values)
    weight = values.get("pos_weight", "none")
    if weight not in ("auto", "none") and not _is_positive(weight):
        yield f"--pos-weight must be auto, none or a number above 0, not {weight}"


def _trial_conflicts(values: Values) -> Iterator[str]:
    if values.get("time") and not values.get("dry_run"):
        yield "--time only applies with --dry-run"
    for name in ("auto_batch", "time"):
        if values.get(name) and values.get("data") == "-":
            yield f"--{dashed(name)} reads --data a second time, which standard input can't be"


def _adapter_conflicts(values: Values) -> Iterator[str]:
    given = [name for name in LORA if values.get(name)]
    if values.get("full") and (given or values.get("peft")):
        yield "--full uses no adapter, so the --lora options, --use-dora and --peft can't be given"
    elif values.get("peft") and given:
        names = ", ".join(f"--{dashed(name)}" for name in given)
        yield f"--peft {values['peft']} describes the adapter completely, so {names} can't be given too"


def _reward_conflicts(values: Values) -> Iterator[str]:
    names, weights = values.get("reward", ()), values.get("reward_weights", ())
    if weights and len(weights) != len(names):
        yield f"--reward-weights has {len(weights)} weights for {len(names)} --reward"
    if weights and not any(weights):
        yield "--reward-weights are all 0: nothing would be learned"
    decision = values.get("on_reward_error", "stop")
    if decision not in ("stop", "skip") and not _is_finite(decision):
        yield f"--on-reward-error must be stop, skip or a number, not {shorten(decision)}"
    yield from (f"--reward {name} is given twice" for name in dict.fromkeys(names) if names.count(name) > 1)


def _sampling_conflicts(values: Values) -> Iterator[str]:
    if values.get("top_k") == 1 and "algorithm" in values:
        yield "--top-k 1 writes the same completion to a prompt every time, so there is nothing to learn"
    least, most = values.get("min_completion_length"), values.get("max_completion_length")
    if least is not None and most is not None and least > most:
        yield f"--min-completion-length {least} is more than --max-completion-length {most}"
    stop = values.get("stop", ())
    if "" in stop and len(stop) > 1:
        yield "--stop '' means no stop string, so no other --stop can be given"
    yield from (f"--stop {shorten(text)} is given twice" for text in dict.fromkeys(stop) if stop.count(text) > 1)


def _rollout_conflicts(values: Values) -> Iterator[str]:
    engine, urls = values.get("rollouts", "transformers"), values.get("vllm_server_base_url", ())
    if urls and engine != "vllm":
        yield "--vllm-server-base-url only applies with --rollouts vllm"
    if engine in ("merged", "vllm") and values.get("full"):
        does = "sends" if engine == "vllm" else "merges"
        yield f"--rollouts {engine} {does} the adapter only, so it can't be combined with --full"
    if values.get("importance_cap") is not None and engine == "transformers":
        yield "--importance-cap only applies with --rollouts merged, continuous or vllm"
    again = (f"--vllm-server-base-url {url} is given twice" for url in dict.fromkeys(urls) if urls.count(url) > 1)
    yield from again


def _algorithm_conflicts(values: Values) -> Iterator[str]:
    reinforce = values.get("algorithm") == "reinforce"
    count = values.get("num_generations")
    if count == 1 and not reinforce:
        yield "--num-generations must be at least 2: each completion's baseline is the mean of the others"
    if reinforce and count != 1:
        yield f"--algorithm reinforce takes one completion per prompt, not --num-generations {count}"
    if reinforce and values.get("full"):
        yield "--algorithm reinforce needs a frozen base for its value model, so it can't be combined with --full"
    if values.get("value_learning_rate") is not None and not reinforce:
        yield "--value-learning-rate only applies with --algorithm reinforce"
    if values.get("anchor") is not None and values.get("beta") == 0:
        yield "--anchor has no effect with --beta 0"


def _generation_conflicts(values: Values) -> Iterator[str]:
    count = values.get("num_generations")
    if count is None or count <= 0:
        return
    longest, completion = values["max_length"], values["max_completion_length"]
    if longest and completion and longest <= completion:
        yield f"--max-length = {longest} leaves no room for a prompt before --max-completion-length = {completion}"
    size, steps = values["per_device_train_batch_size"], values["gradient_accumulation_steps"]
    if size and steps and (size * steps) % count:
        yield (
            f"--per-device-train-batch-size x --gradient-accumulation-steps = {size * steps} completions per step "
            f"must be a multiple of --num-generations = {count}"
        )


def _is_positive(text: str) -> bool:
    return _is_finite(text) and float(text) > 0


def _is_finite(text: str | float) -> bool:
    try:
        return abs(float(text)) < float("inf")
    except ValueError:
        return False
