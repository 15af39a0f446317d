"""Reads the names of other tools, so far those of trl, as options of a command."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from perlcli.settings import trl_names
from perlcli.settings.declaring import dashed
from perlcli.settings.naming import PASSED, Name, plain, switch
from perlcli.text import clip, shorten

ADAPTER = {"full", "peft", "use_dora", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"}
FULL_THERE = "without use_peft, trl trains all parameters; perl trains an adapter, and all parameters with --full"
Claim = tuple[str, Any]  # a name, and the value that it gives to an option


@dataclass
class Translation:
    """What was given on the command line or in a file, in the names of the command's options."""

    place: str = ""  # where a fault is, such as `run.yaml: `; empty on the command line
    own: list[tuple[object, Any]] = field(default_factory=list)  # names that aren't of another tool, as they were given
    added: dict[str, Any] = field(default_factory=dict)  # values of options, from the names of another tool
    words: list[str] = field(default_factory=list)  # `model_name_or_path → --model`
    notes: list[str] = field(default_factory=list)  # names without effect, with what happens instead
    faults: list[str] = field(default_factory=list)

    def shown(self, name: str) -> str:
        """A name as the user writes it: with dashes on the command line."""
        return name if self.place else f"--{dashed(name)}"

    def refuse(self, problem: str) -> None:
        """Adds a fault."""
        self.faults.append(self.place + problem)


def entry(name: str, command: str, options: Collection[str]) -> Name | None:
    """What a name of another tool becomes in a command with these options; None for the command's own names, and for
    names that no tool has."""
    found = trl_names.find(name, command)
    if found is None or (name in options and found.option != name):
        return None
    if found.is_decided:
        return found if {"model", "data"} <= set(options) else None
    return found if found.option in options else None


def translate(
    command: str, options: Collection[str], given: Iterable[tuple[object, Any]], place: str = ""
) -> Translation:
    """The names of another tool among those that were given, as options of the command. `place` is the file that they
    are in, before each fault; on the command line it is empty, and values are text."""
    result = Translation(place)
    claims: dict[str, list[Claim]] = {}
    for key, value in given:
        name = key.replace("-", "_") if isinstance(key, str) else ""
        found = entry(name, command, options)
        if found is None:
            result.own.append((key, value))
            continue
        for option, meant in _values(name, found, value, result).items():
            claims.setdefault(option, []).append((name, meant))
    for option, claimed in claims.items():
        own = [(option, value) for key, value in result.own if _is_called(key, option)]
        (_settle_passed if option == PASSED else _settle)(option, own, claimed, result)
    _pair(result.added)
    return result


def summary(translations: Iterable[Translation], values: Mapping[str, Any]) -> list[str]:
    """The lines that say which names of trl were read, and as what; none if there were none. `values` are those of the
    options that were given, by any name."""
    words = [word for each in translations for word in each.words]
    notes = list(dict.fromkeys(note for each in translations for note in each.notes))
    passed = [word.partition(" →")[0] for word in words if word.endswith("→ --set")]
    named = [word for word in words if not word.endswith("→ --set")]
    if passed:
        named.append(f"{', '.join(dict.fromkeys(passed))} → --set")
    lines = [f"trl's names: {', '.join(dict.fromkeys(named))}"] if named else []
    if notes:
        lines.append(f"No effect: {'; '.join(notes)}")
    if "model" in values and any(word.startswith("model_name_or_path") for word in words) and not ADAPTER & set(values):
        lines.append(f"Note: {FULL_THERE}.")
    return lines


def _is_called(key: object, option: str) -> bool:
    return isinstance(key, str) and key.replace("-", "_") == option


def _values(name: str, found: Name, value: object, result: Translation) -> Mapping[str, Any]:
    """The values of options that another tool's name and value become. Faults, notes and words go to the result."""
    if found.is_fine(value):
        return {}
    if found.is_decided:
        if found.why:
            result.refuse(f"{result.shown(name)}: {found.why}")
        else:
            result.notes.append(f"{name} ({found.note})")
        return {}
    try:
        values = _read(found, value)
    except ValueError as error:
        result.refuse(f"{result.shown(name)} {error}")
        return {}
    result.words += [f"{name} → {_words(name, *item, found)}" for item in values.items() if item[0] != name]
    return values


