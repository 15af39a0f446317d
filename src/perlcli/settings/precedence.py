"""Settings from values, and which value an option takes. From the strongest to the weakest:

1. the command line
2. the file of --config
3. the recipe of --recipe
4. the adapter that a run starts from; what a command itself proposes, as the output folder of an evaluation
5. the embedded preset, for the embedded base on the embedded data
6. the defaults of the stage
7. the general defaults

1 and 2 are both the user's: the command line replaces the values of --config name by name (`over`). Further down, a
stronger layer also voids what its choices leave without meaning (`layered`). `recipes.fill` puts 1 and 2 over 3 before
the settings are built, and `resolve` puts the result over the rest once the model is known.
"""

from __future__ import annotations

from typing import Any, TypeVar, get_origin, get_type_hints

from perlcli.errors import PerlError, nearest
from perlcli.settings.commands import Settings, command_of
from perlcli.settings.declaring import Values, flat, options
from perlcli.settings.defaults import of_command
from perlcli.settings.faults import misfit

LENGTH = {"max_steps", "num_train_epochs"}
# Options that describe the source that --data names.
OF_DATA = {
    *("data_format", "columns", "label_map", "label_threshold", "score_field", "pairs"),
    *("subset", "split", "eval_data", "shp_score_ratio", "shp_per_post"),
}

AnyStage = TypeVar("AnyStage", bound=Settings)


def layered(*layers: Values) -> dict[str, Any]:
    """The values of several layers, the strongest first. A layer also removes weaker values that its choices leave
    without meaning: the length of a run, what describes other data, the LoRA options with --full or --peft. The fields
    of --set are merged one by one."""
    merged: dict[str, Any] = {}
    for weaker in layers:
        void = _void(merged)
        merged = over(merged, {name: value for name, value in weaker.items() if name not in void})
    return merged


def over(stronger: Values, weaker: Values) -> dict[str, Any]:
    """Stronger values over weaker ones, name by name; the fields of --set are names too."""
    merged = {**weaker, **stronger}
    given = {_field(item) for item in stronger.get("set", ())}
    if fields := (*(item for item in weaker.get("set", ()) if _field(item) not in given), *stronger.get("set", ())):
        merged["set"] = fields
    return merged


def _field(item: str) -> str:
    return item.partition("=")[0].strip().replace("-", "_")


def _void(given: Values) -> set[str]:
    """The options that a weaker layer may not set."""
    void = set(LENGTH) if LENGTH & set(given) else set()
    if given.get("data") is not None:
        void |= OF_DATA
    if given.get("full") or given.get("peft"):
        void |= {"lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"}
    return void


def resolve(settings: AnyStage, *presets: Values) -> AnyStage:
    """The same settings with every unset option filled from the presets, the strongest first, else by default. Raises
    PerlError for preset values that no option can have."""
    values = flat(settings)
    given = {name: value for name, value in values.items() if value is not None and value is not False and value != ()}
    implied = {"num_generations": 1} if given.get("algorithm") == "reinforce" else {}
    chosen = layered(given, implied, *presets)
    filled = _defaults(command_of(settings), given) | chosen
    values |= {name: value for name, value in filled.items() if name in values}
    if "value_learning_rate" in values and values["algorithm"] == "reinforce":
        values["value_learning_rate"] = values["value_learning_rate"] or values["learning_rate"]
    rank = values.get("lora_r")
    if values.get("lora_alpha", 0) is None and isinstance(rank, int) and rank > 0 and not values.get("peft"):
        values["lora_alpha"] = 2 * rank
    return build(type(settings), values)


def _defaults(command: str, given: Values) -> dict[str, Any]:
    """The defaults of a stage over the general ones."""
    defaults = of_command(command, full=bool(given.get("full")))
    void = _void(given) - LENGTH  # --max-steps overrides the epochs, which keep their default
    return {name: value for name, value in defaults.items() if name not in void}


def build(stage: type[AnyStage], values: Values) -> AnyStage:
    """Settings of the stage with these flat values. Raises PerlError for names that the stage does not have, and for
    values that no option can have."""
    known = {item.name: item for item in options(stage)}
    unknown = [name for name in values if name not in known]
    if unknown:
        hint = nearest(unknown[0], known)
        raise PerlError(f"Unknown setting for `perl {command_of(stage)}`: {', '.join(unknown)}", hint)
    faults = [f"{known[name].shown} {fault}" for name, value in values.items() if (fault := misfit(known[name], value))]
    if faults:
        raise PerlError("\n".join(faults), f"perl {command_of(stage)} --help lists the options")
    groups: dict[str, dict[str, Any]] = {item.group: {} for item in known.values()}
    for name, value in values.items():
        is_one_of_many = get_origin(known[name].type) is tuple and isinstance(value, str | int | float)
        groups[known[name].group][name] = (value,) if is_one_of_many else value
    kinds = get_type_hints(stage)
    return stage(**{group: kinds[group](**given) for group, given in groups.items()})
