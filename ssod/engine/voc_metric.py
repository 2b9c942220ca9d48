"""The Pascal VOC metric: average precision at IoU 0.5, by eleven points (VOC07) and by area (VOC10 and later).

Everingham et al., "The Pascal Visual Object Classes Challenge", IJCV 2010, section 4.2, and the development kit:
detections of a class are taken by falling score; each belongs to the object of its class and image that it overlaps
most; from an IoU of 0.5 on it is right if the object is still free and wrong if it was found before. Objects marked
difficult count neither as missed nor as found, and a detection that belongs to one is left out. That makes two
differences to COCO's AP50: there, a detection may take the next best free object, and 101 points are read off.

Letters: N objects and M detections of one class over all images, P pairs of a detection and an object of its image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ssod.data.samples import Sample
from ssod.engine.evaluate import Metrics

IOU = 0.5
FIGURES = ("VOC_AP50", "VOC07_AP50")


def voc_metrics(samples: Sequence[Sample], names: Sequence[str], rows: np.ndarray) -> Metrics:
    """VOC_AP50 (area) and VOC07_AP50 (eleven points), 0..1, means over the classes that have an object.

    rows: float64 [M, 7] of `coco_rows`. A sample's `crowd` marks difficult objects. per_class holds the area AP; NaN
    where a class has no object that is not difficult.
    """
    counts = [len(s.boxes) for s in samples]
    boxes = np.concatenate([np.zeros((0, 4)), *(s.boxes for s in samples)])  # [all objects, 4]
    labels = np.concatenate([np.zeros(0, np.int64), *(s.labels for s in samples)])
    difficult = np.concatenate([np.zeros(0, np.bool_), *(s.crowd for s in samples)])
    images = np.repeat(np.arange(len(samples)), counts)
    found_image, found_label = rows[:, 0].astype(np.int64) - 1, rows[:, 6].astype(np.int64) - 1
    found_boxes = np.hstack([rows[:, 1:3], rows[:, 1:3] + rows[:, 3:5]])

    area, points, per_class = [], [], {}
    for label, name in enumerate(names):
        of_class, found = labels == label, found_label == label
        total = int((of_class & ~difficult).sum())
        per_class[name] = float("nan")
        if total == 0:
            continue
        order = np.argsort(-rows[found, 5], kind="stable")  # equal scores: in the order of the images
        right, wrong = _judge(
            boxes[of_class], images[of_class], difficult[of_class], found_boxes[found][order], found_image[found][order]
        )
        per_class[name] = average_precision(right, wrong, total)
        area.append(per_class[name])
        points.append(average_precision_11(right, wrong, total))
    figures = {k: float(np.mean(v)) if v else float("nan") for k, v in zip(FIGURES, (area, points), strict=True)}
    return Metrics(figures, per_class, len(samples), len(rows))


def _judge(
    boxes: np.ndarray, image: np.ndarray, difficult: np.ndarray, found: np.ndarray, found_image: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which detections of a class, ranked by score, are right and which wrong: two bool [M], both false = left out.

    boxes [N, 4], image [N] ascending, difficult [N]; found [M, 4], found_image [M]. Boxes are xyxy pixels.
    """
    first = np.searchsorted(image, found_image, "left")
    many = np.searchsorted(image, found_image, "right") - first  # [M] objects in the image of each detection
    detection = np.repeat(np.arange(len(found)), many)  # [P]
    within = np.arange(len(detection)) - np.repeat(np.cumsum(many) - many, many)
    target = np.repeat(first, many) + within  # [P]
    iou = _iou(found[detection], boxes[target])

    best = np.full(len(found), -1)  # [M] the object each detection overlaps most, -1 = none
    order = np.lexsort((-target, iou))  # of equal overlaps the first object is written last
    best[detection[order]] = target[order]
    overlap = np.zeros(len(found))
    np.maximum.at(overlap, detection, iou)
    hit = overlap >= IOU

    left_out = np.zeros(len(found), np.bool_)
    left_out[hit] = difficult[best[hit]]
    right = np.zeros(len(found), np.bool_)
    claims = np.flatnonzero(hit & ~left_out)
    right[claims[np.unique(best[claims], return_index=True)[1]]] = True  # the best ranked claim to each object
    return right, ~right & ~left_out


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of boxes a [P, 4] and b [P, 4], pair by pair: [P]."""
    inner = np.clip(np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2]), 0, None).prod(1)
    areas = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1)
    return inner / np.maximum(areas - inner, 1e-12)


def average_precision(right: np.ndarray, wrong: np.ndarray, total: int) -> float:
    """Area below the precision envelope. right, wrong: bool [M] by falling score; total: objects to find, > 0."""
    hits, envelope = _curve(right, wrong)
    return float(np.sum(envelope * np.diff(hits, prepend=0)) / total)


def average_precision_11(right: np.ndarray, wrong: np.ndarray, total: int) -> float:
    """Mean of the best precision at a recall of at least 0, 0.1, ... 1; arguments as in `average_precision`."""
    hits, envelope = _curve(right, wrong)
    # 10 * hits >= k * total is recall >= k / 10 without rounding: 3 of 10 do reach a recall of 0.3.
    at = np.searchsorted(10 * hits, np.arange(11) * total, "left")
    return float(np.sum(envelope[at[at < len(envelope)]]) / 11)


def _curve(right: np.ndarray, wrong: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Right ones so far, and the best precision from each detection on: each [M]."""
    hits = np.cumsum(right)
    precision = hits / np.maximum(hits + np.cumsum(wrong), 1)
    return hits, np.maximum.accumulate(precision[::-1])[::-1]
