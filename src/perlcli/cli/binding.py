"""Settings dataclasses as Typer options."""

from __future__ import annotations

import inspect
import re
import sys
import typing
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup

from perlcli import recipes, upstream
from perlcli import settings as definitions
from perlcli.cli import spelling
from perlcli.cli.boundary import refuse, usage_errors, with_boundary
from perlcli.cli.completion import offer
from perlcli.errors import PerlError, nearest
from perlcli.run.files import RECORD, SETTINGS
from perlcli.settings import Option, Settings, dashed
from perlcli.settings.defaults import words
from perlcli.settings.faults import type_fault
from perlcli.settings.precedence import over
from perlcli.settings.synonyms import Translation, summary
from perlcli.settings.types import choices, convert, fits, inner
from perlcli.settings.yaml import read_translated, translated
from perlcli.terminal import say
from perlcli.text import clip, one_line

if TYPE_CHECKING:
    from typer._click import Command as AnyCommand
    from typer._click import Context
    from typer._click.formatting import HelpFormatter

CONFIG_HELP = "YAML file with these options by name; the command line overrides it."
DEBUG_HELP = "Show the traceback of an error."
# Short words for values: in 80 columns, long ones would cut the names of the options.
METAVARS = {int: "N", float: "X"}
LONGEST_CHOICES = 45  # characters of choices that fit next to an option's name; longer ones go into its help
WHOLE = re.compile(r"[-+]?\d{1,20}")
NAMES = "perlcli.names"  # where a context keeps the names of trl that its command line has
Given = bool | str | list[str] | None  # what the command line has for an option


def command(app: typer.Typer, name: str, action: Callable[[Any], None]) -> None:
    """Registers an action on settings as the command `name`, with an option for every setting. The first word of a name
    of two words, such as `data check`, is the name of the app."""
    stage = definitions.ALL_COMMANDS[name]

    def run(context: typer.Context, config: str | None, debug: bool, **given: Given) -> None:
        upstream.hush()  # before a stage imports the noisy libraries
        with_boundary(lambda: action(_settings(stage, config, given, context.meta.get(NAMES))), debug=debug)

    def build() -> AnyCommand:
        parameters = [_keyword("context", typer.Context, inspect.Parameter.empty), *_parameters(stage, name)]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {item.name: item.annotation for item in parameters}
        alone = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
        alone.command(cls=Command)(run)
        return typer.main.get_command(alone)

    def listed() -> None:
        """Takes the command's place in the group's help and in completion, until a command line names the command."""

    run.__doc__ = listed.__doc__ = stage.__doc__
    listed.build = cache(build)  # type: ignore[attr-defined]
    summary = one_line(str(stage.__doc__).split("\n\n")[0])
    app.command(name.rpartition(" ")[2], short_help=summary)(listed)


class Group(TyperGroup):
    """The commands. `--lora_r` is read as `--lora-r`, since trl and transformers accept both."""

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        if not args:
            return super().parse_args(ctx, args)  # shows the help
        with usage_errors(ctx):
            return super().parse_args(ctx, _with_checkpoint([_with_dashes(argument) for argument in args]))

    def resolve_command(self, ctx: Context, args: list[str]) -> tuple[str | None, AnyCommand | None, list[str]]:
        with usage_errors(ctx):
            name, found, rest = super().resolve_command(ctx, args)
        # Options are made only for the command that is named: all of them would take a quarter of `perl --help`
        build = getattr(found.callback, "build", None) if found is not None else None
        return name, build() if build is not None else found, rest


class Command(TyperCommand):
    """A command whose help lists its options by panel, in plain text. Importing rich would take longer than everything
    else, and rich cuts the names of options in 80 columns."""

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        with usage_errors(ctx):
            return super().parse_args(ctx, _as_options(ctx, args))

    def collect_usage_pieces(self, ctx: Context) -> list[str]:
        """Arguments by their bare names: Typer would put brackets around one that a YAML file may hold instead."""
        arguments = [item for item in self.get_params(ctx) if isinstance(item, TyperArgument)]
        return ["[OPTIONS]", *(str(item.metavar).partition(" ")[0] for item in arguments)]

    def format_options(self, ctx: Context, formatter: HelpFormatter) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if isinstance(parameter, TyperArgument):
                record = str(parameter.metavar), str(parameter.help)
            if record is not None:
                panel = getattr(parameter, "rich_help_panel", None) or "Help"
                panels.setdefault(panel, []).append(record)
        for panel, records in panels.items():
            with formatter.section(panel):
                formatter.write_dl(records)


