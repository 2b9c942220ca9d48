import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssod.deploy.compare import GATES, Difference, Gate, compare
from ssod.deploy.contract import Outputs

D = 6
CONF = 0.1
TOL = 0.01


def outputs(*images: list[tuple[float, float, int]]) -> Outputs:
    """Images as rows (left edge, score, label) of boxes 10 px wide, padded to D."""
    b = len(images)
    boxes, scores = np.zeros((b, D, 4), np.float32), np.zeros((b, D), np.float32)
    labels = np.full((b, D), -1, np.int32)
    for i, rows in enumerate(images):
        for j, (left, score, label) in enumerate(rows):
            boxes[i, j], scores[i, j], labels[i, j] = (left, 5, left + 10, 15), score, label
    return Outputs(np.array([[len(rows)] for rows in images], np.int32), boxes, scores, labels)


def test_the_same_differs_in_nothing():
    a = outputs([(0, 0.9, 0), (50, 0.8, 1)], [])
    assert compare(a, a, CONF, TOL) == Difference(total=4)
    assert compare(a, a, CONF, TOL).passes(GATES["fp32"])


def test_equal_scores_may_change_places():
    a = outputs([(0, 0.5, 0), (300, 0.5, 0), (600, 0.5, 1)])
    b = outputs([(600, 0.5, 1), (300, 0.5, 0), (0, 0.5, 0)])
    assert compare(a, b, CONF, TOL) == Difference(total=6)


def test_a_shifted_box_and_a_changed_score_are_reported():
    a = outputs([(0, 0.9, 0), (50, 0.8, 1)])
    found = compare(a, outputs([(0.25, 0.9, 0), (50, 0.75, 1)]), CONF, TOL)
    assert found.box == 0.25
    assert found.score == pytest.approx(0.05)
    assert found.unmatched == 0


def test_a_far_box_and_another_label_have_no_partner():
    a = outputs([(0, 0.9, 0), (50, 0.8, 1)])
    assert compare(a, outputs([(7, 0.9, 0), (50, 0.8, 1)]), CONF, TOL) == Difference(unmatched=2, total=4)
    assert compare(a, outputs([(0, 0.9, 1), (50, 0.8, 1)]), CONF, TOL) == Difference(unmatched=2, total=4)


def test_the_nearest_is_the_partner_and_only_of_one():
    a = outputs([(0, 0.9, 0), (1, 0.8, 0)])
    b = outputs([(1, 0.8, 0), (0.125, 0.9, 0)])
    assert compare(a, b, CONF, TOL) == Difference(box=0.125, total=4)
    assert compare(a, outputs([(0, 0.9, 0)]), CONF, TOL) == Difference(unmatched=1, total=3)


def test_boxes_in_one_place_are_paired_by_score():
    a = outputs([(0, 0.9, 0), (0, 0.5, 0)])
    b = outputs([(0, 0.5, 0), (0, 0.9, 0)])
    assert compare(a, b, CONF, TOL) == Difference(total=4)


def test_a_score_near_conf_may_be_missing():
    a = outputs([(0, 0.9, 0), (50, 0.105, 1)])
    b = outputs([(0, 0.9, 0)])
    assert compare(a, b, CONF, TOL) == Difference(near_cut=1, total=3)
    assert compare(a, b, CONF, tolerance=0.001) == Difference(unmatched=1, total=3)


def test_the_last_of_a_full_list_may_be_another():
    rows = [(100 * i, 0.9 - 0.1 * i, 0) for i in range(D - 1)]
    a = outputs([*rows, (700, 0.405, 0)])
    b = outputs([*rows, (800, 0.4, 0)])
    assert compare(a, b, CONF, TOL) == Difference(near_cut=2, total=2 * D)
    one_free = outputs([*rows[1:], (800, 0.4, 0)])  # it had room, so 0.405 is missing for no reason
    assert compare(outputs([*rows[1:], (700, 0.405, 0)]), one_free, CONF, TOL) == Difference(
        unmatched=2, total=2 * D - 2
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_never_passes(value):
    a = outputs([(100 * i, 0.9, 0) for i in range(D)])
    b = outputs([(100 * i, 0.9, 0) for i in range(D)])
    b.boxes[0, 2, 1] = value
    for found in (compare(a, b, CONF, TOL), compare(b, b, CONF, TOL)):
        assert found.box == math.inf
        assert not found.passes(Gate(1e6, 1e6, 0.5))


def test_gates():
    gate = GATES["fp16"]
    assert Difference(0.5, 0.01, unmatched=2, total=100).passes(gate)
    assert not Difference(0.51, 0.0, total=100).passes(gate)
    assert not Difference(0.0, 0.011, total=100).passes(gate)
    assert not Difference(unmatched=3, total=100).passes(gate)
    assert not Difference(unmatched=1, total=100).passes(GATES["fp32"])
    assert Difference().passes(gate)  # nothing is there on either side
    assert not Difference(near_cut=8, total=8).passes(gate)  # nothing of what is there was compared


def test_merge_and_text():
    both = Difference(0.1, 0.2, 1, 2, 10).merge(Difference(0.3, 0.1, 0, 1, 5))
    assert both == Difference(0.3, 0.2, 1, 3, 15)
    assert both.matched == 11
    text = "boxes within 0.3 px, scores within 2.0e-01, 1 of 15 detections unmatched, 3 more near the cut"
    assert both.text() == text
    assert Difference().text() == "no detections on either side"


# Coarse values, so that equal scores, boxes in one place and ties of distance come up.
ROWS = st.lists(
    st.tuples(st.integers(0, 6).map(lambda v: v / 2), st.sampled_from([0.1, 0.105, 0.5, 0.9]), st.integers(0, 1)),
    max_size=D,
)


@settings(max_examples=150, deadline=None)
@given(ROWS, ROWS)
def test_either_side_may_come_first(rows_a, rows_b):
    a, b = outputs(rows_a), outputs(rows_b)
    found = compare(a, b, CONF, TOL)
    assert found == compare(b, a, CONF, TOL)
    assert found.total == len(rows_a) + len(rows_b)
    assert found.matched % 2 == 0
    assert min(found.matched, found.unmatched, found.near_cut) >= 0


@settings(max_examples=100, deadline=None)
@given(st.data(), ROWS)
def test_any_order_of_the_same_rows_differs_in_nothing(data, rows):
    shuffled = data.draw(st.permutations(rows))
    assert compare(outputs(rows), outputs(shuffled), CONF, TOL) == Difference(total=2 * len(rows))


@settings(max_examples=100, deadline=None)
@given(st.data(), st.lists(st.integers(0, 50), min_size=1, max_size=D, unique=True), st.floats(0.01, 0.49))
def test_the_largest_shift_is_found(data, places, shift):
    rows = [(20.0 * place, 0.5, 0) for place in places]
    moved = data.draw(st.integers(0, len(rows) - 1))
    other = [(left + shift * (i == moved), score, label) for i, (left, score, label) in enumerate(rows)]
    found = compare(outputs(rows), outputs(other), CONF, TOL)
    assert found.box == pytest.approx(shift, abs=1e-3)
    assert (found.score, found.unmatched, found.near_cut) == (0, 0, 0)
