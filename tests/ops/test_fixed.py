"""Detections in fixed shapes: the same as the lists of `suppress`, filled up."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssod.ops.dense import suppress
from ssod.ops.fixed import fill, fixed_detections, keep_mask
from ssod.ops.forms import graph_for, graph_target


def scene(seed, count=60, classes=3, batch=2):
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(batch, count, 2, generator=g) * 80
    side = torch.rand(batch, count, 2, generator=g) * 40 + 2
    scores = torch.rand(batch, count, generator=g)
    return torch.cat([corner, corner + side], dim=-1), scores, torch.randint(0, classes, (batch, count), generator=g)


def test_the_target_ends_with_its_block():
    assert graph_target() is None
    with graph_for("tensorrt"):
        assert graph_target() == "tensorrt"
    assert graph_target() is None


@pytest.mark.parametrize("target", ["onnx", "tensorrt"])
@given(seed=st.integers(0, 10**6), count=st.integers(1, 80), iou=st.sampled_from([0.3, 0.5, 0.7]))
@settings(max_examples=40, deadline=None)
def test_equals_the_lists_of_suppress(target, seed, count, iou):
    boxes, scores, labels = scene(seed, count)
    lists = suppress(boxes, scores, labels, None, 0.2, iou, 30)
    with graph_for(target):
        fixed = fixed_detections(boxes, scores, labels, 3, 0.2, iou, 30)
    assert [tuple(t.shape) for t in fixed] == [(2, 1), (2, 30, 4), (2, 30), (2, 30)]
    for b, found in enumerate(lists):
        n = int(fixed.num_dets[b])
        assert n == len(found)
        torch.testing.assert_close(fixed.scores[b, :n], found.scores)
        torch.testing.assert_close(fixed.boxes[b, :n], found.boxes)
        assert fixed.labels[b, :n].tolist() == found.labels.tolist()
        assert (fixed.labels[b, n:] == -1).all()
        assert not fixed.scores[b, n:].any()
        assert not fixed.boxes[b, n:].any()


@pytest.mark.parametrize("target", ["onnx", "tensorrt"])
def test_a_box_suppressed_by_a_suppressed_one_stays(target):
    # IoU of neighbours: 10 px apart of 30 wide, 20 / 40 = 0.5; two apart: 10 / 50 = 0.2. The second falls, the third,
    # whose only rival has fallen, stays.
    boxes = torch.tensor([[[0.0, 0, 30, 10], [10, 0, 40, 10], [20, 0, 50, 10]]])
    with graph_for(target):
        keep = keep_mask(boxes, torch.tensor([[0.9, 0.8, 0.7]]), torch.zeros(1, 3, dtype=torch.int64), 1, 0.4)
    assert keep.tolist() == [[True, False, True]]


@pytest.mark.parametrize("target", ["onnx", "tensorrt"])
def test_of_equal_boxes_with_equal_scores_one_stays_and_other_classes_do_not_matter(target):
    boxes = torch.tensor([[[0.0, 0, 10, 10]] * 3])
    with graph_for(target):
        keep = keep_mask(boxes, torch.tensor([[0.5, 0.5, 0.5]]), torch.tensor([[0, 0, 1]]), 2, 0.5)
    assert keep.sum() == 2
    assert keep[0, 2]


def test_nothing_above_the_threshold_is_all_padding():
    boxes, scores, labels = scene(0)
    found = fill(boxes, scores * 0.1, labels, 0.2, 7)
    assert found.num_dets.tolist() == [[0], [0]]
    assert found.labels.tolist() == [[-1] * 7] * 2
    assert not found.boxes.any()


def test_fewer_candidates_than_detections():
    found = fill(torch.tensor([[[1.0, 2, 3, 4]]]), torch.tensor([[0.6]]), torch.tensor([[2]]), 0.5, 3)
    assert found.num_dets.tolist() == [[1]]
    assert found.boxes[0].tolist() == [[1, 2, 3, 4], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert found.labels.tolist() == [[2, -1, -1]]
