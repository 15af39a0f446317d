"""Data on its way to the model: `sources` reads rows, `formats` converts them, `loading` puts both together, `render`
turns rows into token ids, and `fitting` keeps them within a length."""

from __future__ import annotations

from perlcli.data.checks import drop_repeats, drop_trained, hold_out, hold_out_some, overlap, prompts, unpacked
from perlcli.data.loading import COFFEE, EMBEDDED_ROWS, Intake, gold_check, is_embedded, load, read
from perlcli.data.render import Renderer
from perlcli.data.rows import Content, Data, Demonstration, Preference, Prompt, Row, Thumb, text_of, with_all_columns

__all__ = [
    "COFFEE",
    "EMBEDDED_ROWS",
    "Content",
    "Data",
    "Demonstration",
    "Intake",
    "Preference",
    "Prompt",
    "Renderer",
    "Row",
    "Thumb",
    "drop_repeats",
    "drop_trained",
    "gold_check",
    "hold_out",
    "hold_out_some",
    "is_embedded",
    "load",
    "overlap",
    "prompts",
    "read",
    "text_of",
    "unpacked",
    "with_all_columns",
]
