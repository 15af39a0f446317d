"""Settings dataclasses as Typer options."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup

from perlcli import recipes, upstream
from perlcli import settings as definitions
from perlcli.cli.boundary import with_boundary
from perlcli.errors import PerlError
from perlcli.run.files import RECORD, SETTINGS
from perlcli.settings import Option, dashed
from perlcli.settings.types import convert, fits
from perlcli.settings.yaml import read_config
from perlcli.text import clip, one_line

CONFIG_HELP = "YAML file with the same names as these options; the command line wins."
METAVARS = {int: "N", float: "X"}
WHOLE = re.compile(r"[-+]?\d{1,20}")
DEBUG_HELP = "Show the traceback of an error."


def command(app: typer.Typer, name: str) -> Callable[[Callable[[Any], None]], Callable[..., None]]:
    """Register a function of one settings object as the command `name`, with an option for every setting.

    Of a name of two words, as `data check`, the first is that of the app.
    """
    stage = definitions.ALL_COMMANDS[name]

    def register(function: Callable[[Any], None]) -> Callable[..., None]:
        def run(config: str | None, debug: bool, **given: Any) -> None:
            upstream.hush()  # before a stage imports the libraries that would speak
            with_boundary(lambda: function(_settings(stage, config, given)), debug=debug)

        parameters = _parameters(stage)
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {item.name: item.annotation for item in parameters}
        run.__doc__ = function.__doc__
        summary = one_line((function.__doc__ or "").split("\n\n")[0])
        app.command(name.rpartition(" ")[2], cls=Command, short_help=summary)(run)
        return run

    return register


class Group(TyperGroup):
    """The commands, with `--lora_r` read as `--lora-r`: trl and transformers know both."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, _with_checkpoint([_with_dashes(argument) for argument in args]))


class Command(TyperCommand):
    """A command whose help lists its options by panel, in plain text: rich alone would take longer to import than all
    the rest, and cuts the names of options in 80 columns."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Arguments by their bare names: Typer would put brackets on one that a YAML file may hold instead."""
        return ["[OPTIONS]", *(str(item.metavar) for item in self.get_params(ctx) if isinstance(item, TyperArgument))]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = (
                (str(parameter.metavar), str(parameter.help))
                if isinstance(parameter, TyperArgument)
                else parameter.get_help_record(ctx)
            )
            if record is not None:
                panels.setdefault(getattr(parameter, "rich_help_panel", None) or "Help", []).append(record)
        for panel, records in panels.items():
            with formatter.section(panel):
                formatter.write_dl(records)


def _with_checkpoint(arguments: list[str]) -> list[str]:
    """The arguments with a value for each `--resume`: the checkpoint behind it, where there is one."""
    found: list[str] = []
    for argument in arguments:
        is_place = "/" in argument or Path(argument).name.startswith("checkpoint-")
        if found and found[-1] == f"--resume={definitions.LATEST}" and is_place and argument[:1] != "-":
            found[-1] = f"--resume={argument}"
        else:
            found.append(f"--resume={definitions.LATEST}" if argument == "--resume" else argument)
    return found


def _with_dashes(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


def _parameters(stage: type[Any]) -> list[inspect.Parameter]:
    given = [_parameter(item) for item in definitions.options(stage)]
    config = Annotated[
        str | None, typer.Option("--config", "-c", help=CONFIG_HELP, rich_help_panel="Run", metavar="FILE")
    ]
    debug = Annotated[bool, typer.Option("--debug", help=DEBUG_HELP, rich_help_panel="Run")]
    return [*given, _keyword("config", config, None), _keyword("debug", debug, False)]


def _parameter(item: Option) -> inspect.Parameter:
    """The Typer parameter of an option. Its default is None, so that what the user gave can be told apart."""
    kind = bool if item.type is bool else _scalar(item.type)
    if item.argument:
        kind = list[str] if item.type == tuple[str, ...] else kind
        place = typer.Argument(help=item.help, rich_help_panel=item.panel, show_default=False, metavar=shown_name(item))
        return _keyword(item.name, Annotated[kind | None, place], None)
    negatable = kind is bool and item.panel != "Run"
    flags = [f"--{dashed(item.name)}" + (f"/--no-{dashed(item.name)}" if negatable else "")]
    flags += [item.short] if item.short else []
    shown = shown_default(item)
    help_text = item.help + (f" (default: {shown})" if shown else "")
    # Short words for the values: in 80 columns, long ones would cut the options' own names.
    word = None if kind is bool else item.metavar or METAVARS.get(kind, "TEXT")
    information = typer.Option(*flags, help=help_text, rich_help_panel=item.panel, show_default=False, metavar=word)
    annotation: Any = kind | None
    if typing.get_origin(item.type) is tuple:  # numbers come comma-separated, texts by repeating the option
        annotation = list[str] | None if item.type == tuple[str, ...] else str | None
    return _keyword(item.name, Annotated[annotation, information], None)


def shown_name(item: Option) -> str:
    """What stands for an option in the help: `--lora-r`, or an argument's name in capitals."""
    if item.argument:
        return item.name.upper() + "..." * (typing.get_origin(item.type) is tuple)
    return f"--{dashed(item.name)}"


def shown_default(item: Option) -> str:
    """What the help says an option is when it isn't given; empty where there is nothing to say."""
    return item.unset or (
        "" if item.default is None or item.default is False or item.default == () else str(item.default)
    )


def _scalar(kind: Any) -> Any:
    """The type inside `X | None`."""
    inner = [part for part in typing.get_args(kind) if part is not types.NoneType]
    return inner[0] if isinstance(kind, types.UnionType) else kind


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _settings(stage: type[Any], config: str | None, given: Mapping[str, Any]) -> Any:
    values = read_config(stage, Path(config)) if config else {}
    place = Path(config or "")
    if given.get("resume") is not None and place.name == SETTINGS and (place.parent / RECORD).exists():
        values["output"] = str(place.parent)  # where the run is now, from wherever it is called
    types_of = {item.name: item.type for item in definitions.options(stage)}
    for name, value in given.items():
        if value is not None:
            values[name] = _typed(name, value, types_of[name])
    return definitions.build(stage, recipes.fill(stage, values))


def _typed(name: str, value: Any, kind: Any) -> Any:
    """A value of the command line as its setting's type; raises PerlError for a list with something else in it."""
    if typing.get_origin(kind) is not tuple:
        return value
    parts = value if isinstance(value, list) else [part.strip() for part in value.split(",")]
    is_whole = typing.get_args(kind)[0] is int
    if is_whole:
        parts = [int(part) if WHOLE.fullmatch(part) else part for part in parts]
    if not fits(parts, kind):
        what = "whole " * is_whole + "numbers"
        raise PerlError(f"--{dashed(name)} must be {what}, comma-separated, not {clip(str(value))}")
    return convert(parts, kind)
