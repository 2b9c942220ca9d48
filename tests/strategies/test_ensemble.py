"""Detections of several networks become one list: by hand, and what must hold for any."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssod.ops.boxes import iou_matrix
from ssod.strategies.ensemble import fuse
from ssod.structures import Instances


def boxes(*rows: tuple[float, float, float, float, int, float]) -> Instances:
    """Rows of x1, y1, x2, y2, label, score."""
    table = torch.tensor(rows, dtype=torch.float32).view(-1, 6)
    return Instances(table[:, :4], table[:, 4].long(), table[:, 5])


def test_scores_are_the_mean_over_the_networks_by_hand() -> None:
    # The first and the shifted one overlap by 9 * 10 / (110) = 0.818; the third is alone; the last is another class.
    first = boxes((0, 0, 10, 10, 0, 0.9), (50, 50, 60, 60, 1, 0.6))
    second = boxes((1, 0, 11, 10, 0, 0.5), (0, 0, 10, 10, 2, 0.4))
    (fused,) = fuse([[first], [second]], conf=0.05, iou=0.6, max_det=10)
    assert fused.scores is not None
    # (0.9 + 0.5) / 2 on both boxes of the pair, of which the NMS keeps one; 0.6 / 2; 0.4 / 2
    assert fused.labels.tolist() == [0, 1, 2]
    assert fused.scores.tolist() == pytest.approx([0.7, 0.3, 0.2])


def test_what_the_mean_leaves_too_low_is_dropped_and_the_rest_limited() -> None:
    first = boxes((0, 0, 10, 10, 0, 0.9), (20, 0, 30, 10, 0, 0.8), (40, 0, 50, 10, 0, 0.1))
    (fused,) = fuse([[first], [boxes()]], conf=0.05, iou=0.6, max_det=10)
    assert fused.scores is not None
    assert fused.scores.tolist() == pytest.approx([0.45, 0.4])  # 0.1 / 2 does not exceed conf
    assert len(fuse([[first], [boxes()]], conf=0.05, iou=0.6, max_det=1)[0]) == 1


def test_nothing_found_is_nothing() -> None:
    assert [len(i) for i in fuse([[boxes(), boxes()], [boxes(), boxes()]], 0.05, 0.6, 10)] == [0, 0]


def test_the_quality_goes_with_its_box() -> None:
    first = Instances(torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([0]), torch.tensor([0.9]), torch.tensor([0.3]))
    second = Instances(torch.tensor([[30.0, 0, 40, 10]]), torch.tensor([0]), torch.tensor([0.8]), torch.tensor([0.7]))
    (fused,) = fuse([[first], [second]], 0.05, 0.6, 10)
    assert fused.quality is not None
    assert fused.quality.tolist() == pytest.approx([0.3, 0.7])


row = st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(5, 30), st.integers(0, 2), st.floats(0.1, 1.0))


@given(st.lists(row, max_size=8))
def test_two_equal_networks_change_nothing(rows: list[tuple[int, int, int, int, float]]) -> None:
    from ssod.ops.boxes import nms

    found = boxes(*[(x, y, x + side, y + side, label, score) for x, y, side, label, score in rows])
    assert found.scores is not None
    alone = found[nms(found.boxes, found.scores, found.labels, 0.6)]
    overlap = iou_matrix(alone.boxes, alone.boxes).fill_diagonal_(0)
    assert bool((overlap[alone.labels[:, None] == alone.labels] <= 0.6).all())
    (fused,) = fuse([[alone], [alone]], 0.05, 0.6, 100)
    assert fused.scores is not None
    assert alone.scores is not None
    torch.testing.assert_close(fused.scores, alone.scores)
    assert len(fused) == len(alone)
