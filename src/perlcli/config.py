"""Settings from YAML files, read and checked against the options of a command. Errors name the file."""

from __future__ import annotations

from collections.abc import Mapping
from keyword import iskeyword
from pathlib import Path
from typing import Any

from perlcli import settings
from perlcli.errors import PerlError, nearest, reason, shorten
from perlcli.values import convert, describe, fits


def read_config(stage: type[Any], path: Path) -> dict[str, Any]:
    """The settings in a YAML file; raises PerlError that names every unknown key and every wrong type."""
    values, faults = checked(stage, read_mapping(path, "--config"), str(path))
    if faults:
        raise PerlError("\n".join(faults), f"perl {settings.command_of(stage)} --help lists the names")
    return values


def read_mapping(path: Path, option: str) -> dict[Any, Any]:
    """The `name: value` lines of a YAML file that `option` names; raises PerlError for a file that holds others."""
    import yaml  # 20 ms that a call without a file needn't pay

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise PerlError(f"Can't read {option} {path}: {reason(error)}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date like 2024-13-45
        raise PerlError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise PerlError(f"{path} must hold `name: value` lines, not a {type(content).__name__}")
    return content


def checked(stage: type[Any], content: Mapping[Any, Any], place: str) -> tuple[dict[str, Any], list[str]]:
    """The values that are settings of the stage, as their types, and a line for every fault, which names the place."""
    known = {item.name: item for item in settings.options(stage)}
    values, faults = {}, []
    for key, value in content.items():
        name = str(key).replace("-", "_")
        name += "_" if iskeyword(name) else ""
        if name not in known:
            faults.append(f"{place}: unknown key {key}. {nearest(name, known)}".rstrip())
        elif not fits(value, known[name].type):
            faults.append(f"{place}: {key} must be {describe(known[name].type)}, not {shorten(value)}")
        else:
            values[name] = convert(value, known[name].type)
    return values, faults
