"""The VOC metric: worked by hand, against plain loops that follow the development kit, and in time for VOC07 test."""

from __future__ import annotations

import math
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssod.data.samples import Sample
from ssod.engine.evaluate import coco_metrics, coco_truth
from ssod.engine.voc_metric import average_precision, average_precision_11, voc_metrics


def sample(objects: list[tuple[list[float], int, bool]], side: int = 100) -> Sample:
    boxes = np.array([b for b, _, _ in objects], np.float32).reshape(-1, 4)
    labels = np.array([c for _, c, _ in objects], np.int64)
    return Sample(Path("x.jpg"), 1, side, side, boxes, labels, np.array([d for _, _, d in objects], np.bool_), True)


def table(found: list[tuple[int, list[float], float, int]]) -> np.ndarray:
    """Detections (image from 0, xyxy, score, label) as the rows that COCO metrics take, too."""
    rows = [[i + 1, x1, y1, x2 - x1, y2 - y1, score, c + 1] for i, (x1, y1, x2, y2), score, c in found]
    return np.array(rows, np.float64).reshape(-1, 7)


A, B, C = [0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]
NOWHERE = [70, 70, 80, 80]


# ----------------------------------------------------------------- by hand


def test_right_wrong_right() -> None:
    """Two objects; right, wrong, right: precision 1 up to a recall of 1/2, then 2/3."""
    metrics = voc_metrics(
        [sample([(A, 0, False), (B, 0, False)])], ["a"], table([(0, A, 0.9, 0), (0, NOWHERE, 0.8, 0), (0, B, 0.7, 0)])
    )
    assert metrics.figures["VOC_AP50"] == pytest.approx(1 / 2 * 1 + 1 / 2 * 2 / 3)
    assert metrics.figures["VOC07_AP50"] == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)  # 0 .. 0.5 and 0.6 .. 1


def test_a_second_detection_of_an_object_is_wrong() -> None:
    found = [(0, A, 0.9, 0), (0, A, 0.8, 0), (0, B, 0.7, 0)]
    metrics = voc_metrics([sample([(A, 0, False), (B, 0, False)])], ["a"], table(found))
    assert metrics.figures["VOC_AP50"] == pytest.approx(1 / 2 + 1 / 2 * 2 / 3)


def test_no_second_choice_unlike_coco() -> None:
    """Both detections overlap the same object most, and the other by more than half, too."""
    objects = [([0, 0, 10, 10], 0, False), ([3, 0, 13, 10], 0, False)]
    found = table([(0, [0, 0, 10, 10], 0.9, 0), (0, [1, 0, 11, 10], 0.8, 0)])
    assert voc_metrics([sample(objects)], ["a"], found).figures["VOC_AP50"] == pytest.approx(0.5)
    assert coco_metrics(coco_truth([sample(objects)], ["a"]), found).figures["AP50"] == pytest.approx(1.0)


def test_difficult_objects_neither_help_nor_hurt() -> None:
    easy = [(A, 0, False), (B, 0, False)]
    found = [(0, A, 0.9, 0), (0, NOWHERE, 0.7, 0), (0, B, 0.6, 0)]
    on_difficult = [(0, C, 0.95, 0), (0, C, 0.65, 0)]
    plain = voc_metrics([sample(easy)], ["a"], table(found))
    with_difficult = voc_metrics([sample([*easy, (C, 0, True)])], ["a"], table(found + on_difficult))
    assert with_difficult.figures == plain.figures
    as_wrong = voc_metrics([sample(easy)], ["a"], table(found + on_difficult))
    assert as_wrong.figures["VOC_AP50"] < plain.figures["VOC_AP50"]


def test_half_is_enough() -> None:
    half, less = [0, 0, 10, 5], [0, 0, 10, 4.99]
    for box, expected in ((half, 1.0), (less, 0.0)):
        assert voc_metrics([sample([(A, 0, False)])], ["a"], table([(0, box, 0.9, 0)])).figures["VOC_AP50"] == expected


def test_pixels_are_counted_as_the_development_kit_does() -> None:
    """The kit's boxes hold their first and last pixel: 1..2 and 2..3 share one of three columns, IoU 1/3."""
    truth, found = [0, 0, 2, 1], [1, 0, 3, 1]
    assert voc_metrics([sample([(truth, 0, False)])], ["a"], table([(0, found, 0.9, 0)])).figures["VOC_AP50"] == 0
    truth, found = [0, 0, 3, 1], [1, 0, 4, 1]  # two of four
    assert voc_metrics([sample([(truth, 0, False)])], ["a"], table([(0, found, 0.9, 0)])).figures["VOC_AP50"] == 1


def test_recall_is_compared_without_rounding() -> None:
    """Three of ten found is a recall of 0.3, though 3 * 0.1 > 0.3 in floating point."""
    right = np.array([True] * 3)
    assert average_precision_11(right, ~right, 10) == pytest.approx(4 / 11)  # at 0, 0.1, 0.2 and 0.3
    assert average_precision(right, ~right, 10) == pytest.approx(0.3)


def test_classes_without_objects_are_left_out_of_the_mean() -> None:
    metrics = voc_metrics(
        [sample([(A, 0, False), (B, 1, True)])], ["a", "b", "c"], table([(0, A, 0.9, 0), (0, C, 0.9, 2)])
    )
    assert metrics.figures["VOC_AP50"] == 1
    assert metrics.per_class["a"] == 1
    assert math.isnan(metrics.per_class["b"])
    assert math.isnan(metrics.per_class["c"])


