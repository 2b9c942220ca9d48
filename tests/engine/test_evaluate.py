"""COCO metrics: equal to pycocotools called by hand, and sane where pycocotools is not (FAULTS 7, 8, 31)."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ssod.data.samples import Sample
from ssod.engine.evaluate import FIGURES, coco_metrics, coco_rows, coco_truth
from ssod.errors import UserError
from ssod.structures import Instances

NAMES = ["a", "b", "c"]


def scene(seed: int, images: int = 12) -> tuple[list[Sample], list[tuple[int, Instances]]]:
    """Random annotations (class c never occurs; some crowds) and detections near them."""
    rng = np.random.default_rng(seed)
    samples, found = [], []
    for index in range(images):
        n = int(rng.integers(0, 6))
        low = rng.uniform(0, 150, (n, 2))
        boxes = np.hstack([low, low + rng.uniform(5, 140, (n, 2))]).astype(np.float32)
        labels = rng.integers(0, 2, n)
        samples.append(Sample(Path(f"{index}.jpg"), index * 7, 300, 300, boxes, labels, rng.random(n) < 0.15, True))
        guess = np.vstack([boxes + rng.normal(0, 6, boxes.shape), boxes[:1] + 40]).astype(np.float32)
        guess[:, 2:] = np.maximum(guess[:, 2:], guess[:, :2] + 1)
        scores = torch.from_numpy(rng.random(len(guess)).astype(np.float32))
        classes = torch.from_numpy(np.append(labels, labels[:1]))
        found.append((index, Instances(torch.from_numpy(guess), classes, scores=scores)))
    return samples, found


def by_hand(samples: list[Sample], found: list[tuple[int, Instances]], folder: Path) -> list[float]:
    """pycocotools from files, as its own manual says."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations = []
    for index, s in enumerate(samples):
        for (x1, y1, x2, y2), label, crowd in zip(s.boxes.tolist(), s.labels.tolist(), s.crowd.tolist(), strict=True):
            bbox = [x1, y1, x2 - x1, y2 - y1]
            row = {"id": len(annotations) + 1, "image_id": index + 1, "category_id": label + 1, "bbox": bbox}
            annotations.append(row | {"area": bbox[2] * bbox[3], "iscrowd": int(crowd)})
    truth = {
        "images": [{"id": i + 1, "width": 300, "height": 300} for i in range(len(samples))],
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": n} for i, n in enumerate(NAMES)],
    }
    detections = []
    for index, d in found:
        for (x1, y1, x2, y2), label, score in zip(d.boxes.tolist(), d.labels.tolist(), d.scores.tolist(), strict=True):
            bbox = [x1, y1, x2 - x1, y2 - y1]
            detections.append({"image_id": index + 1, "category_id": label + 1, "bbox": bbox, "score": score})
    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "found.json").write_text(json.dumps(detections))
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO(str(folder / "truth.json"))
        ev = COCOeval(gt, gt.loadRes(str(folder / "found.json")), "bbox")
        ev.evaluate()
        ev.accumulate()
        ev.summarize()
    return ev.stats.tolist()


@pytest.mark.parametrize("backend", ["pycocotools", "faster"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_figures_equal_pycocotools_by_hand(backend: str, seed: int, tmp_path: Path) -> None:
    if backend == "faster":
        pytest.importorskip("faster_coco_eval")
    samples, found = scene(seed)
    metrics = coco_metrics(coco_truth(samples, NAMES), coco_rows(found), backend)
    expected = by_hand(samples, found, tmp_path)
    assert 0 < expected[0] < 1
    for name, value in zip(FIGURES, expected, strict=True):
        ours = metrics.figures[name]
        assert math.isnan(ours) if value < 0 else ours == pytest.approx(value, abs=1e-9), name


def test_a_class_that_never_occurs_is_left_out_of_the_mean() -> None:
    samples, found = scene(0)
    metrics = coco_metrics(coco_truth(samples, NAMES), coco_rows(found))
    assert math.isnan(metrics.per_class["c"])
    assert metrics.ap == pytest.approx((metrics.per_class["a"] + metrics.per_class["b"]) / 2)


def test_perfect_detections_score_one_also_for_the_first_annotation() -> None:  # 8: id 0 would never match
    boxes = np.array([[10, 10, 60, 60]], np.float32)
    sample = Sample(Path("x.jpg"), 0, 100, 100, boxes, np.array([0]), np.array([False]), True)
    found = Instances(torch.from_numpy(boxes), torch.tensor([0]), scores=torch.tensor([0.9]))
    assert coco_metrics(coco_truth([sample], ["a"]), coco_rows([(0, found)])).ap == pytest.approx(1.0)


def test_no_detection_scores_zero_and_nan_where_nothing_is_annotated() -> None:
    samples, _ = scene(0)
    metrics = coco_metrics(coco_truth(samples, NAMES), coco_rows([]))
    assert metrics.ap == 0
    assert metrics.per_class["a"] == 0
    assert math.isnan(metrics.per_class["c"])
    empty = [Sample.unlabeled(Path("x.jpg"), 1, 10, 10)]
    assert math.isnan(coco_metrics(coco_truth(empty, NAMES), coco_rows([])).ap)


@pytest.mark.parametrize("what", ["score", "box"])
@pytest.mark.fault(31)
def test_what_is_not_finite_is_refused(what: str) -> None:
    samples, found = scene(0)
    bad = found[0][1] if len(found[0][1]) else found[1][1]
    (bad.scores if what == "score" else bad.boxes[0])[0] = float("nan")
    with pytest.raises(UserError, match=r"1 of \d+ detections .* not finite"):
        coco_metrics(coco_truth(samples, NAMES), coco_rows(found))


def test_declared_areas_sort_objects_by_size() -> None:
    boxes = np.array([[0, 0, 50, 50]], np.float32)  # 2,500 px: medium; as a thin polygon of 500 px: small
    for areas, small in ((None, False), (np.array([500], np.float32), True)):
        sample = Sample(Path("x.jpg"), 0, 100, 100, boxes, np.array([0]), np.array([False]), True, areas)
        figures = coco_metrics(coco_truth([sample], ["a"]), coco_rows([])).figures
        assert math.isnan(figures["APm"]) == small
        assert math.isnan(figures["APs"]) != small
