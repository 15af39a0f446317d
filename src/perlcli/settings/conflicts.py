"""What is wrong between values and within them: all of it is told at once, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from perlcli.errors import PerlError
from perlcli.settings.commands import OfData, Stage, command_of
from perlcli.settings.declaring import dashed
from perlcli.settings.groups import LORA
from perlcli.settings.resolving import flat

POSITIVE = (
    "max_length", "lora_r", "lora_alpha", "max_steps", "num_train_epochs", "learning_rate",
    "per_device_train_batch_size", "gradient_accumulation_steps", "save_steps", "temperature", "num_generations",
    "max_completion_length", "max_samples", "per_device_eval_batch_size", "value_learning_rate", "shp_score_ratio",
    "shp_per_post", "rows", "rewards", "max_eval_samples", "repeats", "full_learning_rate", "save_total_limit",
)  # fmt: skip
NOT_NEGATIVE = ("beta", "seed", "missing_eos_penalty")


def check(settings: Stage | OfData) -> None:
    """Raise one PerlError that tells every fault found between and within the values."""
    values = flat(settings)
    numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
    faults = [f"--{dashed(n)} must be above 0, not {v}" for n, v in numbers.items() if n in POSITIVE and not v > 0]
    faults += [
        f"--{dashed(n)} must be 0 or more, not {v}" for n, v in numbers.items() if n in NOT_NEGATIVE and not v >= 0
    ]
    if numbers.get("seed", 0) >= 2**32:
        faults.append(f"--seed must be below {2**32}, not {numbers['seed']}")
    faults += _conflicts(values)
    if faults:
        raise PerlError("\n".join(faults), f"perl {command_of(settings)} --help lists the options")


def _conflicts(values: Mapping[str, Any]) -> Iterator[str]:
    quantised = values.get("load_in_4bit") or values.get("load_in_8bit")
    if values.get("load_in_4bit") and values.get("load_in_8bit"):
        yield "--load-in-4bit and --load-in-8bit exclude each other"
    if values.get("full") and quantised:
        yield "--full trains the weights themselves, so it can't be combined with a 4- or 8-bit base"
    yield from _adapter_conflicts(values)
    if values.get("data") == values.get("eval_data") == "-":
        yield "--data and --eval-data can't both be read from standard input"
    if values.get("overwrite") and values.get("resume"):
        yield "--overwrite and --resume exclude each other"
    if not 0 <= (values.get("lora_dropout") or 0) < 1:
        yield f"--lora-dropout must be from 0 to below 1, not {values['lora_dropout']}"
    yield from _held_out_conflicts(values)
    yield from _reward_conflicts(values)
    yield from _generation_conflicts(values)
    weight = values.get("pos_weight", "none")
    if weight not in ("auto", "none") and not _is_positive(weight):
        yield f"--pos-weight must be auto, none or a number above 0, not {weight}"


def _adapter_conflicts(values: Mapping[str, Any]) -> Iterator[str]:
    given = [name for name in LORA if values.get(name)]
    if values.get("full") and (given or values.get("peft")):
        yield "--full uses no adapter, so the --lora options, --use-dora and --peft don't apply"
    elif values.get("peft") and given:
        names = ", ".join(f"--{dashed(name)}" for name in given)
        yield f"--peft {values['peft']} says all of the adapter, so {names} can't be given beside it"


def _held_out_conflicts(values: Mapping[str, Any]) -> Iterator[str]:
    fraction = values.get("eval_fraction")
    if fraction is not None and not 0 < fraction < 1:
        yield f"--eval-fraction must be above 0 and below 1, not {fraction:g}"
    if fraction is not None and values.get("eval_data") is not None:
        yield "--eval-data and --eval-fraction exclude each other: either names the held-out rows"


def _reward_conflicts(values: Mapping[str, Any]) -> Iterator[str]:
    names, weights = values.get("reward", ()), values.get("reward_weights", ())
    if weights and len(weights) != len(names):
        yield f"--reward-weights has {len(weights)} weights for {len(names)} --reward"
    if weights and not any(weights):
        yield "--reward-weights are all 0: nothing would be learned"
    yield from (f"--reward {name} is given twice" for name in dict.fromkeys(names) if names.count(name) > 1)


def _algorithm_conflicts(values: Mapping[str, Any]) -> Iterator[str]:
    reinforce = values.get("algorithm") == "reinforce"
    count = values.get("num_generations")
    if count == 1 and not reinforce:
        yield "--num-generations must be at least 2: each completion's baseline is the mean of the others"
    if reinforce and count != 1:
        yield f"--algorithm reinforce takes one completion a prompt, not --num-generations {count}"
    if reinforce and values.get("full"):
        yield "--algorithm reinforce has its value model on the frozen base, so it can't be combined with --full"
    if values.get("value_learning_rate") is not None and not reinforce:
        yield "--value-learning-rate is of --algorithm reinforce alone"
    if values.get("anchor") is not None and values.get("beta") == 0:
        yield "--anchor does nothing with --beta 0"


def _generation_conflicts(values: Mapping[str, Any]) -> Iterator[str]:
    yield from _algorithm_conflicts(values)
    count = values.get("num_generations")
    if count is None or count <= 0:
        return
    longest, completion = values["max_length"], values["max_completion_length"]
    if longest and completion and longest <= completion:
        yield f"--max-length = {longest} leaves no room for a prompt before --max-completion-length = {completion}"
    size, steps = values["per_device_train_batch_size"], values["gradient_accumulation_steps"]
    if size and steps and (size * steps) % count:
        yield (
            f"--per-device-train-batch-size x --gradient-accumulation-steps = {size * steps} completions a step "
            f"must be a multiple of --num-generations = {count}"
        )


def _is_positive(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False
