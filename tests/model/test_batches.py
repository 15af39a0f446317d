"""Padding rows of token ids to one batch."""

import torch

from perlcli.model.batches import padded

ROWS = [[5], [6, 7, 8], [9, 0]]


def test_rows_are_padded_on_the_right() -> None:
    ids, mask = padded(ROWS, 3)
    assert ids.tolist() == [[5, 3, 3], [6, 7, 8], [9, 0, 3]]
    assert mask.tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 0]]


def test_prompts_are_padded_on_the_left() -> None:
    ids, mask = padded(ROWS, 3, on_left=True)
    assert ids.tolist() == [[3, 3, 5], [6, 7, 8], [3, 9, 0]]
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1], [0, 1, 1]]


def test_the_batch_is_made_on_the_device_that_is_asked_for() -> None:
    ids, mask = padded(ROWS, 3, torch.device("meta"))
    assert (ids.device.type, mask.device.type) == ("meta", "meta")