def _as_options(ctx: Context, args: list[str]) -> list[str]:
    """The words of a command line with the names of trl as options. Raises typer.Exit for names that nobody knows, with
    those of the --config file."""
    parent = ctx.parent
    within = [parent.info_name] if parent is not None and parent.parent is not None else []
    name = " ".join(map(str, [*within, ctx.info_name]))
    stage = definitions.ALL_COMMANDS.get(name)
    if stage is None or ctx.resilient_parsing or "--help" in args:
        return args
    options = {item.name: item for item in definitions.options(stage)}
    parameters = {word: item for item in ctx.command.get_params(ctx) for word in (*item.opts, *item.secondary_opts)}
    words, found, unknown = spelling.read(name, options, parameters, args)
    lines = [*spelling.unknown_names(unknown, name, options), *found.faults]
    if lines:
        config = dict(found.own).get("config")
        refuse(spelling.fault([*lines, *(_faults_of(stage, Path(config)) if config else [])], name))
    ctx.meta[NAMES] = found
    return words


def _faults_of(stage: type[Settings], config: Path) -> list[str]:
    """What is wrong with a --config file."""
    try:
        return translated(stage, config)[1].faults
    except PerlError as error:
        return [error.problem]


def _with_checkpoint(arguments: list[str]) -> list[str]:
    """The arguments with a value for each `--resume`: the checkpoint that follows it, if one does."""
    latest = f"--resume={definitions.LATEST}"
    completed: list[str] = []
    for argument in arguments:
        is_checkpoint = "/" in argument or Path(argument).name.startswith("checkpoint-")
        if completed[-1:] == [latest] and is_checkpoint and not argument.startswith("-"):
            completed[-1] = f"--resume={argument}"
        else:
            completed.append(latest if argument == "--resume" else argument)
    return completed


