"""Checks between the values of settings; the limits of a single value are in its option's declaration."""

from __future__ import annotations

from collections.abc import Iterator

from perlcli.errors import PerlError
from perlcli.settings.building import flat
from perlcli.settings.choices import LORA
from perlcli.settings.commands import Settings, command_of
from perlcli.settings.declaring import Values, dashed, options
from perlcli.settings.values import limit_faults


def check(settings: Settings) -> None:
    """Raises PerlError that lists every value outside its limits and every conflict between values."""
    values = flat(settings)
    faults = [*limit_faults(options(type(settings)), values), *_conflicts(values)]
    if faults:
        raise PerlError("\n".join(faults), f"perl {command_of(settings)} --help lists the options")


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
    yield from _held_out_conflicts(values)
    yield from _reward_conflicts(values)
    yield from _generation_conflicts(values)
    weight = values.get("pos_weight", "none")
    if weight not in ("auto", "none") and not _is_positive(weight):
        yield f"--pos-weight must be auto, none or a number above 0, not {weight}"


def _adapter_conflicts(values: Values) -> Iterator[str]:
    given = [name for name in LORA if values.get(name)]
    if values.get("full") and (given or values.get("peft")):
        yield "--full uses no adapter, so the --lora options, --use-dora and --peft can't be given"
    elif values.get("peft") and given:
        names = ", ".join(f"--{dashed(name)}" for name in given)
        yield f"--peft {values['peft']} describes the adapter completely, so {names} can't be given too"


def _held_out_conflicts(values: Values) -> Iterator[str]:
    if values.get("eval_fraction") is not None and values.get("eval_data") is not None:
        yield "--eval-data and --eval-fraction can't be combined: each chooses the held-out rows"


def _reward_conflicts(values: Values) -> Iterator[str]:
    names, weights = values.get("reward", ()), values.get("reward_weights", ())
    if weights and len(weights) != len(names):
        yield f"--reward-weights has {len(weights)} weights for {len(names)} --reward"
    if weights and not any(weights):
        yield "--reward-weights are all 0: nothing would be learned"
    yield from (f"--reward {name} is given twice" for name in dict.fromkeys(names) if names.count(name) > 1)


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
            f"--per-device-train-batch-size x --gradient-accumulation-steps = {size * steps} completions per step "
            f"must be a multiple of --num-generations = {count}"
        )


def _is_positive(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False
