"""The commands of perlcli. Each stage is imported inside its command, so that the help loads no torch."""

from __future__ import annotations

from typing import Annotated

import typer

from perlcli import __version__, recipes, settings
from perlcli.cli.binding import DEBUG_HELP, Command, Group, command
from perlcli.cli.boundary import with_boundary
from perlcli.terminal import visible

app = typer.Typer(
    name="perl",
    cls=Group,
    help="LoRA RLHF from the shell: the open implementation of PERL (arXiv 2403.10704).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(asked: bool) -> None:
    if asked:
        print(f"perlcli {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """LoRA RLHF from the shell: the open implementation of PERL (arXiv 2403.10704)."""


@command(app, "sft")
def sft(given: settings.Sft) -> None:
    """Fine-tune on demonstrations: gives the policy that RL starts from, and its anchor.

    Example: perl sft --model HuggingFaceTB/SmolLM2-135M-Instruct --data chats.jsonl --output runs/sft
    """
    from perlcli.commands import sft as sft_module
    from perlcli.run import summary

    summary.show(sft_module.run(given))


@command(app, "reward")
def reward(given: settings.Reward) -> None:
    """Train a reward model on pairs (chosen, rejected) or on thumbs up or down (prompt, completion, label).

    Example: perl reward --model HuggingFaceTB/SmolLM2-135M-Instruct --data pairs.jsonl --output runs/reward
    """
    from perlcli.commands import reward as reward_module
    from perlcli.run import summary

    summary.show(reward_module.run(given))


@command(app, "rl")
def rl(given: settings.Rl) -> None:
    """Train the policy with RL (RLOO or the paper's REINFORCE) on a reward, with a KL penalty towards its anchor.

    Example: perl rl --model runs/sft --reward runs/reward --data prompts.jsonl --output runs/rl
    """
    from perlcli.commands import rl as rl_module
    from perlcli.run import summary

    summary.show(rl_module.run(given))


@command(app, "eval")
def evaluate(given: settings.Eval) -> None:
    """Evaluate a reward model on held-out preferences, or a policy against its anchor.

    Examples: perl eval --model runs/reward --data dev.jsonl;  perl eval --model runs/rl --reward runs/reward
    """
    from perlcli.commands import evaluate as evaluate_module
    from perlcli.run import summary

    summary.show(evaluate_module.run(given))


@command(app, "merge")
def merge(given: settings.Merge) -> None:
    """Merge an adapter into its base: gives an ordinary model that plain transformers can load.

    Example: perl merge runs/rl --output runs/rl-merged
    """
    from perlcli.commands import merge as merge_module
    from perlcli.run import summary

    summary.show(merge_module.run(given))


@command(app, "quickstart")
def quickstart(given: settings.Quickstart) -> None:
    """Watch a tiny model learn from preferences in a few minutes: SFT, reward, RL and evaluation; needs no GPU.

    Example: perl quickstart
    """
    from perlcli.commands import quickstart as quickstart_module

    quickstart_module.run(given)


@command(app, "compare-full")
def compare_full(given: settings.CompareFull) -> None:
    """Compare LoRA with full tuning: memory, speed and quality of each arm, next to the paper's ratios.

    Example: perl compare-full reward --model HuggingFaceTB/SmolLM2-135M-Instruct --data pairs.jsonl --lora-r 1,4,16
    """
    from perlcli.commands import compare_full as compare_full_module

    compare_full_module.run(given)


@command(app, "runs")
def runs(given: settings.Runs) -> None:
    """List the runs in a folder: stage, status, steps, model, key figure, age and size, with live progress.

    Example: perl runs
    """
    from perlcli.commands import runs as runs_module

    runs_module.run(given)


@command(app, "report")
def report(given: settings.Report) -> None:
    """Compare finished runs of any stage side by side: cost, quality, and the ratios to full tuning.

    Example: perl report runs/reward-full runs/reward --output runs/report
    """
    from perlcli.commands import report as report_runs

    report_runs.run(given)


@command(app, "estimate")
def estimate(given: settings.Estimate) -> None:
    """Predict the memory that training needs from a model's config: which arms fit, and with which batch size.

    Example: perl estimate rl --model HuggingFaceTB/SmolLM2-135M-Instruct --gpu 24GB
    """
    from perlcli.commands import estimate as estimate_module

    estimate_module.run(given)


@command(app, "doctor")
def doctor(given: settings.Doctor) -> None:
    """Check this machine: versions, GPU, disk, what to install, and each precision by a forward and backward pass.

    Example: perl doctor
    """
    from perlcli.commands import doctor as doctor_module

    doctor_module.run(given)


data_app = typer.Typer(
    cls=Group,
    help="Check data before training, show how the model sees it, or convert it to TRL's format.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(data_app, name="data", short_help="Check, show or convert data before training.")


@command(data_app, "data check")
def data_check(given: settings.DataCheck) -> None:
    """Report which commands can use a file, and which of its rows would be dropped, are too long or are repeated.

    Example: perl data check pairs.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct
    """
    from perlcli.commands import data_check as data_check_module

    data_check_module.run(given)


@command(data_app, "data show")
def data_show(given: settings.DataShow) -> None:
    """Print the first rows as the model sees them, with special tokens, and with the trained tokens marked.

    Example: perl data show pairs.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct --rows 2 --for reward
    """
    from perlcli.commands import data_show as data_show_module

    data_show_module.run(given)


@command(data_app, "data convert")
def data_convert(given: settings.DataConvert) -> None:
    """Convert data of any known format to JSONL in TRL's format.

    Example: perl data convert hh.jsonl --output pairs.jsonl
    """
    from perlcli.commands import data_convert as data_convert_module

    data_convert_module.run(given)


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
