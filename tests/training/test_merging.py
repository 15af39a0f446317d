"""How far a merged model is from the adapted one, in figures."""

import pytest
import torch

from perlcli.training import merging


def test_figures_of_hand_made_logits() -> None:
    some = [torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
    others = [torch.tensor([[1.5, 2.0], [3.0, 5.0]]), torch.tensor([[0.0, 1.0]])]
    assert merging.largest_difference(some, others) == 5
    assert merging.share_same_token(some, others) == pytest.approx(2 / 3)
    ours, theirs = ([torch.tensor([value]) for value in values] for values in ((1.0, 2.0, 3.0), (5.0, 7.0, 6.0)))
    assert merging.share_same_order(ours, theirs) == pytest.approx(2 / 3)
    assert merging.share_same_order(ours[:1], theirs[:1]) == 1
    nan = [torch.tensor([[1.0, float("nan")], [0.0, 0.0]]), others[1]]
    assert not merging.largest_difference(some, nan) < float("inf")
