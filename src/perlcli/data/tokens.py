"""Turns a row into the token columns that a stage trains on, for training and for `perl data`."""

from __future__ import annotations

from typing import Any

from perlcli.data.render import Ids, Renderer
from perlcli.data.rows import Content, Demonstration, Preference, Prompt, Thumb

Columns = dict[str, Any]  # lists of token ids, and a label or row next to them
IGNORED = -100  # the label of a token without loss: the default ignore_index of torch's cross-entropy


def of_demonstration(
    render: Renderer, row: Demonstration, *, completion_only: bool = True, assistant_only: bool = False
) -> Columns:
    """`input_ids` and `labels`, which are `IGNORED` for tokens without loss, by default those of the prompt."""
    if row.prompt is None:
        ids = render.whole_ids(row.completion)
        if not assistant_only or isinstance(row.completion, str):
            return {"input_ids": ids, "labels": ids}
        mask = render.assistant_mask(row.completion)
        return {"input_ids": ids, "labels": [i if m else IGNORED for i, m in zip(ids, mask, strict=True)]}
    start = render.prompt_ids(row.prompt)
    end = render.completion_ids(row.prompt, row.completion, start)
    return {"input_ids": start + end, "labels": ([IGNORED] * len(start) if completion_only else start) + end}


def of_preference(render: Renderer, row: Preference | Thumb) -> Columns:
    """What a reward model reads: `chosen_ids` and `rejected_ids`, or `input_ids` and `label` (1.0 for a thumbs up)."""
    if isinstance(row, Thumb):
        return {"input_ids": _complete(render, row.prompt, row.completion)[0], "label": float(row.label)}
    chosen, rejected = _complete(render, row.prompt, row.chosen, row.rejected)
    return {"chosen_ids": chosen, "rejected_ids": rejected}


def _complete(render: Renderer, prompt: Content | None, *completions: Content) -> list[Ids]:
    if prompt is None:
        return [render.whole_ids(completion) for completion in completions]
    start = render.prompt_ids(prompt)
    return [start + render.completion_ids(prompt, completion, start) for completion in completions]


def of_prompt(render: Renderer, row: Prompt) -> Columns:
    """A prompt's token `ids`, and the `row` itself."""
    return {"row": row, "ids": render.prompt_ids(row.prompt)}
