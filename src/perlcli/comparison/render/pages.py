"""A comparison report as one page of HTML that needs nothing else: no script, no font, no picture from outside."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from perlcli.comparison.render import tables, words
from perlcli.comparison.render.pictures import Picture
from perlcli.comparison.results import Arm, Comparison, Report

STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --soft: #52606d; --line: #d9e2ec; --page: #fff; --card: #f5f7fa;
  --accent: #1864ab; --warn: #fff4e0; --warn-line: #e8960c; --bad: #c92a2a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --soft: #9fb3c8; --line: #3a4653; --page: #161b22;
  --card: #1f2630; --accent: #74b5f0; --warn: #33280f; --warn-line: #e8960c; --bad: #ff8787; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.55;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
.kicker { color: var(--soft); margin: 0 0 .5rem; font-size: .9rem; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; font-size: clamp(1.35rem, 4vw, 2rem);
  line-height: 1.25; margin: 0 0 1rem; overflow-wrap: anywhere; }
.lead { font-size: 1.1rem; font-weight: 600; }
h2 { font-size: 1.3rem; margin: 2.75rem 0 .5rem; padding-top: 1.25rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.75rem 0 .5rem; }
p, li { max-width: 46rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; min-width: 100%; }
th, td { padding: .45rem .7rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; color: var(--soft); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tbody th { color: var(--ink); white-space: normal; min-width: 7rem; overflow-wrap: break-word; max-width: 18rem; }
td.text { text-align: left; overflow-wrap: break-word; max-width: 22rem; }
td small { display: block; color: var(--soft); font-size: .78rem; min-width: 4.5rem; }
tr.best { background: var(--card); } tr.failed td { text-align: left; color: var(--bad); overflow-wrap: anywhere; }
sup { color: var(--accent); font-size: .72em; line-height: 0; }
ol.notes, ul { padding-left: 1.3rem; } ol.notes { color: var(--soft); font-size: .88rem; }
.warn { background: var(--warn); border-left: 4px solid var(--warn-line); padding: .7rem 1rem; margin: 1rem 0; }
.warn p { margin: .25rem 0; overflow-wrap: anywhere; }
figure { margin: 1.5rem 0; }
figure img { max-width: 100%; height: auto; display: block; background: #fff; border-radius: 6px;
  border: 1px solid var(--line); }
figcaption { color: var(--soft); font-size: .88rem; margin-top: .4rem; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .3rem 1rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .8rem 1rem;
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: .82rem; line-height: 1.5; }
footer { margin-top: 3rem; color: var(--soft); font-size: .85rem; }
a { color: var(--accent); }
@media (max-width: 40rem) { main { padding: 1.25rem 1rem 3rem; } th, td { padding: .4rem .5rem; }
  tbody th:first-child { position: sticky; left: 0; background: var(--page); }
  tr.best th:first-child { background: var(--card); }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .6rem; } }
@media print { :root { --ink: #000; --soft: #444; --line: #bbb; --page: #fff; --card: #f3f3f3; --accent: #000;
  --warn: #fff; --bad: #900; } main { max-width: none; padding: 0; } .scroll { overflow: visible; }
  table { font-size: .68rem; } th, td { padding: .25rem .35rem; } tbody th { min-width: 5rem; }
  td small { min-width: 3rem; font-size: .58rem; }
  figure, tr, .warn { break-inside: avoid; } h2, h3 { break-after: avoid; } }
@page { margin: 1.5cm; }
"""


def page(report: Report, folder: Path, pictures: Sequence[Picture]) -> str:
    """The report as HTML, with the pictures of the folder inside; every text of its content is escaped."""
    body = "\n".join(
        [_head(report), *(_chapter(comparison, folder, pictures) for comparison in report.comparisons),
         _measured(report), _made(report), _foot(report)]
    )  # fmt: skip
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(words.title(report))}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _head(report: Report) -> str:
    """The title small, the first headline large, those of further stages below it."""
    lines = [escape(words.headline(comparison)) for comparison in report.comparisons]
    state = words.state(report)
    return "\n".join(
        [
            f'<p class="kicker">{escape(words.title(report))}</p>',
            *(f"<h1>{line}</h1>" for line in lines[:1]),
            *(f'<p class="lead">{line}</p>' for line in lines[1:]),
            *([_box([state])] if state else []),
        ]
    )


