"""What gets installed: the scripts, the versions that CI uses, and the files in the wheel."""

import importlib
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import perlcli

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [Requirement(line) for line in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]]
CONSTRAINTS = [
    Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
]


@pytest.mark.parametrize("script", ["perl", "perlcli"])
def test_script_points_to_a_function(script: str) -> None:
    module, _, function = PROJECT["scripts"][script].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_constraints_are_exact_public_versions() -> None:
    for constraint in CONSTRAINTS:
        (specifier,) = constraint.specifier
        assert specifier.operator == "=="
        assert Version(specifier.version).local is None
    names = [canonicalize_name(constraint.name) for constraint in CONSTRAINTS]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda requirement: requirement.name)
def test_constraint_is_in_the_range(requirement: Requirement) -> None:
    versions = {canonicalize_name(constraint.name): constraint.specifier for constraint in CONSTRAINTS}
    (specifier,) = versions[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(specifier.version)


def test_this_python_is_in_the_range() -> None:
    assert SpecifierSet(PROJECT["requires-python"]).contains(".".join(map(str, sys.version_info[:3])))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> ZipFile:
    """The wheel that pip builds offline from a copy of the sources, with the installed build backend."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"
    shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(copy)], check=True)
    (path,) = folder.glob("*.whl")
    return ZipFile(path)


@pytest.mark.slow
def test_wheel_contains_every_file_of_the_package(wheel: ZipFile) -> None:
    package = ROOT / "src"
    files = {str(path.relative_to(package)) for path in package.rglob("perlcli/**/*") if path.is_file()}
    files = {file for file in files if "__pycache__" not in file}
    assert {name for name in wheel.namelist() if name.startswith("perlcli/")} == files
    base = {Path(file).suffix for file in files if file.startswith("perlcli/coffee/base/")}
    assert base >= {".safetensors", ".json", ".md"}


@pytest.mark.slow
def test_wheel_metadata(wheel: ZipFile) -> None:
    information = f"perlcli-{perlcli.__version__}.dist-info"
    assert {f"{information}/licenses/LICENSE", f"{information}/METADATA"} <= set(wheel.namelist())
    assert b"perl = perlcli.entry:perl\n" in wheel.read(f"{information}/entry_points.txt")
