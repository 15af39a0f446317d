"""The order of the rooms: each imports only from rooms below it, no modules import each other, and the light ones never
load torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import perlcli
from perlcli.cli.reference import ROOMS

PACKAGE = Path(perlcli.__file__).parent
LIGHT = (
    "text", "errors", "redaction", "stats", "upstream", "interpreter", "terminal", "settings", "settings.types",
    "settings.yaml", "device", "coffee", "recipes", "run.record", "run.files", "run.output_folder",
    "run.lifecycle", "run.claim", "run.launch",
    "run.checkpoints", "run.disk", "run.liveness", "run.signals", "run.progress", "run.plots",
    "run.summary", "run.card", "run.lineage", "run.setup", "run.loaders",
    "data", "doctor.checks", "doctor.torch_checks", "comparison.results", "comparison.render.files",
    "commands.early", "model.places", "model.weights", "training.reward_names", "training.trackers",
    "commands.report", "commands.runs", "commands.doctor", "cli.binding", "cli.completion", "cli.boundary",
    "cli.app", "entry",
)  # fmt: skip
HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "matplotlib", "numpy")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name: path for path in sorted(PACKAGE.rglob("*.py")) if (name := module_name(path))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def room(name: str) -> str:
    return name.split(".", maxsplit=1)[0]


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


def test_every_room_has_its_floor() -> None:
    assert {room(name) for name in FILES} == set(ROOMS)


def test_every_room_is_a_package_and_says_what_it_is_for() -> None:
    """setuptools leaves a folder without __init__.py out of the wheel."""
    for folder in {path.parent for path in FILES.values()}:
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_module_imports_only_from_lower_rooms(name: str) -> None:
    floors = list(ROOMS)
    above = floors[floors.index(room(name)) + 1 :]
    assert not [other for other in imported(TREES[name]) if room(other) in above]


@pytest.mark.parametrize("name", sorted(FILES))
def test_files_and_functions_stay_short(name: str) -> None:
    assert len(FILES[name].read_text(encoding="utf-8").splitlines()) <= 400
    functions = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.FunctionDef)]
    assert not [node.name for node in functions if (node.end_lineno or 0) - node.lineno >= 50]


def test_no_modules_import_each_other() -> None:
    """Raises graphlib.CycleError, which names the modules, where some do."""
    TopologicalSorter({name: {*imported(tree)} - {name} for name, tree in TREES.items()}).prepare()


def test_entry_imports_nothing_of_ours_and_next_to_nothing_before_it_must() -> None:
    top = [node for node in TREES["entry"].body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [ast.unparse(node) for node in top] == ["import os", "import sys"]


def test_nothing_is_imported_relatively() -> None:
    for name, tree in TREES.items():
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level], name


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
