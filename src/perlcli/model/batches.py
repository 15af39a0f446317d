"""Rows of token ids as one padded batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def padded(
    rows: Sequence[list[int]], pad: int, device: torch.device | str = "cpu", *, on_left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of token ids as one tensor and its attention mask, both of shape (rows, longest row). Padding is on the
    right, for scoring and training, or on the left, for generation."""
    longest = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        padding, ones, zeros = [pad] * (longest - len(row)), [1] * len(row), [0] * (longest - len(row))
        ids.append(padding + row if on_left else row + padding)
        mask.append(zeros + ones if on_left else ones + zeros)
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
