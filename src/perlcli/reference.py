"""The parts of the documentation that come from the code: options, module map. `make docs` writes them."""

from __future__ import annotations

import ast
from itertools import groupby
from pathlib import Path

from perlcli import recipes, settings
from perlcli.cli import app, data_app
from perlcli.options import CONFIG_HELP, DEBUG_HELP, shown_default, shown_name
from perlcli.values import describe

PACKAGE = Path(__file__).parent


def commands() -> str:
    """Every command with its help text and a table of its options, as Markdown."""
    found = [("", info) for info in app.registered_commands] + [
        ("data ", info) for info in data_app.registered_commands
    ]
    texts = {group + str(info.name): info.callback.__doc__ or "" for group, info in found if info.callback}
    return "\n\n".join(_command(name, texts[name]) for name in settings.ALL_COMMANDS)


def recipe_table() -> str:
    """Every recipe with its title and stages, as Markdown."""
    rows = ["| recipe | task | stages |", "| --- | --- | --- |"]
    for name in recipes.names():
        found = recipes.read(name)
        rows.append(f"| `{name}` | {found.title} | {', '.join(found.stages)} |")
    return "\n".join(rows)


def _command(name: str, text: str) -> str:
    lines = [f"## perl {name}", "", *(line.strip() for line in text.strip().splitlines())]
    rows = [(item.panel, item) for item in settings.options(settings.ALL_COMMANDS[name])]
    for panel, items in groupby(rows, key=lambda row: row[0]):
        lines += ["", f"**{panel}**", "", "| option | value | default | meaning |", "| --- | --- | --- | --- |"]
        lines += [_row(item) for _, item in items]
        if panel == "Run":
            lines += [f"| `--config`, `-c` | text | | {CONFIG_HELP} |", f"| `--debug` | flag | | {DEBUG_HELP} |"]
    return "\n".join(lines)


def _row(item: settings.Option) -> str:
    short = f", `{item.short}`" if item.short else f" (in YAML `{item.name}`)" if item.argument else ""
    kind = "flag" if item.type is bool else describe(item.type)
    return f"| `{shown_name(item)}`{short} | {kind} | {shown_default(item)} | {item.help} |"


def module_map() -> str:
    """Every module with the first sentence of its docstring, as Markdown."""
    rows = ["| module | what lives there |", "| --- | --- |"]
    for path in sorted(PACKAGE.rglob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        first = " ".join(text.split("\n\n")[0].split())
        rows.append(f"| `{path.relative_to(PACKAGE)}` | {first} |")
    return "\n".join(rows)
