"""Data on its way to the model: `sources` reads rows, `formats` converts them, `loading` puts both together, `render`
and `tokens` turn rows into token ids, and `fitting` keeps them within a length."""

from __future__ import annotations

from perlcli.data.checks import drop_repeats, overlap, prompts, unpacked
from perlcli.data.fitting import fit, fitted
from perlcli.data.loading import COFFEE, EMBEDDED_ROWS, Intake, gold_check, is_embedded, load, read
from perlcli.data.render import Renderer
from perlcli.data.rows import Content, Data, Demonstration, Preference, Prompt, Row, Thumb, text_of
from perlcli.data.splits import hold_out

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
    "fit",
    "fitted",
    "gold_check",
    "hold_out",
    "is_embedded",
    "load",
    "overlap",
    "prompts",
    "read",
    "text_of",
    "unpacked",
]
