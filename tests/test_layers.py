"""The order of the modules: each imports only from layers below its own, and the light ones never load torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import perlcli

PACKAGE = Path(perlcli.__file__).parent

# Lowest first. Neighbours in a layer don't import each other. `entry` stands outside: it runs before each Perl program.
LAYERS = (
    {"errors", "values", "safe_yaml", "private", "markdown"},
    {"settings.declaring"},
    {"settings.groups"},
    {"settings.commands"},
    {"settings.resolving"},
    {"settings.conflicts"},
    {"settings", "terminal"},
    {"disk", "signals", "config", "coffee.world", "coffee.presets"},
    {"recipes", "coffee.documents", "coffee"},
    {"coffee.build"},
    {"device", "weights", "progress", "stats", "upstream", "checkpoints", "liveness", "expressions", "doctor_checks"},
    {"record"},
    {"outputs"},
    {"running"},
    {"report", "plots", "figures"},
    {"reports.words"},
    {"reports.tables"},
    {"reports.pictures"},
    {"reports.pages"},
    {"reports"},
    {"data.rows", "data.cache", "data.nesting"},
    {"data.fields", "data.files", "data.render", "data.checks"},
    {"data.standard", "data.sources", "data.fitting", "data.splits", "data.tokens"},
    {"data.published"},
    {"data.formats"},
    {"data"},
    {"base", "projections"},
    {"adapters"},
    {"roles", "generate", "prepare", "resuming", "data_file"},
    {"guards", "memory", "meter", "value_model", "training", "policies", "scores", "memory_trace", "precisions"},
    {"rewards", "algorithms", "estimate_memory"},
    {"judge"},
    {"sft", "reward", "rl", "evaluate", "merge", "data_check", "data_show", "data_convert", "estimate"},
    {"arms", "processes", "doctor_torch"},
    {"predictions"},
    {"quickstart", "compare_full", "report_runs", "runs", "doctor"},
    {"options"},
    {"cli"},
    {"reference", "__main__"},
)
NUMBERS = {name: number for number, layer in enumerate(LAYERS) for name in layer}
LIGHT = ("errors", "values", "safe_yaml", "private", "markdown", "terminal", "settings", "config", "recipes",
         "coffee", "record", "outputs", "running", "report", "figures", "stats", "plots", "reports", "report_runs",
         "runs", "doctor", "doctor_torch", "doctor_checks", "liveness", "expressions", "progress", "upstream",
         "device", "data", "options", "cli", "entry", "signals", "disk")  # fmt: skip
HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "matplotlib", "numpy")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    module_name(path): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.parent != PACKAGE or path.stem != "__init__"
}


def imported(tree: ast.AST) -> Iterator[str]:
    """The modules of ours that the nodes import, by their dotted names inside the package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] == "perlcli" for alias in node.names), "from perlcli import …"
        if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != "perlcli":
            continue
        inside = (node.module or "").partition(".")[2]
        names = {".".join(filter(None, (inside, alias.name))) for alias in node.names} & set(FILES)
        yield from names or ({inside} & set(FILES))


def test_every_module_has_its_layer() -> None:
    assert set(NUMBERS) | {"entry"} == set(FILES)
    assert sum(map(len, LAYERS)) == len(NUMBERS)


@pytest.mark.parametrize("name", sorted(NUMBERS))
def test_a_module_imports_only_from_lower_layers(name: str) -> None:
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    assert not [other for other in imported(tree) if NUMBERS.get(other, -1) >= NUMBERS[name] and other != name]


def test_entry_imports_nothing_of_ours_and_next_to_nothing_before_it_must() -> None:
    tree = ast.parse(FILES["entry"].read_text(encoding="utf-8"))
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [ast.unparse(node) for node in top] == ["import os", "import sys"]


def test_nothing_is_imported_relatively() -> None:
    for path in FILES.values():
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        assert not [node for node in nodes if isinstance(node, ast.ImportFrom) and node.level], path


def test_the_light_modules_load_no_heavy_library() -> None:
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1].split():\n"
        "    importlib.import_module('perlcli.' + name)\n"
        "    print(name, *[heavy for heavy in sys.argv[2].split() if heavy in sys.modules])"
    )
    words = [sys.executable, "-c", code, " ".join(LIGHT), " ".join(HEAVY)]
    found = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    assert found == list(LIGHT)
