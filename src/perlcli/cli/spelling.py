"""Reads a command line as trl's users type it: its names, `--flag true`, and lists with spaces between items."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from perlcli.errors import PerlError
from perlcli.settings.declaring import Option, dashed
from perlcli.settings.naming import NO, YES, Kind
from perlcli.settings.synonyms import Translation, entry, translate
from perlcli.settings.unknown_names import meaning, typed

if TYPE_CHECKING:
    from typer._click import Parameter

SPACED = {"lora_target_modules": ",", "report_to": ",", "reward_weights": ","}  # lists that are one word here
REPEATED = ("reward", "reward_kwargs", "set")  # lists of which each item is an option by itself here
ALONE = {"gradient_checkpointing": "true"}  # options with a value that are flags in trl, and their value then


@dataclass
class Words:
    """A command line that is read from left to right."""

    options: Mapping[str, Option]  # the command's, by name
    parameters: Mapping[str, Parameter]  # click's, by what is typed: `--lora-r`, `--no-full`, `-m`
    command: str
    left: list[str]
    kept: list[str] = field(default_factory=list)  # words for click
    own: list[tuple[object, Any]] = field(default_factory=list)  # the command's options
    theirs: dict[str, Any] = field(default_factory=dict)  # of another tool
    unknown: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def following(self, kind: Kind) -> list[str]:
        """Takes the words that belong to the option before them."""
        if kind == "one" or (kind == "many" and self.has_arguments()):
            return [self.left.pop(0)] if self.left else []
        if kind == "flag":
            return [self.left.pop(0)] if self.left and self.left[0].lower() in (*YES, *NO) else []
        taken = []
        while self.left and not is_option(self.left[0]):
            taken.append(self.left.pop(0))
        return taken

    def has_arguments(self) -> bool:
        """Whether words without a name before them may be arguments of the command."""
        return any(item.argument for item in self.options.values())


def is_option(word: str) -> bool:
    """Whether a word is the name of an option, and not a negative number."""
    return word.startswith("-") and len(word) > 1 and not word[1].isdigit() and word[1] != "."


def read(
    command: str, options: Mapping[str, Option], parameters: Mapping[str, Parameter], words: Sequence[str]
) -> tuple[list[str], Translation, list[str]]:
    """The words of a command line as click reads them, which of them were names of trl, and the names that nobody
    knows."""
    line = Words(options, parameters, command, list(words))
    while line.left:
        word = line.left.pop(0)
        if word == "--":
            line.kept += [word, *line.left]
            break
        if word.startswith("--"):
            _read_name(line, word)
        else:
            line.kept.append(word)
            if word in parameters and not _is_flag(parameters[word]):
                value = line.following("one")
                line.kept += value
                line.own += [(parameters[word].name, each) for each in value]
    own = [item for item in line.own if item[0] in options]
    found = translate(command, options, [*own, *line.theirs.items()])
    found.own += [item for item in line.own if item[0] not in options]  # --config
    found.faults = [*line.faults, *found.faults]
    return [*line.kept, *_as_words(found.added, options)], found, line.unknown


def _read_name(line: Words, word: str) -> None:
    """Reads an option with what belongs to it."""
    shown, equals, value = word.partition("=")
    name = shown[2:].replace("-", "_")
    negated = name.removeprefix("no_")
    is_ours = shown in line.parameters and name not in line.options  # --debug, --config
    theirs = None if is_ours else entry(name, line.command, line.options)
    if theirs is not None:
        given = [value] if equals else line.following(theirs.kind)
        if not given and theirs.kind != "flag":
            line.faults.append(f"Option '{shown}' requires an argument")
        elif theirs.kind == "many":
            line.theirs[name] = [*line.theirs.get(name, ()), *given]
        else:
            line.theirs[name] = given[0] if given else "true"
    elif shown in line.parameters:
        _keep(line, shown, name, [value] if equals else None)
    elif name != negated and (found := entry(negated, line.command, line.options)) and found.kind == "flag":
        line.theirs[negated] = "false"
    elif name != negated and negated in ALONE and negated in line.options:
        _add(line, negated, f"--{dashed(negated)}", ["false"])
    else:
        line.unknown.append(shown)
        line.following("many")


def _keep(line: Words, shown: str, name: str, value: list[str] | None) -> None:
    """Keeps an option of the command, in the spelling that click reads."""
    parameter = line.parameters[shown]
    if _is_flag(parameter):
        text = (value or line.following("flag") or ["true"])[0].lower()
        if text in NO and name in line.options:
            other = f"--no-{dashed(name)}"
            line.kept += [other] if other in line.parameters else []
            line.own.append((name, False))
        else:
            line.kept.append(shown if value is None or text in YES else f"{shown}={value[0]}")
            line.own.append((name, True) if name in line.options else (name.removeprefix("no_"), False))
        return
    if value is None and name in ALONE and (not line.left or is_option(line.left[0])):
        value = [ALONE[name]]
    given = value if value is not None else line.following("one")
    if value is None and (name in SPACED or name in REPEATED) and not line.has_arguments():
        given = [*given, *line.following("many")]
    _add(line, name, shown, given)


def _add(line: Words, name: str, shown: str, given: list[str]) -> None:
    if name in SPACED and len(given) > 1:
        given = [SPACED[name].join(part.rstrip(",") for part in given)]
    if name in ALONE or name == "dtype":
        given = [word.lower() for word in given]
    line.own += [(name, word) for word in given]
    line.kept += [f"{shown}={word}" for word in given] or [shown]


def _is_flag(parameter: Parameter) -> bool:
    return bool(getattr(parameter, "is_flag", False))


def _as_words(added: Mapping[str, Any], options: Mapping[str, Option]) -> Iterator[str]:
    """Values of options as they are typed."""
    for name, value in added.items():
        shown = typed(options[name].name)
        if isinstance(value, bool):
            yield shown if value else f"--no-{dashed(name)}"
        elif isinstance(value, list) and name not in REPEATED:
            yield f"{shown}={','.join(map(str, value))}"
        else:
            yield from (f"{shown}={item}" for item in (value if isinstance(value, list) else [value]))


def unknown_names(names: Sequence[str], command: str, options: Mapping[str, Option]) -> list[str]:
    """A line for each name that nobody knows, with what it may mean."""
    known = [*options, "config", "debug", "help"]
    lines = []
    for name in dict.fromkeys(names):
        hint = meaning(name.removeprefix("--no-").removeprefix("--"), command, known, typed)
        lines.append(f"No such option: {name}" + (f". {hint}" if hint else ""))
    return lines


def fault(lines: Sequence[str], command: str) -> PerlError:
    """The error for names that nobody knows and other faults, one in a line."""
    help_hint = f"perl {command} --help lists the options"
    if len(lines) == 1:
        problem, _, hint = lines[0].partition(". ")
        if problem.startswith("No such option: "):
            return PerlError(problem, hint or help_hint)
    return PerlError("\n".join(lines), help_hint)
