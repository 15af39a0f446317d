"""The documentation: links lead somewhere, the README stays short, and the prose is plain English."""

import ast
import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from perlcli.cli import reference

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
OTHERS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md", "benchmarks/README.md")
PAGES = [*(ROOT / name for name in OTHERS), *DOCS]
README_WORDS = 1500
CODE = ("src/perlcli", ".")  # where the paths in CONTRIBUTING.md start

FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
GENERATED = re.compile(r"\[\[\[cog.*?\[\[\[end\]\]\]", re.DOTALL)
INLINE_CODE = re.compile(r"`[^`\n]*`")
LINK = re.compile(r"\]\(([^()\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)

# Words and phrases that read as if they were translated, with what to write instead.
DIALECT = {
    r"(?<!there )\b(is|are) no (?!longer\b|more\b)": "is not a",
    r"(?<!stand-)(?<!leave )(?<!left )\balone\b": "only",
    r"\btold\b": "reported, said",
    r"\bbeside\b": "next to, as well as",
    r"\bstands\b": "is, appears",
    r"\b(held|hold|holds) (it |them )?against\b": "compared with",
    r"\bwhole\b(?! numbers?\b)": "complete, entire, intact",
    r"\bfor want of\b": "without, for lack of",
    r"\bnothing of ours\b": "none of our",
    r"\bat hand\b": "available",
}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(text: str) -> str:
    """Text without code blocks, generated parts and inline code."""
    for pattern in (GENERATED, FENCED, INLINE_CODE):
        text = pattern.sub(" ", text)
    return text


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = HEADING.findall(FENCED.sub("", path.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dialect(text: str) -> list[str]:
    """Every line of the text that has one of the phrases, with what to write instead."""
    return [
        f"{line.strip()!r}: write {instead!r}"
        for line in prose(text).splitlines()
        for pattern, instead in DIALECT.items()
        if re.search(pattern, line, re.IGNORECASE)
    ]


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    broken = []
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = unquote(link).partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_the_index_lists_every_page() -> None:
    text = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert set(LINK.findall(text)) == {path.name for path in DOCS} - {"README.md"}


def test_the_map_of_the_code_names_files_that_exist() -> None:
    text = GENERATED.sub("", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    named = set(re.findall(r"`((?:\w+/)*\w+\.py)`", text))
    assert named
    assert [name for name in sorted(named) if not any((ROOT / place / name).exists() for place in CODE)] == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= README_WORDS


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_pages_are_plain_english(page: Path) -> None:
    assert dialect(page.read_text(encoding="utf-8")) == []


def test_help_is_plain_english() -> None:
    assert dialect(reference.commands()) == []


SOURCES = sorted((ROOT / "src" / "perlcli").rglob("*.py"))
# Where a word that is dialect elsewhere is meant as it stands.
MEANT = {
    "coffee/documents.py": ("whole",),  # milk
    "coffee/world.py": ("whole",),  # milk
    "entry.py": ("alone",),  # `perl` alone
}


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_messages_and_docstrings_are_plain_english(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    meant = MEANT.get(str(path.relative_to(ROOT / "src" / "perlcli")), ())
    found = [line for text in texts for line in dialect(text)]
    assert [line for line in found if not any(word in line for word in meant)] == []


@pytest.mark.parametrize(
    "text", ["It runs alone.", "The rate stands in the table.", "A folder is no file.", "It was told."]
)
def test_dialect_is_found(text: str) -> None:
    assert dialect(text)


@pytest.mark.parametrize(
    "text",
    [
        "A stand-alone page.",
        "That run is left alone.",
        "There is no file.",
        "It is no longer used.",
        "`whole words`",
        "Outsold.",
    ],
)
def test_plain_english_is_not_taken_for_dialect(text: str) -> None:
    assert dialect(text) == []
