"""Detections against true boxes: what is right, what is left out, calibration, and thresholds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ssod.data.samples import Sample
from ssod.engine.watch.audit import measured, spoken, suggestion
from ssod.engine.watch.audit_metric import calibration, figures, judge, suggested_threshold
from ssod.structures import Instances

NAMES = ["a", "b"]


def image(boxes: list[tuple[float, ...]], labels: list[int], crowd: list[int] | None = None) -> Sample:
    return Sample(
        *(Path("x.png"), 1, 100, 100),
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(labels, np.int64),
        np.array(crowd or [0] * len(labels), np.bool_),
        labeled=True,
    )


def detections(*rows: tuple[float, float, float, float, int, float]) -> Instances:
    """x1, y1, x2, y2, label, score."""
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return Instances(table[:, :4], table[:, 4].long(), table[:, 5])


def test_right_is_the_own_class_half_overlapping_and_each_true_box_once() -> None:
    sample = image([(0, 0, 10, 10), (50, 50, 60, 60)], [0, 1])
    found = detections(
        (0, 0, 10, 8, 0, 0.5),  # IoU 0.8, but a better-scored box has found the object
        (0, 0, 10, 5, 0, 0.9),  # IoU 0.5 exactly: right
        (50, 50, 60, 60, 0, 0.8),  # another class
        (50, 50, 60, 54.9, 1, 0.7),  # IoU just below a half
    )
    judged = judge([(sample, found)], 2)
    assert judged.scores.tolist() == pytest.approx([0.9, 0.8, 0.7, 0.5])
    assert judged.right.tolist() == [True, False, False, False]
    assert judged.iou.tolist() == [0.5, 0, 0, 0]
    assert judged.true.tolist() == [1, 1]


def test_a_box_takes_the_true_box_that_it_overlaps_most() -> None:
    sample = image([(0, 0, 10, 10), (2, 0, 12, 10)], [0, 0])
    judged = judge([(sample, detections((2, 0, 12, 10, 0, 0.9), (1, 0, 11, 10, 0, 0.8)))], 1)
    assert judged.right.tolist() == [True, True]
    assert judged.iou.tolist() == pytest.approx([1, 9 / 11])


def test_what_lies_in_a_crowd_is_neither_right_nor_wrong() -> None:
    sample = image([(0, 0, 50, 50), (0, 0, 10, 10)], [0, 0], [1, 0])
    found = detections(
        (0, 0, 10, 10, 0, 0.9),  # right, though it lies in the crowd
        (20, 20, 30, 30, 0, 0.8),  # in the crowd
        (40, 40, 70, 70, 0, 0.7),  # a ninth of it in the crowd: wrong
        (20, 20, 30, 30, 1, 0.6),  # a crowd of another class: wrong
    )
    judged = judge([(sample, found)], 2)
    assert judged.scores.tolist() == pytest.approx([0.9, 0.7, 0.6])
    assert judged.right.tolist() == [True, False, False]
    assert judged.true.tolist() == [1, 0]


def test_figures_of_what_a_threshold_keeps() -> None:
    sample = image([(0, 0, 10, 10), (20, 0, 30, 10), (40, 0, 50, 10)], [0, 0, 0])
    found = detections(
        (0, 0, 10, 8, 0, 0.95), (20, 0, 30, 6, 0, 0.65), (70, 0, 80, 10, 0, 0.55), (40, 0, 50, 10, 0, 0.3)
    )
    judged = judge([(sample, found), (image([], []), detections())], 1)
    kept = figures(judged, judged.scores >= 0.5)
    assert [kept[k] for k in ("true", "found", "kept")] == [3, 4, 3]
    assert kept["precision"] == pytest.approx(2 / 3)
    assert kept["recall"] == pytest.approx(2 / 3)
    assert kept["iou"] == pytest.approx(0.7)
    nothing = figures(judged, judged.scores >= 0.99)
    assert [nothing[k] for k in ("kept", "precision", "recall", "iou")] == [0, None, 0.0, None]
    unasked = figures(judged, None)
    assert [unasked[k] for k in ("found", "kept", "precision", "recall", "iou")] == [4, None, None, None, None]
    bins = [(b["low"], b["high"], b["n"], b["right"]) for b in calibration(judged) if b["n"]]
    assert bins == [(0.3, 0.4, 1, 1), (0.5, 0.6, 1, 0), (0.6, 0.7, 1, 1), (0.9, 1.0, 1, 1)]


def test_no_image_has_no_figures() -> None:
    entry = measured([], NAMES, np.array([0.5, 0.5]))
    assert [entry["all"][k] for k in ("true", "found", "kept", "precision", "recall")] == [0, 0, 0, None, None]
    assert "too few" in suggestion(entry)


def scene(right: list[float], wrong: list[float], missed: int) -> tuple[Sample, Instances]:
    """True boxes side by side, found with these scores or missed, and wrong detections elsewhere; class 0."""
    boxes = [(20.0 * i, 0.0, 20.0 * i + 10, 10.0) for i in range(len(right) + missed)]
    rows = [(*b, 0, s) for b, s in zip(boxes, right, strict=False)]
    rows += [(20.0 * i, 50.0, 20.0 * i + 10, 60.0, 0, s) for i, s in enumerate(wrong)]
    return image(boxes, [0] * len(boxes)), detections(*rows)


def test_the_suggested_threshold_has_the_best_f1_of_all() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        right, wrong = rng.uniform(0.2, 1, 12).tolist(), rng.uniform(0.05, 0.7, 15).tolist()
        judged = judge([scene(right, wrong, missed=3)], 1)
        tau = suggested_threshold(judged)
        assert tau is not None

        def f1(threshold: float, judged=judged) -> float:
            kept = judged.scores >= threshold
            return 2 * (judged.right & kept).sum() / (kept.sum() + 15)

        assert f1(tau) == pytest.approx(max(f1(t) for t in np.linspace(0, 1, 2001)), abs=1e-9)


def test_the_suggested_threshold_parts_what_it_keeps_from_the_next() -> None:
    assert suggested_threshold(judge([scene([0.9, 0.8, 0.7, 0.65, 0.6], [0.4, 0.3], 0)], 1)) == pytest.approx(0.5)
    # Equal scores are kept or dropped together: 5 right and 5 wrong ones at 0.5 are worth having, at 0.4 no more.
    tied = scene([0.5] * 5, [0.5] * 5 + [0.4], 0)
    assert suggested_threshold(judge([tied], 1)) == pytest.approx(0.45)


@pytest.mark.parametrize(("right", "missed"), [([0.9] * 4, 0), ([0.9] * 4, 10), ([], 10)])
def test_few_boxes_suggest_nothing(right: list[float], missed: int) -> None:
    assert suggested_threshold(judge([scene(right, [0.2], missed)], 1)) is None


def test_lines_for_the_console() -> None:
    found = [scene([0.9, 0.8, 0.7, 0.65, 0.6], [0.4, 0.3], 1)]
    entry = {"step": 4, "network": "teacher", "images": 1} | measured(found, NAMES, np.array([0.62, 0.5]))
    assert entry["classes"]["b"]["precision"] is None
    assert spoken(entry) == (
        "audit, teacher: precision 1.00, recall 0.67 of 6 true boxes in 1 images; 4 boxes kept at tau 0.50 to 0.62, "
        "mean IoU of the right ones 1.00; above 0.05 it finds 0.83"
    )
    assert suggestion(entry) == (
        "audit: thresholds with the best F1 on 6 true boxes: by class a 0.50 (now 0.62); one for all 0.50"
    )
    without = entry | measured(found, NAMES, None)
    assert spoken(without).startswith("audit, teacher: no threshold in force; above 0.05 it finds 0.83 of 6 true boxes")
    assert suggestion(without).endswith("by class a 0.50; one for all 0.50")