def _read(found: Name, value: object) -> Mapping[str, Any]:
    if found.read is not None:
        return found.read(value)
    if found.option == PASSED:
        return {PASSED: {found.field: switch(value) if found.kind == "flag" else value}}
    return {found.option: value}


def _words(name: str, option: str, value: object, found: Name) -> str:
    """An option as it is typed, with its value if that isn't the one given."""
    if option == PASSED:
        there = next(iter(value)) if isinstance(value, dict) else ""
        return "--set" if there == name else f"--set {there}"
    if isinstance(value, bool):
        return f"--{dashed(option)}" if value else f"--no-{dashed(option)}"
    is_other = found.read is not None
    return f"--{dashed(option)} {clip(value)}" if is_other and isinstance(value, str) else f"--{dashed(option)}"


def _settle(option: str, own: list[Claim], claimed: list[Claim], result: Translation) -> None:
    """Adds the value of an option that one or several names give, or the fault that they differ."""
    if option in ("reward", "reward_kwargs") and not own:  # trl adds its reward model and functions up
        result.added[option] = [item for _, value in claimed for item in set_items(value)]
        return
    strong = [claim for claim in (*own, *claimed) if not _is_weak(*claim)] or [*own, *claimed]
    name, value = strong[0]
    for other, differs in strong[1:]:
        if plain(differs) != plain(value):
            both = f"{result.shown(name)} and {result.shown(other)} set --{dashed(option)} to different values"
            result.refuse(f"{both}: {shorten(value)} and {shorten(differs)}")
    if strong[0] not in own:
        result.own = [item for item in result.own if not _is_called(item[0], option)]  # weaker
        result.added[option] = value


def _settle_passed(option: str, own: list[Claim], claimed: list[Claim], result: Translation) -> None:
    """Adds the fields that are passed on, each once, or the fault that names of the same field differ."""
    is_text = not result.place
    fields: dict[str, tuple[str, str]] = {}  # each field's name there, and its item
    for _, value in own:
        for item in map(str, set_items(value, is_text=is_text)):
            there = item.partition("=")[0].strip().replace("-", "_")
            fields[there] = f"{result.shown(option)} {there}", item.partition("=")[2]
    added = {}
    for name, values in claimed:
        for there, value in values.items():
            text = _text(value, is_text=is_text)
            other, differs = fields.setdefault(there, (result.shown(name), text))
            if plain(differs) != plain(text):
                both = f"{result.shown(name)} and {other} have different values"
                result.refuse(f"{both}: {shorten(value)} and {shorten(differs)}")
            if other == result.shown(name):
                added[there] = text
    result.added[option] = [f"{there}={text}" for there, text in added.items()]


def _is_weak(name: str, value: object) -> bool:
    """Whether a value leaves the choice to another name of the same option."""
    return value == "auto" or (name == "bf16" and value == "float32")


def _pair(added: dict[str, Any]) -> None:
    """Gives each reward its keyword arguments, where only some came with them."""
    kwargs = added.get("reward_kwargs")
    if kwargs and "reward" in added:
        added["reward_kwargs"] = ["{}"] * (len(added["reward"]) - len(kwargs)) + kwargs


def set_items(value: object, *, is_text: bool = False) -> list[Any]:
    """The value of `set` as a list of `name=value`; a mapping has one for each of its fields."""
    if isinstance(value, dict):
        return [f"{name}={_text(item, is_text=is_text)}" for name, item in value.items()]
    return list(value) if isinstance(value, list | tuple) else [value]


def _text(value: object, *, is_text: bool) -> str:
    """A value of YAML as text that is read as the same value; text of the command line as it is."""
    if isinstance(value, str) and (is_text or _reads(value) == value):
        return value
    if is_text and isinstance(value, list):
        return f"[{', '.join(value)}]"
    return json.dumps(value, ensure_ascii=False, default=str)


def _reads(text: str) -> object:
    """What YAML reads; None if the text is not valid."""
    import yaml

    from perlcli.settings.yaml_loader import Loader

    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, OverflowError):
        return None
