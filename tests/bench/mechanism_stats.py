"""Does a certainty tell how well a box sits? Detections beside the truth, and what is counted over them.

Letters: N detections of all images together, I images, R bootstrap draws. Whole images are drawn, since boxes of one
image are not independent of each other; intervals hold the middle 95 % of the draws.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import rankdata

from ssod.data.samples import Sample
from ssod.ops.boxes import iou_matrix
from ssod.structures import Instances

DRAWS = 500
ON_OBJECT = 0.5  # IoU from which a detection is about an object, well placed or not
Interval = tuple[float, float, float]  # value, and the ends of its interval


@dataclass
class Judged:
    """Detections of a labelled split.

    image, label  int [N]
    p             float [N], class probability (the score, where the detector does not give it apart)
    quality       float [N], v, s_loc or centerness; None where the detector has none
    iou           float [N], with the best box of the same class in the image; 0 where there is none
    overlaps      a float array [n, g] for each image: IoU of its detections with its boxes, 0 for another class
    truth         int [I, K], annotated boxes of each image by class; crowds are left out
    """

    image: np.ndarray
    label: np.ndarray
    p: np.ndarray
    quality: np.ndarray | None
    iou: np.ndarray
    overlaps: list[np.ndarray]
    truth: np.ndarray

    def certainties(self) -> dict[str, np.ndarray]:
        """What may rank pseudo boxes. p * v and its root rank alike, so the root is left out here."""
        return {"p": self.p} if self.quality is None else {"p": self.p, "v": self.quality, "p*v": self.p * self.quality}


def judge(found: Iterable[tuple[int, Instances]], samples: Sequence[Sample], num_classes: int, by_root: bool) -> Judged:
    """Lay detections beside annotations, in source image pixels.

    by_root: the score is sqrt(p * quality), as of a detector that ranks by quality (and FCOS with its centerness)
    """
    per_image = dict(found)
    image, label, p, quality, iou, overlaps = [], [], [], [], [], []
    truth = np.zeros((len(samples), num_classes), int)
    for index, sample in enumerate(samples):
        real = ~sample.crowd.astype(bool)
        labels = torch.as_tensor(sample.labels[real], dtype=torch.int64)
        boxes = torch.as_tensor(sample.boxes[real], dtype=torch.float32)
        truth[index] = np.bincount(labels.numpy(), minlength=num_classes)
        d = per_image.get(index, Instances(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0)))
        assert d.scores is not None
        same = d.labels[:, None] == labels[None]
        table = (iou_matrix(d.boxes.float(), boxes) * same).double().numpy()  # [n, g]
        overlaps.append(table)
        iou.append(table.max(axis=1, initial=0.0))
        image.append(np.full(len(d), index))
        label.append(d.labels.numpy())
        p.append(d.scores.double().numpy())
        if d.quality is not None:
            quality.append(d.quality.double().numpy())
    score = np.concatenate(p)
    v = np.concatenate(quality) if quality and sum(map(len, quality)) == len(score) else None
    if by_root and v is not None:
        score = np.minimum(score**2 / np.maximum(v, 1e-6), 1.0)
    return Judged(np.concatenate(image), np.concatenate(label), score, v, np.concatenate(iou), overlaps, truth)


def correlations(judged: Judged, keep: np.ndarray, seed: int = 0) -> dict[str, Interval]:
    """Spearman's rank correlation of p and of the quality with the true IoU, over the detections `keep` [N]; and
    "v - p", the difference in the same draws: above 0 throughout its interval, the quality tells more than the score.
    """
    measures = {"p": judged.p} if judged.quality is None else {"p": judged.p, "v": judged.quality}
    rows = rows_by_image(judged.image, keep, len(judged.truth))
    draws: dict[str, list[float]] = {name: [] for name in measures}
    for chosen in image_draws(len(rows), seed):
        index = np.concatenate([rows[i] for i in chosen])
        for name, values in measures.items():
            draws[name].append(spearman(values[index], judged.iou[index]))
    whole = {name: spearman(values[keep], judged.iou[keep]) for name, values in measures.items()}
    out = {name: _interval(whole[name], np.array(draws[name])) for name in measures}
    if "v" in out:
        out["v - p"] = _interval(whole["v"] - whole["p"], np.array(draws["v"]) - np.array(draws["p"]))
    return out


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation, ties at their mean rank; NaN where one of them is constant."""
    if len(a) < 2 or (a == a[0]).all() or (b == b[0]).all():
        return float("nan")
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])


def hits(judged: Judged, certainty: np.ndarray, threshold: float) -> np.ndarray:
    """Which detections are right, bool [N]: from the most certain on, each takes the best free box of its class with
    IoU >= threshold; a second box on the same object is wrong, as in COCO's metrics."""
    right = np.zeros(len(certainty), bool)
    for index, table in enumerate(judged.overlaps):
        rows = np.flatnonzero(judged.image == index)
        free = table.copy()
        for place in np.argsort(-certainty[rows], kind="stable"):
            best = int(free[place].argmax()) if free.shape[1] else -1
            if best >= 0 and free[place, best] >= threshold:
                right[rows[place]] = True
                free[:, best] = -1.0
    return right


def most_certain(certainty: np.ndarray, count: int) -> np.ndarray:
    """The `count` most certain detections, bool [N]."""
    keep = np.zeros(len(certainty), bool)
    keep[np.argsort(-certainty, kind="stable")[:count]] = True
    return keep


def precision(judged: Judged, keep: np.ndarray, right: np.ndarray, seed: int = 0) -> Interval:
    """Share of the kept detections [N] that are right [N]; NaN where none is kept."""
    kept = np.bincount(judged.image[keep], minlength=len(judged.truth))  # [I]
    good = np.bincount(judged.image[keep & right], minlength=len(judged.truth))
    draws = [good[chosen].sum() / max(1, kept[chosen].sum()) for chosen in image_draws(len(kept), seed)]
    return _interval(float(good.sum() / kept.sum()) if kept.sum() else float("nan"), np.array(draws))


def class_recall(judged: Judged, least: float, threshold: float = 0.5) -> np.ndarray:
    """Share of each class's boxes that a detection with p >= least finds, [K]; NaN for a class without boxes."""
    right = hits(judged, judged.p, threshold) & (judged.p >= least)
    found = np.bincount(judged.label[right], minlength=judged.truth.shape[1])
    total = judged.truth.sum(axis=0)
    return np.where(total > 0, found / np.maximum(total, 1), np.nan)


def rows_by_image(image: np.ndarray, keep: np.ndarray, images: int) -> list[np.ndarray]:
    kept = np.flatnonzero(keep)
    return [kept[image[kept] == i] for i in range(images)]


def image_draws(images: int, seed: int) -> Iterable[np.ndarray]:
    rng = np.random.default_rng(seed)
    for _ in range(DRAWS):
        yield rng.integers(0, images, images)


def _interval(value: float, draws: np.ndarray) -> Interval:
    known = draws[np.isfinite(draws)]
    low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (np.nan, np.nan)
    return value, float(low), float(high)
