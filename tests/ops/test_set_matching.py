"""Costs against numbers worked out by hand, and the joint matching against one matching a group."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssod.ops.hungarian import match_hungarian
from ssod.ops.set_matching import CostWeights, match_queries, pair_costs, to_centers, to_corners


def test_costs_of_a_pair_by_hand():
    logits = torch.tensor([[[0.0, math.log(3)]]])  # probabilities 0.5 and 0.75
    boxes = torch.tensor([[[0.5, 0.5, 0.4, 0.4]]])
    targets = torch.tensor([[[0.5, 0.5, 0.4, 0.4], [0.7, 0.5, 0.4, 0.4]]])
    labels = torch.tensor([[1, 0]])

    def cost(cls, l1, giou):
        return pair_costs(logits, boxes, labels, targets, CostWeights(cls, l1, giou))[0, 0].tolist()

    sure = 0.25 * 0.25**2 * -math.log(0.75) - 0.75 * 0.75**2 * -math.log(0.25)
    even = 0.25 * 0.5**2 * math.log(2) - 0.75 * 0.5**2 * math.log(2)
    assert cost(1, 0, 0) == pytest.approx([sure, even], abs=1e-6)
    assert cost(0, 1, 0) == pytest.approx([0, 0.2], abs=1e-6)
    # shifted by half a side: a third of the union overlaps, and the hull is the union
    assert cost(0, 0, 1) == pytest.approx([-1, -1 / 3], abs=1e-6)
    assert cost(2, 5, 2) == pytest.approx([2 * sure - 2, 2 * even + 1 - 2 / 3], abs=1e-5)


def test_corners_and_centers_are_inverse():
    boxes = torch.rand(3, 5, 4)
    torch.testing.assert_close(to_centers(to_corners(boxes)), boxes)
    assert to_corners(torch.tensor([0.5, 0.4, 0.2, 0.6])).tolist() == pytest.approx([0.4, 0.1, 0.6, 0.7])


@settings(max_examples=60, deadline=None)
@given(
    layers=st.integers(1, 3),
    batch=st.integers(1, 3),
    queries=st.integers(1, 6),
    cells=st.integers(1, 40),
    targets=st.integers(1, 7),
    seed=st.integers(0, 10_000),
)
def test_the_joint_matching_is_that_of_each_group_alone(layers, batch, queries, cells, targets, seed):
    generator = torch.Generator().manual_seed(seed)
    of_queries = torch.randn(layers, batch, queries, targets, generator=generator)
    of_cells = torch.randn(batch, cells, targets, generator=generator)
    valid = torch.rand(batch, targets, generator=generator) < 0.7
    matched, found = match_queries(of_queries, of_cells, valid)
    assert torch.equal(found, match_hungarian(of_cells, valid))
    for layer in range(layers):
        assert torch.equal(matched[layer], match_hungarian(of_queries[layer], valid))
    assert torch.equal(match_queries(of_queries, None, valid)[0], matched)


def test_broken_costs_are_matched_last():
    of_queries, of_cells = torch.rand(1, 1, 4, 2), torch.rand(1, 9, 2)
    of_queries[0, 0, :2] = torch.nan
    of_cells[0, :5] = torch.nan
    matched, found = match_queries(of_queries, of_cells, torch.ones(1, 2, dtype=torch.bool))
    assert (matched[0, 0, :2] == -1).all()
    assert (found[0, :5] == -1).all()
    assert sorted(matched[0, 0, 2:].tolist()) == [0, 1]
    everything = torch.full((1, 9, 2), torch.nan)
    matched, found = match_queries(torch.full((1, 1, 4, 2), torch.nan), everything, torch.ones(1, 2, dtype=torch.bool))
    assert (matched >= 0).sum() == (found >= 0).sum() == 2