def _chapter(comparison: Comparison, folder: Path, pictures: Sequence[Picture]) -> str:
    """A comparison: what came of it, the table, the pictures, the paper's figures and what must be kept in mind."""
    name = words.STAGES.get(comparison.stage, comparison.stage)
    notes, _ = tables.footnotes(comparison)
    same, further = tables.common(comparison), tables.further_columns(comparison)
    parts = [
        f"<section>\n<h2>{escape(name)}</h2>",
        _arms(comparison, tables.main_columns(comparison)),
        _list("ol", notes, ' class="notes"') if notes else "",
        _box(comparison.warnings, "What to keep in mind") if comparison.warnings else "",
        "\n".join(_figure(item, folder) for item in pictures if item.stage == comparison.stage),
        _titled("Where a step's time goes", tables.phases(comparison)),
        _titled("Beside the paper", tables.paper_beside(comparison), tables.PAPER_LINE),
        f"<h3>Further figures</h3>\n{_arms(comparison, further)}" if further else "",
        f"<h3>How the arms trained</h3>\n<p>{escape(same)}</p>" if same else "",
        _titled("" if same else "How the arms trained", tables.how(comparison), texts=True),
        _titled("Each run", tables.runs(comparison), texts=True),
        "</section>",
    ]
    return "\n".join(part for part in parts if part)


def _arms(comparison: Comparison, kept: Sequence[tables.Column]) -> str:
    """A table of the arms, the one of the headline marked."""
    _, marks = tables.footnotes(comparison)
    best = words.chosen(comparison)
    rows = []
    for label, arm, numbers in zip(words.labels(comparison.arms), comparison.arms, marks, strict=True):
        first = escape(label) + (f"<sup>{', '.join(map(str, numbers))}</sup>" if numbers else "")
        kind = ' class="failed"' if arm.failure else ' class="best"' if arm is best and len(marks) > 1 else ""
        rows.append(f'<tr{kind}><th scope="row">{first}</th>{_figures(arm, kept)}</tr>')
    heads = "".join(f'<th scope="col">{escape(head)}</th>' for head in ("", *(column.head for column in kept)))
    return _scrolled(heads, rows)


def _figures(arm: Arm, kept: Sequence[tables.Column]) -> str:
    """An arm's cells: its figures with what stands small below them, or in their place why there are none."""
    if arm.failure:
        return f'<td colspan="{max(1, len(kept))}">{escape(words.failure(arm))}</td>'
    return "".join(f"<td>{escape(column.cell(arm) or words.NONE)}{_small(column.detail(arm))}</td>" for column in kept)


def _small(text: str) -> str:
    return f"<small>{escape(text)}</small>" if text else ""


def _titled(
    title: str, table: tuple[Sequence[str], Sequence[Sequence[str]]], before: str = "", *, texts: bool = False
) -> str:
    """A table below its title; nothing where it has no rows."""
    header, rows = table
    if not rows:
        return ""
    kind = ' class="text"' if texts else ""
    lines = [
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td{kind}>{escape(c)}</td>" for c in row[1:]) + "</tr>"
        for row in rows
    ]
    heads = "".join(f'<th scope="col"{_left(texts)}>{escape(head)}</th>' for head in header)
    lead = f"<p>{escape(before)}</p>\n" if before else ""
    head = f"<h3>{escape(title)}</h3>\n" if title else ""
    return f"{head}{lead}{_scrolled(heads, lines)}"


def _left(texts: bool) -> str:
    return ' style="text-align: left"' if texts else ""


def _scrolled(heads: str, rows: Iterable[str]) -> str:
    """A table that scrolls by itself where the window is narrow."""
    lines = "\n".join(rows)
    return f'<div class="scroll"><table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{lines}\n</tbody>\n</table></div>'


def _figure(item: Picture, folder: Path) -> str:
    content = base64.b64encode((folder / item.path).read_bytes()).decode("ascii")
    caption = escape(item.caption)
    image = f'<img alt="{caption}" src="data:image/png;base64,{content}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _measured(report: Report) -> str:
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in words.facts(report))
    return f"<h2>How it was measured</h2>\n{_list('ul', words.method(report))}\n<dl>{facts}</dl>"


def _made(report: Report) -> str:
    lines = words.commands(report)
    shown = "\n".join(escape(line) for line in lines)
    return f"<h2>To have it again</h2>\n<pre><code>{shown}</code></pre>" if lines else ""


def _foot(report: Report) -> str:
    made = escape(" ".join(filter(None, ("perlcli", report.versions.get("perlcli", "")))))
    return (
        f"<footer>Made by {made}, LoRA RLHF from the shell, after the paper "
        '<a href="https://arxiv.org/abs/2403.10704">Parameter Efficient Reinforcement Learning from Human Feedback</a>.'
        "</footer>"
    )


def _list(kind: str, lines: Iterable[str], attributes: str = "") -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<{kind}{attributes}>{items}</{kind}>"


def _box(lines: Iterable[str], title: str = "") -> str:
    head = f"<p><strong>{escape(title)}</strong></p>" if title else ""
    return f'<div class="warn">{head}{"".join(f"<p>{escape(line)}</p>" for line in lines)}</div>'
