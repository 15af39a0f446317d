"""Text for people: lines, numbers with their unit, tables, Markdown."""

import enum

import pytest

from perlcli.text import (
    clip,
    clip_middle,
    counted,
    enum_value,
    inline,
    markdown_table,
    megabytes,
    number,
    one_line,
    plain_table,
    shorten,
    size,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [("abc", "'abc'"), (2, "2"), (None, "None"), ("x" * 78, "'" + "x" * 78 + "'"), ("x" * 79, "'" + "x" * 78 + "…")],
)
def test_a_long_value_is_cut_at_80_characters(value: object, text: str) -> None:
    assert shorten(value) == text
    assert len(text) <= 80


@pytest.mark.parametrize(
    "value", [{"a": [1, "b", (2.5,)], 3: None}, [], {}, [b"x"], {"a": {"b": []}}, "it's", ["a", ["b"]]], ids=repr
)
def test_a_value_is_spelled_as_python_does(value: object) -> None:
    assert shorten(value) == repr(value)


def test_no_more_of_a_value_is_spelled_than_is_shown() -> None:
    wide: list[object] = ["a"]
    for _ in range(60):
        wide = [wide] * 9  # 9 ** 60 texts
    assert shorten(wide).startswith("[" * 61)
    assert len(shorten(wide)) == 80
    assert shorten(10**5000) == "a number of thousands of digits"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0323, "0.0323"), (0.8, "0.800"), (12.34, "12.3"), (99.96, "100"), (1540.4, "1,540"), (1e-7, "1e-07"),
     (-0.25, "-0.250"), (2e16, "2e+16")],
)  # fmt: skip
def test_a_number_has_three_digits(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1234, "1.23 kB"), (135_760, "136 kB"), (999_600, "1.00 MB"), (56e6, "56.0 MB"),
     (1.24e9, "1.24 GB"), (3e16, "30,000 TB")],
)  # fmt: skip
def test_bytes_have_a_unit_of_thousands(count: float, text: str) -> None:
    assert size(count) == text
    assert megabytes(count / 1e6) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 rows"), (1, "1 row"), (1234, "1,234 rows")])
def test_a_count_has_its_noun(count: int, text: str) -> None:
    assert counted(count, "row") == text


def test_text_is_cut_at_its_end_or_in_its_middle() -> None:
    assert (clip("abc", 3), clip("abcd", 3), clip("ab cd", 4)) == ("abc", "ab…", "ab…")
    assert (clip_middle("abcdefghij", 5), clip_middle("abc", 5)) == ("ab…ij", "abc")


def test_text_in_one_line() -> None:
    assert one_line(" a\n\tb  c ") == "a b c"
    assert inline("a\n|b* <c>") == "a \\|b\\* &lt;c&gt;"


def test_the_value_of_an_enum() -> None:
    class Kind(enum.StrEnum):
        LORA = "lora"

    assert (enum_value(Kind.LORA), enum_value("lora"), enum_value(None)) == ("lora", "lora", "None")


def test_a_plain_table_aligns_its_columns() -> None:
    assert plain_table(("", "gold"), [("base", "5.9%"), ("SFT", "100.0%")]).splitlines() == [
        "        gold",
        "----  ------",
        "base    5.9%",
        "SFT   100.0%",
    ]


def test_letters_may_take_two_columns() -> None:
    assert plain_table(("name", "x"), [("名前", "1"), ("é", "22")]).splitlines()[2:] == ["名前   1", "é     22"]


def test_a_table_without_rows_is_its_header() -> None:
    assert plain_table(("name", "x"), []) == "name  x\n----  -"
    assert markdown_table(("name", "x"), []) == "| name | x |\n| --- | --- |"


def test_a_markdown_table_may_align_its_columns() -> None:
    assert markdown_table(("", "gold"), [("SFT", "")], left=1) == "| | gold |\n| --- | ---: |\n| SFT | |"
