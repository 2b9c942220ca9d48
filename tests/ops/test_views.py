"""Boxes between views: there and back, clipping, and what clipping drops."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssod.data.views.geometry import affine_matrix, translation
from ssod.ops.views import between, map_boxes, map_instances, map_points
from ssod.structures import Instances

SIZE = 640


@st.composite
def axis_aligned(draw: st.DrawFn) -> torch.Tensor:
    """A chain of resizes, flips and shifts, as a matrix."""
    matrix = np.eye(3)
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(["resize", "flip", "shift"]))
        if kind == "resize":
            step = np.diag([draw(st.floats(0.5, 2)), draw(st.floats(0.5, 2)), 1.0])
        elif kind == "flip":
            step = np.array([[-1.0, 0, draw(st.integers(1, 2000))], [0, 1, 0], [0, 0, 1]])
        else:
            step = translation(draw(st.floats(-300, 300)), draw(st.floats(-300, 300)))
        matrix = step @ matrix
    return torch.from_numpy(matrix)


@st.composite
def oblique(draw: st.DrawFn) -> torch.Tensor:
    """A chain that also turns and shears."""
    matrix = draw(axis_aligned()).numpy()
    for _ in range(draw(st.integers(1, 3))):
        shear = (draw(st.floats(-30, 30)), draw(st.floats(-30, 30)))
        shift = (draw(st.floats(-60, 60)), draw(st.floats(-60, 60)))
        matrix = affine_matrix(SIZE, SIZE, draw(st.floats(-45, 45)), shear, shift, draw(st.floats(0.7, 1.4))) @ matrix
    return torch.from_numpy(matrix)


@st.composite
def some_boxes(draw: st.DrawFn) -> torch.Tensor:
    corner = st.floats(0, SIZE, width=32)
    pairs = draw(st.lists(st.tuples(corner, corner, corner, corner), max_size=8))
    values = torch.tensor(pairs, dtype=torch.float32).reshape(-1, 4)
    return torch.cat((torch.minimum(values[:, :2], values[:, 2:]), torch.maximum(values[:, :2], values[:, 2:])), 1)


@given(axis_aligned(), axis_aligned(), some_boxes())
def test_axis_aligned_boxes_come_back(a: torch.Tensor, b: torch.Tensor, boxes: torch.Tensor) -> None:
    in_a = map_boxes(boxes, a)
    in_b = map_boxes(in_a, between(a, b))
    torch.testing.assert_close(map_boxes(in_b, between(b, a)), in_a, rtol=0, atol=0.01)
    torch.testing.assert_close(map_boxes(in_a, between(a, torch.eye(3).double())), boxes, rtol=0, atol=0.01)


@given(oblique(), oblique(), some_boxes())
def test_points_come_back_from_any_chain(a: torch.Tensor, b: torch.Tensor, boxes: torch.Tensor) -> None:
    points = map_points(boxes.reshape(-1, 2).double(), a)
    there = map_points(points, between(a, b))
    torch.testing.assert_close(map_points(there, between(b, a)), points, rtol=0, atol=0.01)


@given(oblique(), some_boxes())
def test_oblique_boxes_enclose_their_corners(matrix: torch.Tensor, boxes: torch.Tensor) -> None:
    moved = map_boxes(boxes, matrix).double()
    for corner in ([0, 1], [2, 1], [2, 3], [0, 3]):
        points = map_points(boxes[:, corner].double(), matrix)
        assert (points >= moved[:, :2] - 0.01).all()
        assert (points <= moved[:, 2:] + 0.01).all()


@settings(max_examples=30)
@given(axis_aligned())
def test_between_is_the_product_with_the_inverse(matrix: torch.Tensor) -> None:
    other = torch.from_numpy(affine_matrix(480, 640, 20, (5, -3)))
    expected = other @ torch.linalg.inv(matrix)
    torch.testing.assert_close(between(matrix, other), expected)
    batched = between(matrix.expand(4, 3, 3), other.expand(4, 3, 3))
    torch.testing.assert_close(batched, expected.expand(4, 3, 3))


def test_a_turn_by_90_degrees_is_known() -> None:
    matrix = torch.from_numpy(affine_matrix(100, 100, rotate=90))
    # Clockwise as seen: the top left corner goes to the top right.
    torch.testing.assert_close(map_boxes(torch.tensor([[0.0, 0, 20, 10]]), matrix), torch.tensor([[90.0, 0, 100, 20]]))


def test_boxes_outside_are_dropped_and_the_rest_clipped() -> None:
    boxes = torch.tensor(
        [[10.0, 10, 30, 30], [90, 10, 130, 30], [200, 10, 220, 30], [99.5, 0, 140, 40], [50, 50, 50, 60]]
    )
    found = Instances(boxes, torch.arange(5), scores=torch.linspace(0.1, 0.9, 5))
    kept, index = map_instances(found, torch.eye(3).double(), (100, 100))
    assert index.tolist() == [0, 1]  # outside; 1 % visible; no area
    assert kept.boxes.tolist() == [[10, 10, 30, 30], [90, 10, 100, 30]]
    assert kept.labels.tolist() == [0, 1]
    assert kept.scores is not None
    torch.testing.assert_close(kept.scores, found.scores[index])  # type: ignore[index]
    _, lenient = map_instances(found, torch.eye(3).double(), torch.tensor([100, 100]), min_visible=0)
    assert lenient.tolist() == [0, 1, 3]
    _, strict = map_instances(found, torch.eye(3).double(), (100, 100), min_visible=0.5)
    assert strict.tolist() == [0]


@given(oblique(), some_boxes())
def test_mapped_instances_lie_in_the_view(matrix: torch.Tensor, boxes: torch.Tensor) -> None:
    found = Instances(boxes, torch.zeros(len(boxes), dtype=torch.int64))
    kept, index = map_instances(found, matrix, (300, 400))
    assert len(kept) == len(index)
    x1, y1, x2, y2 = kept.boxes.unbind(1)
    assert ((x1 >= 0) & (x1 < x2) & (x2 <= 400) & (y1 >= 0) & (y1 < y2) & (y2 <= 300)).all()


def test_no_boxes_is_no_trouble() -> None:
    kept, index = map_instances(Instances.empty(), torch.eye(3).double(), (10, 10))
    assert kept.boxes.shape == (0, 4)
    assert index.shape == (0,)
