"""How right pseudo boxes are: detections held against true boxes, by class.

Letters: M detections, N true boxes, K classes. A detection is right when it overlaps a true box of its own class with
an IoU of at least RIGHT; true boxes are given away by descending score, each once, as in COCO's metric. Whether a
detection is right therefore does not depend on those of lower score, and one matching serves every threshold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssod.data.samples import Sample
from ssod.ops.boxes import iou_matrix
from ssod.structures import Instances

RIGHT = 0.5  # IoU
FOUND = 0.05  # score above which a detection counts as found
BINS = 10  # of scores 0..1, for the calibration
ENOUGH = 5  # true boxes, and right detections, that a suggested threshold needs


@dataclass(frozen=True)
class Judged:
    """Detections of many images. right bool [M]; iou [M] with the true box it has found, 0 where there is none;
    true int64 [K]: true boxes of each class."""

    labels: np.ndarray
    scores: np.ndarray
    right: np.ndarray
    iou: np.ndarray
    true: np.ndarray

    def of(self, label: int) -> Judged:
        """Those of one class."""
        own = self.labels == label
        return Judged(self.labels[own], self.scores[own], self.right[own], self.iou[own], self.true[label : label + 1])


def judge(found: list[tuple[Sample, Instances]], num_classes: int) -> Judged:
    """Detections of images, in image pixels, against their annotations. Those that find nothing but a crowd or a
    difficult object of their class are neither right nor wrong and are left out."""
    parts, true = [np.zeros((0, 4))], np.zeros(num_classes, np.int64)
    for sample, detections in found:
        true += np.bincount(sample.labels[~sample.crowd], minlength=num_classes)
        parts.append(_judge_image(sample, detections))
    rows = np.concatenate(parts)
    return Judged(rows[:, 0].astype(np.int64), rows[:, 1], rows[:, 2] > 0, rows[:, 3], true)


def _judge_image(sample: Sample, found: Instances) -> np.ndarray:
    """Rows [M, 4]: label, score, right, IoU."""
    assert found.scores is not None
    found = found[found.scores.argsort(descending=True, stable=True)]
    assert found.scores is not None
    boxes, labels = torch.from_numpy(sample.boxes), torch.from_numpy(sample.labels)
    crowd = torch.from_numpy(sample.crowd)
    own = found.labels[:, None] == labels  # [M, N]
    overlap = iou_matrix(found.boxes.float(), boxes) * (own & ~crowd)  # [M, N]
    within = _share_within(found.boxes.float(), boxes) * (own & crowd)  # [M, N]
    rows = []
    for i, (label, score) in enumerate(zip(found.labels.tolist(), found.scores.tolist(), strict=True)):
        best, j = overlap[i].max(0) if len(boxes) else (torch.tensor(0.0), torch.tensor(0))
        if best >= RIGHT:
            overlap[:, j] = 0  # taken
            rows.append((label, score, 1.0, float(best)))
        elif not (within[i] >= RIGHT).any():
            rows.append((label, score, 0.0, 0.0))
    return np.array(rows, np.float64).reshape(-1, 4)


def _share_within(boxes: Tensor, regions: Tensor) -> Tensor:
    """Share of the area of each box that lies in each region: [M, 4], [N, 4] -> [M, N]."""
    low = torch.maximum(boxes[:, None, :2], regions[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], regions[None, :, 2:])
    common = (high - low).clamp(min=0).prod(2)
    return common / (boxes[:, 2:] - boxes[:, :2]).prod(1).clamp(min=1e-9)[:, None]


def figures(judged: Judged, kept: np.ndarray | None) -> dict[str, Any]:
    """What audit.jsonl says of a class or of all, see audit.py. kept: bool [M], None without a threshold."""
    true = int(judged.true.sum())
    out: dict[str, Any] = {"true": true, "found": len(judged.scores)}
    if kept is None:
        out |= dict.fromkeys(("kept", "precision", "recall", "iou"))
    else:
        right = judged.right & kept
        out["kept"] = int(kept.sum())
        out["precision"] = float(right.sum() / kept.sum()) if kept.any() else None
        out["recall"] = float(right.sum() / true) if true else None
        out["iou"] = float(judged.iou[right].mean()) if right.any() else None
    return out | {"calibration": calibration(judged)}


def calibration(judged: Judged) -> list[dict[str, float]]:
    """Of BINS equal bins of scores: how many detections lie in each, and how many of these are right."""
    cell = (judged.scores * BINS).astype(np.int64).clip(0, BINS - 1)
    n, right = (np.bincount(c, minlength=BINS).tolist() for c in (cell, cell[judged.right]))
    return [{"low": b / BINS, "high": (b + 1) / BINS, "n": n[b], "right": right[b]} for b in range(BINS)]


def suggested_threshold(judged: Judged) -> float | None:
    """The threshold with the highest F1 = 2 right / (kept + true), halfway between the last score that it keeps and the
    first that it drops; of equals the highest. None with fewer than ENOUGH true boxes or right detections."""
    true = int(judged.true.sum())
    if true < ENOUGH or judged.right.sum() < ENOUGH:
        return None
    order = np.argsort(-judged.scores, kind="stable")
    scores = judged.scores[order]
    f1 = 2 * judged.right[order].cumsum() / (np.arange(1, len(scores) + 1) + true)  # where the first 1, 2, ... are kept
    f1[:-1][scores[:-1] == scores[1:]] = -1  # no threshold parts equal scores
    last = int(f1.argmax())
    below = scores[last + 1] if last + 1 < len(scores) else min(FOUND, scores[last])
    return round(float(scores[last] + below) / 2, 4)
