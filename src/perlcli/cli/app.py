"""The Typer app of all commands."""

from __future__ import annotations

import re
from functools import partial
from importlib import import_module
from typing import Annotated

import typer

from perlcli import __version__, recipes, settings
from perlcli.cli.binding import DEBUG_HELP, Command, Group, command
from perlcli.cli.boundary import with_boundary
from perlcli.run import launch
from perlcli.terminal import visible

HELP = "LoRA RLHF from the shell: the open implementation of PERL (arXiv 2403.10704)."
SUMMARISED = ("sft", "reward", "rl", "eval", "merge")  # the others print their own results
WRITERS = (*settings.COMMANDS, "data convert")  # what several processes would write at once
app = typer.Typer(
    name="perl", cls=Group, help=HELP, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None
)


def _version(asked: bool) -> None:
    if asked:
        print(f"perlcli {__version__}")
        raise typer.Exit


@app.callback(help=HELP)
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """The options of `perl` itself."""


data_app = typer.Typer(
    cls=Group,
    help="Check data before training, show how the model sees it, or convert it to TRL's format.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(data_app, name="data", short_help="Check, show or convert data before training.")


def _run(name: str, given: settings.Settings) -> None:
    """Runs a command. Its module is imported only now, so that neither the help nor a plain mistake loads torch."""
    if name in WRITERS:
        launch.check(name)
    from perlcli.commands import early  # the help needs none of it

    given = early.check(given)
    module = "evaluate" if name == "eval" else re.sub("[- ]", "_", name)
    record = import_module(f"perlcli.commands.{module}").run(given)
    if name in SUMMARISED:
        from perlcli.run import summary

        summary.show(record)


for _name in settings.ALL_COMMANDS:
    command(data_app if _name in settings.DATA_COMMANDS else app, _name, partial(_run, _name))

USE = "To run one: perl sft --recipe NAME, and so on. To change one: perl recipes show NAME > mine.yaml"
shelf = typer.Typer(cls=Group, invoke_without_command=True, rich_markup_mode=None)
app.add_typer(shelf, name="recipes", short_help="List the recipes: the paper's tasks as YAML.")


@shelf.callback()
def list_recipes(context: typer.Context) -> None:
    """List the recipes for the option --recipe: the paper's tasks with their data, settings and evaluation.

    Example: perl recipes
    """
    if context.invoked_subcommand is None:
        with_boundary(lambda: print(f"{recipes.table()}\n\n{USE}"), debug=False)


@shelf.command("show", cls=Command)
def show_recipe(
    name: Annotated[str, typer.Argument(help="Name or YAML file of the recipe.", metavar="NAME", show_default=False)],
    debug: Annotated[bool, typer.Option("--debug", help=DEBUG_HELP)] = False,
) -> None:
    """Print the YAML of a recipe, to copy and change.

    Example: perl recipes show tldr > mine.yaml
    """
    with_boundary(lambda: print(visible(recipes.text(name)), end=""), debug=debug)


def main() -> None:
    """Runs the command line of this process."""
    app()
