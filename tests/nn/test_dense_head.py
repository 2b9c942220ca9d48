import pytest
import torch
from torch import nn

from ssod.errors import UserError
from ssod.nn.dense_head import per_anchor, start_convs, start_predictions, tower


def test_towers_with_and_without_norm():
    kinds = [type(m) for m in tower(16, 2, 4)]
    assert kinds == [nn.Conv2d, nn.GroupNorm, nn.ReLU] * 2
    assert [type(m) for m in tower(16, 2, None)] == [nn.Conv2d, nn.ReLU] * 2
    assert len(tower(16, 0, None)) == 0


@pytest.mark.parametrize("groups", [3, 16, 32])
def test_groups_that_do_not_fit(groups):
    with pytest.raises(UserError, match=rf"head_groups={groups} does not divide .*=16.*head_groups=8"):
        tower(16, 1, groups)


def test_predictions_start_at_the_prior_and_at_the_first_codes():
    logits, codes = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
    start_convs(logits, codes)
    start_predictions(logits, codes, torch.tensor([1.0, -2.0]))
    nothing = torch.zeros(1, 8, 5, 5)
    torch.testing.assert_close(logits(nothing).sigmoid(), torch.full((1, 6, 5, 5), 0.01))
    assert per_anchor(codes(nothing), 2).unique(dim=1).tolist() == [[[1, -2]]]
    assert 0.005 < logits.weight.std() < 0.02


def test_rows_are_ordered_by_cell_then_anchor():
    # channels a * 2 + d of A = 2 anchors with D = 2 numbers, a map of 1 x 3 cells
    x = torch.arange(12.0).view(1, 4, 1, 3)
    rows = per_anchor(x, 2)
    assert rows.tolist() == [[[0, 3], [6, 9], [1, 4], [7, 10], [2, 5], [8, 11]]]
