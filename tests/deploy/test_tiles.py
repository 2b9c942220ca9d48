"""Tiles: they cover the image, and for a model that finds everything it can see, cutting and merging change nothing."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssod.deploy.results import Boxes
from ssod.deploy.tiles import Place, Tiling, merged
from ssod.errors import UserError

SIDES = st.integers(40, 400)


def seen_in(place: Place, truth: np.ndarray, labels: np.ndarray) -> Boxes:
    """What a perfect model finds in a tile: the visible part of every box [N, 4], in the tile's pixels."""
    x1, y1, x2, y2 = place.xyxy
    part = np.stack(
        [truth[:, 0].clip(x1), truth[:, 1].clip(y1), truth[:, 2].clip(None, x2), truth[:, 3].clip(None, y2)]
    )
    part = part.T - [x1, y1, x1, y1]
    visible = (part[:, 2:] > part[:, :2]).all(1)
    shown = (part[:, 2:] - part[:, :2]).prod(1) / (truth[:, 2:] - truth[:, :2]).prod(1)
    return Boxes(part[visible], 0.2 + 0.8 * shown[visible], labels[visible], (place.height, place.width))


@settings(max_examples=150, deadline=None)
@given(SIDES, SIDES, st.integers(32, 150), st.floats(0, 0.9))
def test_tiles_cover_the_image_with_at_least_that_overlap(height: int, width: int, side: int, overlap: float) -> None:
    places = Tiling(side, overlap).places(height, width)
    assert len(set(places)) == len(places)
    assert {(p.width, p.height) for p in places} == {(min(side, width), min(side, height))}, "one size: one batch"
    for axis, length in ((0, width), (1, height)):
        starts = sorted({p[axis] for p in places})
        tile = min(side, length)
        assert starts[0] == 0
        assert starts[-1] + tile == length
        assert all(b - a <= max(1, tile * (1 - overlap) + 1e-9) for a, b in pairwise(starts))
    assert len(places) == len({p.x for p in places}) * len({p.y for p in places})
    if max(height, width) <= side:
        assert places == [Place(0, 0, width, height)]


@st.composite
def scenes(draw: st.DrawFn) -> tuple[int, int, Tiling, np.ndarray, np.ndarray]:
    """An image in cells that hold a box each at most, so that no two boxes touch; boxes may be larger than a tile."""
    tiling = Tiling(draw(st.integers(32, 100)), draw(st.floats(0.1, 0.5)))
    columns = np.cumsum([0, *draw(st.lists(st.integers(12, 110), min_size=1, max_size=4))])
    rows = np.cumsum([0, *draw(st.lists(st.integers(12, 110), min_size=1, max_size=4))])
    boxes, labels = [], []
    for left, right in pairwise(columns):
        for top, bottom in pairwise(rows):
            if draw(st.booleans()):
                inset = [draw(st.integers(0, 4)) for _ in range(4)]
                boxes.append([left + inset[0], top + inset[1], right - inset[2] - 1, bottom - inset[3] - 1])
                labels.append(draw(st.integers(0, 1)))
    truth = np.array(boxes, np.float64).reshape(-1, 4)
    return int(rows[-1]), int(columns[-1]), tiling, truth, np.array(labels, np.int64)


@settings(max_examples=150, deadline=None)
@given(scenes())
def test_a_perfect_model_finds_in_tiles_what_it_finds_in_the_whole(
    scene: tuple[int, int, Tiling, np.ndarray, np.ndarray],
) -> None:
    height, width, tiling, truth, labels = scene
    places = tiling.places(height, width)
    found = merged([seen_in(p, truth, labels) for p in places], places, (height, width), iou=0.6)
    got = np.c_[found.xyxy, found.cls]
    wanted = np.c_[truth, labels]
    np.testing.assert_allclose(got[np.lexsort(got.T)], wanted[np.lexsort(wanted.T)], atol=1e-3)
    assert (np.diff(found.conf) <= 0).all()
    assert found.orig_shape == (height, width)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_whatever_is_found_lies_in_the_image_and_comes_from_some_tile(seed: int) -> None:
    rng = np.random.default_rng(seed)
    places = Tiling(64, 0.25).places(150, 130)
    parts = []
    for place in places:
        low = rng.uniform(0, 50, (rng.integers(0, 9), 2))
        xyxy = np.c_[low, np.minimum(low + rng.uniform(1, 40, low.shape), [place.width, place.height])]
        parts.append(Boxes(xyxy, rng.random(len(low)), rng.integers(0, 2, len(low)), (place.height, place.width)))
    found = merged(parts, places, (150, 130), iou=0.5)
    assert (found.xyxy >= 0).all()
    assert (found.xyxy[:, 2:] <= [130, 150]).all()
    assert set(found.conf.tolist()) <= {c for part in parts for c in part.conf.tolist()}
    again = merged(parts, places, (150, 130), iou=0.5)
    np.testing.assert_array_equal(found.xyxy, again.xyxy)


TWO = [Place(0, 0, 100, 100), Place(80, 0, 100, 100)]  # they share x = 80 .. 100


def boxes(*rows: tuple[float, float, float, float, float, int]) -> Boxes:
    values = np.array(rows, np.float64).reshape(-1, 6)
    return Boxes(values[:, :4], values[:, 4], values[:, 5].astype(int), (100, 100))


def test_the_whole_box_stays_whatever_the_scores() -> None:
    left = boxes((85, 10, 100, 40, 0.9, 0))  # cut at the right border: the object goes on to 120
    right = boxes((5, 10, 40, 40, 0.3, 0))
    found = merged([left, right], TWO, (100, 180), iou=0.6)
    np.testing.assert_allclose(found.xyxy, [[85, 10, 120, 40]])
    np.testing.assert_allclose(found.conf, [0.3])


def test_what_no_tile_sees_whole_is_put_together() -> None:
    found = merged([boxes((20, 10, 99.5, 40, 0.6, 0)), boxes((0, 11, 90, 41, 0.7, 0))], TWO, (100, 180), iou=0.6)
    np.testing.assert_allclose(found.xyxy, [[20, 10, 170, 41]])
    np.testing.assert_allclose(found.conf, [0.7])


def test_other_classes_and_other_places_are_other_objects() -> None:
    left = boxes((85, 10, 100, 40, 0.9, 0), (82, 50, 98, 70, 0.8, 1))
    right = boxes((5, 10, 40, 40, 0.3, 1), (2, 72, 18, 92, 0.7, 1))
    assert len(merged([left, right], TWO, (100, 180), iou=0.6)) == 4
    same = boxes((3, 51, 17, 69, 0.9, 1))
    assert merged([boxes((82, 50, 98, 70, 0.8, 1)), same], TWO, (100, 180), iou=0.6).conf.tolist() == [
        np.float32(0.9)
    ], "whole in both: the higher score"


def test_boxes_of_one_tile_are_the_models_own_business() -> None:
    part = boxes((10, 10, 50, 50, 0.9, 0), (11, 10, 50, 50, 0.8, 0))
    assert len(merged([part, boxes()], TWO, (100, 180), iou=0.5)) == 2


@pytest.mark.parametrize(
    ("side", "overlap", "words"), [(16, 0.2, "tile=16"), (64, 0.95, "overlap=0.95"), (64, -1, "overlap=-1")]
)
def test_what_is_no_tiling(side: int, overlap: float, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Tiling(side, overlap)