def test_nothing_found_and_nothing_to_find() -> None:
    assert voc_metrics([sample([(A, 0, False)])], ["a"], table([])).figures == {"VOC_AP50": 0, "VOC07_AP50": 0}
    assert math.isnan(voc_metrics([sample([])], ["a"], table([(0, A, 0.5, 0)])).figures["VOC_AP50"])


# ----------------------------------------------------------------- against plain loops


def overlap(a: list[float], b: list[float]) -> Fraction:
    w, h = (max(0, min(a[k + 2], b[k + 2]) - max(a[k], b[k])) for k in (0, 1))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h
    return Fraction(int(w * h), int(union))


def by_loops(
    samples: list[Sample], found: list[tuple[int, list[float], float, int]], label: int
) -> tuple[Fraction, Fraction] | None:
    """(area, eleven points) of one class, one detection after the other; None where nothing is to be found."""
    free = {(i, k) for i, s in enumerate(samples) for k in range(len(s.boxes)) if s.labels[k] == label}
    difficult = {(i, k) for i, k in free if samples[i].crowd[k]}
    total = len(free) - len(difficult)
    if not total:
        return None
    objects, points, hits, misses = sorted(free), [], 0, 0
    for i, box, _, _ in sorted((f for f in found if f[3] == label), key=lambda f: -f[2]):
        here = [(overlap(box, samples[i].boxes[k].tolist()), -k) for j, k in objects if j == i]
        iou, k = max(here, default=(Fraction(0), 0))
        if iou >= Fraction(1, 2) and (i, -k) in difficult:
            continue
        if iou >= Fraction(1, 2) and (i, -k) in free:
            free.remove((i, -k))
            hits += 1
        else:
            misses += 1
        points.append((Fraction(hits, total), Fraction(hits, hits + misses)))
    best = [max((p for r, p in points if r >= Fraction(t, 10)), default=Fraction(0)) for t in range(11)]
    area, last = Fraction(0), Fraction(0)
    for recall, _ in points:
        area += (recall - last) * max(p for r, p in points if r >= recall)
        last = recall
    return area, sum(best, Fraction(0)) / 11


@st.composite
def scenes(draw: st.DrawFn) -> tuple[list[Sample], list[tuple[int, list[float], float, int]]]:
    """Boxes on a coarse grid, so that equal overlaps, overlaps of exactly one half and equal scores are common."""
    side = st.integers(0, 5)
    box = st.tuples(side, side, st.integers(1, 4), st.integers(1, 2)).map(
        lambda t: [float(v) for v in (t[0], t[1], t[0] + t[2], t[1] + t[3])]
    )
    objects = st.lists(st.tuples(box, st.integers(0, 1), st.booleans()), max_size=4)
    samples = [sample(o, 10) for o in draw(st.lists(objects, min_size=1, max_size=4))]
    score = st.sampled_from([0.1, 0.2, 0.5, 0.9])
    one = st.tuples(st.integers(0, len(samples) - 1), box, score, st.integers(0, 1))
    return samples, sorted(draw(st.lists(one, max_size=12)), key=lambda f: f[0])


@given(scenes())
def test_equal_to_plain_loops(scene: tuple[list[Sample], list[tuple[int, list[float], float, int]]]) -> None:
    samples, found = scene
    metrics = voc_metrics(samples, ["a", "b"], table(found))
    expected = [by_loops(samples, found, label) for label in (0, 1)]
    for name, both in zip("ab", expected, strict=True):
        ours = metrics.per_class[name]
        assert math.isnan(ours) if both is None else ours == pytest.approx(float(both[0]), abs=1e-12)
    present = [e for e in expected if e is not None]
    for k, figure in enumerate(metrics.figures.values()):
        mean = float(sum(e[k] for e in present) / len(present)) if present else float("nan")
        assert figure == pytest.approx(mean, abs=1e-12, nan_ok=True)


def test_fast_enough_for_voc07_test() -> None:
    """4,952 images, 20 classes, 12,032 objects, a hundred detections an image."""
    rng = np.random.default_rng(0)
    samples = []
    for n in rng.multinomial(12032, np.ones(4952) / 4952):
        low = rng.uniform(0, 400, (n, 2))
        boxes = np.hstack([low, low + rng.uniform(20, 100, (n, 2))]).astype(np.float32)
        samples.append(Sample(Path("x.jpg"), 1, 500, 500, boxes, rng.integers(0, 20, n), np.zeros(n, np.bool_), True))
    total = 100 * len(samples)
    rows = np.hstack(
        [
            np.repeat(np.arange(len(samples)), 100)[:, None] + 1.0,
            rng.uniform(0, 400, (total, 2)),
            rng.uniform(20, 100, (total, 2)),
            rng.random((total, 1)),
            rng.integers(1, 21, (total, 1)),
        ]
    )
    begin = time.process_time()
    metrics = voc_metrics(samples, [str(k) for k in range(20)], rows)
    assert time.process_time() - begin < 10  # about 0.5 s
    assert 0 < metrics.figures["VOC_AP50"] < 0.5
