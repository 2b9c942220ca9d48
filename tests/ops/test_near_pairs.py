"""Pairs of boxes that overlap: those that comparing all finds, and what is not compared."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ssod.ops import near_pairs
from ssod.ops.boxes import iou_matrix
from ssod.ops.near_pairs import overlapping_pairs


def scene(seed: int, images: int, count: int, side: float, step: float) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes of 1 to 40 pixels on a lattice, so that sides and centres often coincide; groups, and which are valid."""
    g = torch.Generator().manual_seed(seed)
    corner = (torch.rand(images, count, 2, generator=g) * side / step).round() * step
    size = 1 + (torch.rand(images, count, 2, generator=g) * 39 / step).round() * step
    boxes = torch.cat([corner, corner + size], dim=2)
    return boxes, torch.randint(0, 3, (count,), generator=g), torch.rand(images, count, generator=g) > 0.2


def all_compared(boxes: Tensor, groups: Tensor, valid: Tensor, threshold: float) -> set[tuple[int, int]]:
    count = boxes.shape[1]
    over = (iou_matrix(boxes, boxes) > threshold) & valid[:, :, None] & valid[:, None]
    over &= (groups[:, None] == groups).triu(1)
    return {(b * count + i, b * count + j) for b, i, j in over.nonzero().tolist()}


@given(
    seed=st.integers(0, 1000),
    images=st.integers(1, 3),
    count=st.integers(1, 60),
    side=st.sampled_from([0.0, 30.0, 3000.0]),
    step=st.sampled_from([0.01, 1.0, 10.0]),
    threshold=st.sampled_from([0.05, 0.5, 0.7, 0.95, 1.0]),
)
def test_they_are_those_that_comparing_all_finds(
    seed: int, images: int, count: int, side: float, step: float, threshold: float
) -> None:
    boxes, groups, valid = scene(seed, images, count, side, step)
    pairs = overlapping_pairs(boxes, groups, valid, threshold)
    assert pairs is not None
    found = [tuple(pair) for pair in pairs.t().tolist()]
    assert len(found) == len(set(found))
    assert set(found) == all_compared(boxes, groups, valid, threshold)


def test_centres_as_far_apart_as_they_can_be() -> None:
    # The narrower one, 7 wide, at the right end of one of 10: IoU 0.7, centres 1.5 = (1 - 0.7) / (2 * 0.7) * 7 apart.
    boxes = torch.tensor([[[0.0, 0, 10, 10], [3, 0, 10, 10]]])
    everyone = torch.ones(1, 2, dtype=torch.bool)
    for threshold, count in ((0.699, 1), (0.701, 0)):
        pairs = overlapping_pairs(boxes, torch.zeros(2, dtype=torch.int64), everyone, threshold)
        assert pairs is not None
        assert pairs.shape == (2, count)


def test_what_is_no_box_has_no_partner() -> None:
    nan, inf = float("nan"), float("inf")
    boxes = torch.tensor([[[1.0, 1, 9, 9], [nan, nan, nan, nan], [1, 1, 9, 9], [-inf, 0, inf, 5], [0, 0, 0, 0]]] * 2)
    valid = torch.tensor([[True, False, True, False, False], [True, False, False, False, False]])
    pairs = overlapping_pairs(boxes, torch.zeros(5, dtype=torch.int64), valid, 0.5)
    assert pairs is not None
    assert pairs.tolist() == [[0], [2]]
    none = overlapping_pairs(boxes, torch.zeros(5, dtype=torch.int64), torch.zeros_like(valid), 0.5)
    assert none is not None
    assert none.shape == (2, 0)


def test_a_heap_of_boxes_is_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes, groups, valid = scene(0, 1, 50, 0.0, 1.0)
    assert overlapping_pairs(boxes, groups, valid, 0.1) is not None
    monkeypatch.setattr(near_pairs, "MOST", 0.4)
    assert overlapping_pairs(boxes, groups, valid, 0.1) is None
