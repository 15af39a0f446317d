"""The parts of the documentation that are generated from the code by `make docs`: options, recipes, module map."""

from __future__ import annotations

import ast
from itertools import groupby
from pathlib import Path

from perlcli import recipes, settings
from perlcli.cli.binding import CONFIG_HELP, DEBUG_HELP, shown_default, shown_name
from perlcli.settings import trl_names
from perlcli.settings.naming import PASSED
from perlcli.settings.types import describe
from perlcli.text import markdown_table, one_line

PACKAGE = Path(__file__).parents[1]
# The packages and modules, lowest first: each imports only from those before it (tests/test_layers.py).
ROOMS = {
    "text": "text for people: lines, numbers, tables, Markdown",
    "errors": "errors that the user can fix",
    "redaction": "removes home folders and secrets from what is saved and printed",
    "stats": "the figures of reward models and policies",
    "paired": "intervals of the differences between two policies",
    "upstream": "silences the libraries that perlcli uses, and sets up torch's allocator",
    "interpreter": "finds the Perl interpreter",
    "terminal": "printing",
    "web": "asking servers over HTTP",
    "settings": "every option: name, type, default, help, limits",
    "arms": "the ways to train: full tuning, LoRA, DoRA",
    "device": "what this machine can do",
    "coffee": "the embedded example: base, data, gold check",
    "recipes": "the paper's tasks as YAML",
    "run": "a run's folder: record, files, checkpoints",
    "data": "from files to rows to tokens",
    "model": "the frozen base, its tokenizer, adapters and scorers",
    "rollouts": "what samples completions: the model in memory, or an engine",
    "memory": "predicting memory from a config",
    "doctor": "the checks of `perl doctor`",
    "training": "from settings to TRL's trainers",
    "comparison": "arms, their processes, results and reports",
    "commands": "one module for each command",
    "cli": "the Typer app",
    "entry": "`perl`, or the Perl interpreter",
    "__main__": "`python -m perlcli`",
}


def commands() -> str:
    """Every command with its help text and a table of its options, as Markdown."""
    return "\n\n".join(_command(name) for name in settings.ALL_COMMANDS)


def recipe_table() -> str:
    """Every recipe with its title and stages, as Markdown."""
    shelf = [recipes.read(name) for name in recipes.names()]
    rows = [(f"`{recipe.name}`", recipe.title, ", ".join(recipe.stages)) for recipe in shelf]
    return markdown_table(("recipe", "task", "stages"), rows)


def names_of_trl() -> str:
    """What each name of trl becomes, as Markdown; the names that are options of perlcli too are left out."""
    rows: dict[str, list[str]] = {}
    for name, found in trl_names.NAMES.items():
        option = f"`--{settings.dashed(found.option)}{' ' + found.field if found.option == PASSED else ''}`"
        words = option if found.option else f"refused: {found.why}" if found.why else f"no effect: {found.note}"
        rows.setdefault(words.removesuffix(": ").rstrip(), []).append(f"`{name}`")
    for command, fields in trl_names.FIELDS.items():
        rows[f"passed on by `perl {command}`, as with `--set`"] = [f"`{name}`" for name in sorted(fields)]
    return markdown_table(("trl", "perlcli"), [(", ".join(names), words) for words, names in rows.items()])


def _command(name: str) -> str:
    stage = settings.ALL_COMMANDS[name]
    lines = [f"## perl {name}", "", *(line.strip() for line in str(stage.__doc__).splitlines())]
    for panel, items in groupby(settings.options(stage), key=lambda item: item.panel):
        rows = [_row(item, name) for item in items]
        if panel == "Run":
            rows += [("`--config`, `-c`", "text", "", CONFIG_HELP), ("`--debug`", "flag", "", DEBUG_HELP)]
        lines += ["", f"**{panel}**", "", markdown_table(("option", "value", "default", "meaning"), rows)]
    return "\n".join(lines)


def _row(item: settings.Option, command: str) -> tuple[str, ...]:
    short = f", `{item.short}`" if item.short else f" (in YAML `{item.name}`)" if item.argument else ""
    kind = "flag" if item.type is bool else describe(item.type)
    return f"`{shown_name(item)}`{short}", kind, shown_default(item, command), item.help


def rooms() -> str:
    """The packages from top to bottom as text; each may import from those below it."""
    width = max(map(len, ROOMS))
    return "\n".join(f"    {name:<{width}}  {what}" for name, what in reversed(ROOMS.items()))


def module_map() -> str:
    """The modules of each room with the first sentence of their docstrings, as Markdown."""
    rows: list[tuple[str, str]] = []
    for room in sorted(ROOMS):
        paths = sorted((PACKAGE / room).rglob("*.py")) or [PACKAGE / f"{room}.py"]
        for path in paths:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            summary = one_line((ast.get_docstring(tree) or "").split("\n\n")[0])
            if path.name != "__init__.py" or len(tree.body) > 1:  # more than what makes a folder a package
                rows.append((f"`{path.relative_to(PACKAGE)}`", summary))
    return markdown_table(("module", "contents"), rows)