def _with_dashes(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


def _parameters(stage: type[Settings], command: str) -> list[inspect.Parameter]:
    config = typer.Option("--config", "-c", help=CONFIG_HELP, rich_help_panel="Run", metavar="FILE")
    debug = typer.Option("--debug", help=DEBUG_HELP, rich_help_panel="Run")
    return [
        *(_parameter(item, shown_default(item, command)) for item in definitions.options(stage)),
        _keyword("config", Annotated[str | None, config], None),
        _keyword("debug", Annotated[bool, debug], False),
    ]


@cache
def _parameter(item: Option, default: str) -> inspect.Parameter:
    """The Typer parameter of an option: a flag or text. It is None if it was not given; `default` is for the help."""
    is_flag = inner(item.type) is bool
    kind: object = bool if is_flag else list[str] if item.type == tuple[str, ...] else str
    if item.argument:
        shown = f"{shown_name(item)} {_choices_shown(item)}".rstrip()
        information = typer.Argument(
            help=item.help, rich_help_panel=item.panel, show_default=False, metavar=shown, autocompletion=offer(item)
        )
    else:
        information = typer.Option(
            *_spellings(item),
            help=_help(item, default),
            rich_help_panel=item.panel,
            show_default=False,
            metavar=None if is_flag else _metavar(item),
            autocompletion=None if is_flag else offer(item),
        )
    return _keyword(item.name, Annotated[kind | None, information], None)  # type: ignore[operator]


def _spellings(item: Option) -> list[str]:
    """How an option is typed: its name, for most flags the name that takes it back, and the short form."""
    is_negatable = inner(item.type) is bool and item.panel != "Run"
    name = f"{item.shown}/--no-{dashed(item.name)}" if is_negatable else item.shown
    return [name, item.short] if item.short else [name]


def _help(item: Option, default: str) -> str:
    """An option's help with its default, and with its choices if they are too long to stand next to its name."""
    parts = [item.help]
    if choices(item.type) and not _choices_shown(item):
        parts.append(f"One of {', '.join(choices(item.type))}.")
    if default:
        parts.append(f"(default: {default})")
    return " ".join(parts)


def _metavar(item: Option) -> str:
    """The placeholder of an option's value in the help."""
    if item.metavar or choices(item.type):
        return item.metavar or _choices_shown(item) or "NAME"
    if typing.get_origin(item.type) is tuple:
        word = METAVARS.get(typing.get_args(item.type)[0])
        return f"{word},…" if word else "TEXT"
    return METAVARS.get(inner(item.type), "TEXT")


def _choices_shown(item: Option) -> str:
    """An option's choices as the help shows them, `[drop|truncate|error]`; empty if there are none or too many."""
    shown = f"[{'|'.join(choices(item.type))}]"
    return shown if choices(item.type) and len(shown) <= LONGEST_CHOICES else ""


def shown_name(item: Option) -> str:
    """How the help names an option: `--lora-r`, or an argument's name in capitals."""
    takes_many = item.argument and typing.get_origin(item.type) is tuple
    return item.shown + ("..." if takes_many else "")


def shown_default(item: Option, command: str) -> str:
    """What the help of a command gives as an option's default; empty if there is nothing to say."""
    if "{}" in item.unset:
        return item.unset.replace("{}", words(command, item.name))
    if item.default is True:
        return "on"
    has_default = item.default is not None and item.default is not False and item.default != ()
    return item.unset or (str(item.default) if has_default else "")


def _keyword(name: str, annotation: object, default: object) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _settings(
    stage: type[Settings], config: str | None, given: Mapping[str, Given], named: Translation | None
) -> Settings:
    """The settings of a command line over its --config and its recipe. `named` are the names of trl on the command
    line. Raises PerlError."""
    values, found = read_translated(stage, Path(config)) if config else ({}, None)
    place = Path(config or "")
    if given.get("resume") is not None and place.name == SETTINGS and (place.parent / RECORD).exists():
        values["output"] = str(place.parent)  # the run may have been moved since
    filled = recipes.fill(stage, over(_typed(stage, given), values))
    for each in summary([item for item in (found, named) if item is not None], filled):
        say(each, file=sys.stderr)
    return definitions.build(stage, filled)


def _typed(stage: type[Settings], given: Mapping[str, Given]) -> dict[str, Any]:
    """The values of a command line as their options' types. Raises PerlError that lists every wrong one."""
    items = [item for item in definitions.options(stage) if given.get(item.name) is not None]
    parsed = {item.name: _parsed(given[item.name], item.type) for item in items}
    wrong = [item for item in items if not fits(parsed[item.name], item.type)]
    if wrong:
        hint = f"perl {definitions.command_of(stage)} --help lists the options"
        if len(wrong) == 1:
            hint = nearest(str(given[wrong[0].name]), choices(wrong[0].type)) or hint
        raise PerlError("\n".join(_fault(item, given[item.name]) for item in wrong), hint)
    return {item.name: convert(parsed[item.name], item.type) for item in items}


def _parsed(given: Given, kind: object) -> object:
    """What was typed for an option, with whole numbers as such and comma-separated numbers as a list."""
    if not isinstance(given, str):
        return given
    if typing.get_origin(kind) is tuple:
        return [_number(part.strip(), typing.get_args(kind)[0]) for part in given.split(",")]
    return _number(given, inner(kind))


def _number(text: str, kind: object) -> int | str:
    return int(text) if kind is int and WHOLE.fullmatch(text) else text


def _fault(item: Option, given: Given) -> str:
    if typing.get_origin(item.type) is tuple:
        words = "whole numbers" if typing.get_args(item.type)[0] is int else "numbers"
        return f"{item.shown} must be {words}, comma-separated, not {clip(str(given))}"
    return f"{item.shown} {type_fault(item, given)}"
