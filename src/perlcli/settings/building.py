"""Settings from flat values, and back."""

from __future__ import annotations

from typing import Any, TypeVar, get_origin, get_type_hints

from perlcli.errors import PerlError, nearest
from perlcli.settings.commands import Settings, command_of
from perlcli.settings.declaring import Values, options
from perlcli.settings.values import misfit

AnyStage = TypeVar("AnyStage", bound=Settings)


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
        is_one_of_many = isinstance(value, str) and get_origin(known[name].type) is tuple
        groups[known[name].group][name] = (value,) if is_one_of_many else value
    kinds = get_type_hints(stage)
    return stage(**{group: kinds[group](**given) for group, given in groups.items()})


def flat(settings: Settings) -> dict[str, Any]:
    """The settings as one flat mapping of option names to values."""
    return {item.name: getattr(getattr(settings, item.group), item.name) for item in options(type(settings))}
