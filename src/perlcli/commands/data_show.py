"""`perl data show`: the first rows as the model will see them, rendered by the same code as in training."""

from __future__ import annotations

import os
import sys
from itertools import groupby

from perlcli import settings
from perlcli.commands import data_file
from perlcli.data import Renderer
from perlcli.data.fitting import note_unread_keys
from perlcli.data.render import IGNORED, Columns
from perlcli.data.rows import DataReport
from perlcli.terminal import put, say, visible
from perlcli.text import counted

GREEN, PLAIN, BRACKETS = "\x1b[1;32m", "\x1b[0m", ("⟦", "⟧")
LEGEND = {
    "sft": "trained tokens are {marks}",
    "reward": "the score is read at the last token, which is {marks}",
    "rl": "the policy continues from here; prompts are not trained on",
}


def run(given: settings.DataShow) -> None:
    """Print the first rows of the file as a stage renders them. Raises PerlError if no stage can use the file."""
    values = settings.resolve(given, {})
    settings.check(values)
    render = data_file.renderer(values)
    use, loaded = data_file.load(values, values.show.for_, chat=render.makes_turns)
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    legend = LEGEND[use].format(marks="coloured" if coloured else "between {} and {}".format(*BRACKETS))
    note_unread_keys(loaded.report, render)
    say("\n".join([loaded.report.line(), *loaded.report.columns(), f"As perl {use} sees it: {legend}"]))
    for number, row in zip(loaded.numbers[: values.show.rows], loaded.rows, strict=False):
        report = DataReport(loaded.report.source, loaded.report.format, 1, 1)
        fitting = data_file.fitting(report, use, render, values.length, values.model.loss_on)
        for _, _, item in fitting.take([(number, row)]):
            cut = ", prompt cut from the left" if report.truncated else ""
            for name, ids, learned in views(item):
                size = counted(len(ids), "token")
                put(f"\n── row {number}{name}, {size}{cut}\n" + marked(ids, learned, render, coloured))
        for _, fault in fitting.faults:
            say(f"\n── row {number}: refused. {fault}")
        for reason in report.dropped:
            say(f"\n── row {number}: dropped, {reason}")


def views(item: Columns) -> list[tuple[str, list[int], list[bool]]]:
    """The token rows in a stage's columns, each as its name, its ids and, for each id, whether it is marked."""
    if "labels" in item:
        return [("", item["input_ids"], [label != IGNORED for label in item["labels"]])]
    if "ids" in item:
        return [("", item["ids"], [False] * len(item["ids"]))]
    if "label" in item:
        return [(f", thumbs {'up' if item['label'] else 'down'}", item["input_ids"], _last(item["input_ids"]))]
    return [(f", {name}", item[f"{name}_ids"], _last(item[f"{name}_ids"])) for name in ("chosen", "rejected")]


def _last(ids: list[int]) -> list[bool]:
    return [False] * (len(ids) - 1) + [True]


def marked(ids: list[int], learned: list[bool], render: Renderer, coloured: bool) -> str:
    """The tokens as text, special tokens included, with the learned ones marked."""
    begin, end = (GREEN, PLAIN) if coloured else BRACKETS
    text, done, before = "", 0, ""
    for is_learned, group in groupby(learned):
        done += len(list(group))
        decoded = str(render.tokenizer.decode(ids[:done]))  # from the start: a part on its own can lose a space
        part = visible(decoded.removeprefix(before))
        text, before = text + (begin + part + end if is_learned else part), decoded
    return text
