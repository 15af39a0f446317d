"""Which value an option takes. From the strongest to the weakest:

1. the command line
2. the file of --config
3. the recipe of --recipe
4. the adapter that a run starts from; what a command itself proposes, as the output folder of an evaluation
5. the embedded preset, for the embedded base on the embedded data
6. the defaults of the stage
7. the general defaults

1 and 2 are both the user's: the command line replaces the values of --config name by name. Further down, a stronger
layer also voids what its choices leave without meaning (`layered`). `recipes.fill` puts 1 and 2 over 3 before the
settings are built, and `resolve` puts the result over the rest once the model is known.
"""

from __future__ import annotations

from typing import Any, TypeVar

from perlcli.settings.building import build, flat
from perlcli.settings.choices import ATTENTION
from perlcli.settings.commands import Settings, command_of
from perlcli.settings.declaring import Values

# Sources: the paper (arXiv 2403.10704, section 4 and appendix) for the learning rates of reward and RL, beta and
# temperature; TRL's recommendation of ten times the full-tuning rate for LoRA in SFT; TRL's defaults elsewhere.
GENERAL = {
    "max_length": 1024,
    "num_train_epochs": 1.0,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "lora_r": 16,
    "lora_dropout": 0.0,
    "lora_target_modules": ATTENTION,
    "temperature": 0.7,
    "beta": 0.05,
    "num_generations": 4,
    "max_completion_length": 128,
}
LEARNING_RATES = {"sft": (2e-4, 2e-5), "reward": (1e-4, 1e-5), "rl": (1e-5, 1e-6)}  # LoRA, full tuning
RL_ACCUMULATION = 4
LENGTH = {"max_steps", "num_train_epochs"}
# Options that describe the source that --data names.
OF_DATA = {"data_format", "subset", "split", "eval_data", "shp_score_ratio", "shp_per_post"}

AnyStage = TypeVar("AnyStage", bound=Settings)


def layered(*layers: Values) -> dict[str, Any]:
    """The values of several layers, the strongest first.

    A layer also removes weaker values that its choices leave without meaning: the length of a run, what describes
    other data, the LoRA options with --full or --peft. The fields of --set are merged one by one.
    """
    merged: dict[str, Any] = {}
    for weaker in layers:
        void = _void(merged)
        fields = (*_fields_not_in(merged, weaker), *merged.get("set", ()))
        merged = {name: value for name, value in weaker.items() if name not in void} | merged
        if fields:
            merged["set"] = fields
    return merged


def _void(given: Values) -> set[str]:
    """The options that a weaker layer may not set."""
    void: set[str] = set()
    if LENGTH & set(given):
        void |= LENGTH
    if given.get("data") is not None:
        void |= OF_DATA
    if given.get("full") or given.get("peft"):
        void |= {"lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"}
    return void


def _fields_not_in(given: Values, weaker: Values) -> tuple[str, ...]:
    """The weaker layer's fields of --set, without those that are given."""
    own = {item.partition("=")[0] for item in given.get("set", ())}
    return tuple(item for item in weaker.get("set", ()) if item.partition("=")[0] not in own)


def resolve(settings: AnyStage, *presets: Values) -> AnyStage:
    """The same settings with every unset option filled from the presets, the strongest first, else by default. Raises
    PerlError for preset values that no option can have."""
    values = flat(settings)
    given = {name: value for name, value in values.items() if value is not None and value is not False}
    chosen = layered(given, _implied(given), *presets)
    filled = _defaults(command_of(settings), given) | chosen
    values |= {name: value for name, value in filled.items() if name in values}
    if "value_learning_rate" in values and values["algorithm"] == "reinforce":
        values["value_learning_rate"] = values["value_learning_rate"] or values["learning_rate"]
    if "lora_alpha" in values and values["lora_alpha"] is None and not values.get("peft"):
        rank = values["lora_r"]
        values["lora_alpha"] = 2 * rank if isinstance(rank, int) and rank > 0 else None
    return build(type(settings), values)


def _implied(given: Values) -> dict[str, Any]:
    """What a choice of the user's implies for other options."""
    return {"num_generations": 1} if given.get("algorithm") == "reinforce" else {}


def _defaults(command: str, given: Values) -> dict[str, Any]:
    """The defaults of a stage over the general ones."""
    defaults: dict[str, Any] = GENERAL | {"output": f"runs/{command}"}
    if command == "rl":
        defaults["gradient_accumulation_steps"] = RL_ACCUMULATION
    if command in LEARNING_RATES:
        lora_rate, full_rate = LEARNING_RATES[command]
        defaults["learning_rate"] = full_rate if given.get("full") else lora_rate
    void = _void(given) - LENGTH  # --max-steps overrides the epochs, which keep their default
    return {name: value for name, value in defaults.items() if name not in void}
