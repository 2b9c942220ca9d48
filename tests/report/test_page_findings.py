"""Findings: which detections are right, the curves, the matrix, the mistakes; held against answers found by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ssod.data.samples import Sample
from ssod.engine.evaluate import coco_metrics, coco_truth
from ssod.report.findings import (
    GRID,
    Findings,
    confusion,
    curves,
    iou,
    match,
    worst_false_negatives,
    worst_false_positives,
)

NAMES = ["cat", "dog"]


def findings(truth: list[list[float]], found: list[list[float]], images: int = 2) -> Findings:
    listed = [{"file_name": f"{i}.jpg", "width": 100, "height": 100} for i in range(images)]
    tables = [np.asarray(rows, np.float64).reshape(-1, 7) for rows in (truth, found)]
    return Findings({"best": ["student", 5, 0.5]}, listed, NAMES, *tables)


def one_of_each() -> Findings:
    """Image 0: a cat found twice, a dog taken for a cat, a dog not seen. Image 1: a crowd of dogs, a cat too low."""
    return findings(
        [
            [0, 0, 0, 20, 20, 0, 0],
            [0, 40, 0, 60, 20, 1, 0],
            [0, 0, 60, 30, 90, 1, 0],
            [1, 0, 0, 50, 50, 1, 1],
            [1, 60, 60, 80, 80, 0, 0],
        ],
        [
            [0, 0, 0, 20, 20, 0, 0.9],
            [0, 1, 0, 21, 20, 0, 0.8],
            [0, 40, 0, 60, 20, 0, 0.7],
            [1, 5, 5, 25, 25, 1, 0.6],
            [1, 60, 60, 80, 80, 0, 0.1],
            [1, 0, 80, 10, 90, 1, 0.5],
        ],
    )


def test_boxes_are_given_once_and_crowds_do_not_count() -> None:
    m = match(one_of_each())
    assert m.right.tolist() == [True, False, False, False, True, False]
    assert m.crowd.tolist() == [False, False, False, True, False, False]
    assert m.owner.tolist() == [0, -1, -1, -1, 4]


def test_the_overlap_with_a_crowd_is_the_share_inside() -> None:
    a, b = np.asarray([[0.0, 0, 10, 10]]), np.asarray([[0.0, 0, 100, 100]])
    assert iou(a, b)[0, 0] == pytest.approx(0.01)
    assert iou(a, b, np.asarray([True]))[0, 0] == 1


def test_the_matrix_counts_every_box_and_every_detection() -> None:
    matrix = confusion(one_of_each(), 0.3)
    # cat: found, and the low one missed; dog: taken for a cat, not seen; of nothing: the second cat, a dog
    assert matrix.tolist() == [[1, 0, 1], [1, 0, 1], [1, 1, 0]]


def test_mistakes_say_what_they_are() -> None:
    f = one_of_each()
    m = match(f)
    wrong = {w.why for w in worst_false_positives(f, m, 10)}
    assert wrong == {"found twice", "it is a dog", "nothing is annotated here"}
    missed = {(w.label, w.why) for w in worst_false_negatives(f, m, 0.3, 10)}
    assert missed == {(1, "taken for a cat (0.70)"), (1, "not seen at all"), (0, "seen with 0.10, below 0.30")}


def test_mistakes_of_one_image_or_class_do_not_fill_the_page() -> None:
    found = [[0, 10 * i, 0, 10 * i + 8, 8, 0, 0.9 - 0.01 * i] for i in range(9)] + [[1, 0, 0, 9, 9, 1, 0.2]]
    shown = worst_false_positives(f := findings([], found), match(f), 4)
    assert [(w.image, w.label) for w in shown] == [(0, 0), (1, 1), (0, 0)]


def test_the_best_confidence_and_f1_of_a_class() -> None:
    c = curves(f := one_of_each(), match(f))
    cat = c.table[0]
    # of two cats 1 of 1 from 0.9 on: F1 = 2 * 1 / (1 + 2); both from 0.1 on among four: 2 * 2 / (4 + 2)
    assert c.f1[0][np.isclose(GRID, 0.85)] == pytest.approx(2 / 3)
    assert c.f1[0][np.isclose(GRID, 0.05)] == pytest.approx(2 / 3)
    assert (cat["boxes"], cat["f1"]) == (2, pytest.approx(2 / 3))
    assert c.table[1]["boxes"] == 2, "the crowd is no box to be found"
    assert c.precision[0, 0] == 1
    assert c.precision[0, -1] == 0.5


def test_nothing_found_and_nothing_annotated() -> None:
    empty = findings([], [])
    c = curves(empty, match(empty))
    assert c.best == 0.5
    assert np.isnan(c.f1).all()
    assert confusion(empty, 0.5).sum() == 0
    assert worst_false_positives(empty, match(empty), 5) == worst_false_negatives(empty, match(empty), 0.5, 5) == []
    blind = findings([[0, 0, 0, 9, 9, 0, 0]], [])
    assert curves(blind, match(blind)).f1[0].max() == 0
    assert [m.why for m in worst_false_negatives(blind, match(blind), 0.5, 5)] == ["not seen at all"]


@pytest.mark.parametrize("seed", range(3))
def test_the_precision_curve_is_that_of_the_coco_metric(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth, found, samples = [], [], []
    for image in range(12):
        own = []
        for k in range(6):
            x, y = 30 * (k % 3) + rng.uniform(0, 5), 40 * (k // 3) + rng.uniform(0, 5)
            label = int(rng.integers(2))
            own.append([x, y, x + 20, y + 25, label])
            truth.append([image, x, y, x + 20, y + 25, label, 0])
            if rng.uniform() < 0.8:
                dx, dy = rng.normal(0, 4, 2)
                found.append([image, x + dx, y + dy, x + dx + 20, y + dy + 25, label, rng.uniform(0.05, 1)])
        boxes, labels = np.asarray(own, np.float32)[:, :4], np.asarray(own)[:, 4].astype(np.int64)
        crowd = np.zeros(len(own), bool)
        samples.append(Sample(Path(f"{image}.jpg"), image + 1, 100, 100, boxes, labels, crowd, True))
    f = findings(truth, found, images=12)
    c = curves(f, match(f))
    r = f.found
    rows = np.hstack([r[:, :1] + 1, r[:, 1:3], r[:, 3:5] - r[:, 1:3], r[:, 6:], r[:, 5:6] + 1])
    ap50 = coco_metrics(coco_truth(samples, NAMES), rows, "pycocotools").figures["AP50"]
    assert np.nanmean(c.precision) == pytest.approx(ap50, abs=1e-6)


def test_findings_come_back_from_their_file(tmp_path: Path) -> None:
    f = one_of_each()
    f.save(tmp_path / "x.json")
    back = Findings.load(tmp_path / "x.json")
    assert back is not None
    assert (back.about, back.names, back.images) == (f.about, f.names, f.images)
    np.testing.assert_allclose(back.found, f.found, atol=0.05)
    assert Findings.load(tmp_path / "no.json") is None
    (tmp_path / "half.json").write_text((tmp_path / "x.json").read_text()[:40])
    assert Findings.load(tmp_path / "half.json") is None
