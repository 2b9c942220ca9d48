"""Do two programs find the same in the same images? The measure by which an exported model is let through.

Detections are compared box by box, not row by row: two scores that are equal may come in either order, and the rows of
an image then differ by hundreds of pixels although nothing has changed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ssod.deploy.contract import Outputs

# Pixels. Lower precision moves a box by less. One that is farther away is another candidate: of two that overlap and
# score alike NMS kept the other one. Of a trained RetinaNet in fp16 99.3 % were within 0.06, the others beyond 0.7.
FARTHEST = 0.5


@dataclass(frozen=True)
class Gate:
    """The most that may differ: a corner in pixels, a score, the share of detections without a partner."""

    box: float
    score: float
    unmatched: float


# Of int8 there is none: it is judged by its average precision.
GATES = {"fp32": Gate(0.01, 1e-4, 0.0), "fp16": Gate(0.5, 1e-2, 0.02)}


@dataclass(frozen=True)
class Difference:
    """What differs between two lists of detections.

    box        largest difference of a corner among partners, pixels; infinite where one side is not finite
    score      largest difference of their scores
    unmatched  detections of either side that have no partner on the other
    near_cut   more of them, with a score so close to what the other side still kept that either is right
    total      detections of both sides
    """

    box: float = 0.0
    score: float = 0.0
    unmatched: int = 0
    near_cut: int = 0
    total: int = 0

    @property
    def matched(self) -> int:
        """Detections of both sides that have a partner."""
        return self.total - self.unmatched - self.near_cut

    def merge(self, other: Difference) -> Difference:
        """The difference over both sets of images."""
        return Difference(
            max(self.box, other.box),
            max(self.score, other.score),
            self.unmatched + other.unmatched,
            self.near_cut + other.near_cut,
            self.total + other.total,
        )

    def passes(self, gate: Gate) -> bool:
        """Whether this is within the gate. Detections of which not one has a partner show nothing and do not pass."""
        return (
            self.box <= gate.box
            and self.score <= gate.score
            and self.unmatched <= gate.unmatched * self.total
            and (self.matched > 0 or self.total == 0)
        )

    def text(self) -> str:
        if self.total == 0:
            return "no detections on either side"
        text = f"boxes within {self.box:.2g} px, scores within {self.score:.1e}, "
        text += f"{self.unmatched} of {self.total} detections unmatched"
        return text + (f", {self.near_cut} more near the cut" if self.near_cut else "")


def compare(a: Outputs, b: Outputs, conf: float, tolerance: float) -> Difference:
    """The difference between two outputs for the same B images; a and b may change places.

    conf       the lowest score that both keep
    tolerance  how far from the cut (`conf`, or the last score of a full list) a score counts as near it
    """
    assert len(a.boxes) == len(b.boxes), "outputs of as many images"
    found = Difference()
    for i in range(len(a.boxes)):
        found = found.merge(_compare_image(_rows(a, i), _rows(b, i), conf, tolerance))
    return found


@dataclass(frozen=True)
class _Rows:
    """Detections of one image: boxes [N, 4], scores [N], labels [N]; full = there was no room for more."""

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    full: bool


def _rows(outputs: Outputs, image: int) -> _Rows:
    n = int(outputs.num_dets.reshape(-1)[image])
    boxes, scores = outputs.boxes[image, :n].astype(np.float64), outputs.scores[image, :n].astype(np.float64)
    return _Rows(boxes, scores, outputs.labels[image, :n], n == outputs.boxes.shape[1])


def _compare_image(a: _Rows, b: _Rows, conf: float, tolerance: float) -> Difference:
    total = len(a.scores) + len(b.scores)
    if not all(np.isfinite(values).all() for values in (a.boxes, a.scores, b.boxes, b.scores)):
        return Difference(math.inf, math.inf, total, 0, total)
    box = np.abs(a.boxes[:, None] - b.boxes[None]).max(-1, initial=0.0)  # [N, M]
    score = np.abs(a.scores[:, None] - b.scores[None])
    rows, columns = _partners(box, score, (a.labels[:, None] == b.labels[None]) & (box <= FARTHEST))

    alone_a = np.delete(a.scores, rows)
    alone_b = np.delete(b.scores, columns)
    near = int(
        (np.abs(alone_a - _cut(b, conf)) <= tolerance).sum() + (np.abs(alone_b - _cut(a, conf)) <= tolerance).sum()
    )
    return Difference(
        float(box[rows, columns].max(initial=0.0)),
        float(score[rows, columns].max(initial=0.0)),
        len(alone_a) + len(alone_b) - near,
        near,
        total,
    )


def _partners(box: np.ndarray, score: np.ndarray, allowed: np.ndarray) -> tuple[list[int], list[int]]:
    """Pair rows with columns of the [N, M] matrices one to one, closest boxes first, of those the closest scores.

    Greedy is enough, because partners are hundredths of a pixel apart and neighbours many pixels; a best assignment
    would need scipy, which is not where models run. The last two keys make the order the same from either side.
    """
    i, j = np.nonzero(allowed)
    order = np.lexsort((np.maximum(i, j), np.minimum(i, j), score[i, j], box[i, j]))
    rows: dict[int, int] = {}
    taken: set[int] = set()
    for row, column in zip(i[order].tolist(), j[order].tolist(), strict=True):
        if row not in rows and column not in taken:
            rows[row] = column
            taken.add(column)
    return list(rows), list(rows.values())


def _cut(rows: _Rows, conf: float) -> float:
    """The score below which this side keeps nothing."""
    return max(conf, float(rows.scores.min())) if rows.full and len(rows.scores) else conf
