"""What a model found on the validation images, held against what is annotated there: which detections are right, curves
over the confidence, the confusion matrix, and the mistakes worth looking at.

Letters: I images, N annotated boxes, M detections, K classes. Boxes are xyxy pixels of the source image.
A detection is right when it overlaps a true box of its class with an IoU of at least 0.5 that no surer one has taken.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from ssod.files import replacing
from ssod.report.sound import Seen, flaw

FILE = "val_detections.json"  # in the run folder
IOU = 0.5
GRID = np.arange(0, 1.0001, 0.01)  # confidences and recalls of the curves


@dataclass
class Findings:
    """Detections and annotations of the same images.

    about   {"step", "network", ...}: of which model, free for the writer
    images  I entries {"file_name", "width", "height"}
    names   K classes
    truth   float64 [N, 7]  image index, x1, y1, x2, y2, class, crowd (0 or 1)
    found   float64 [M, 7]  image index, x1, y1, x2, y2, class, score
    """

    about: dict[str, Any]
    images: list[dict[str, Any]]
    names: list[str]
    truth: np.ndarray
    found: np.ndarray

    def save(self, path: Path) -> None:
        content = {
            "about": self.about,
            "columns": {"truth": "image x1 y1 x2 y2 class crowd", "found": "image x1 y1 x2 y2 class score"},
            "names": self.names,
            "images": self.images,
            "truth": _plain(self.truth, 1),
            "found": _plain(self.found, 4),
        }
        with replacing(path) as file:
            file.write(json.dumps(content, separators=(",", ":")).encode())

    @classmethod
    def load(cls, path: Path) -> Findings | None:
        """What `save` wrote; None where there is nothing, or nothing whole."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if flaw(Seen, content) is not None:
                return None
            found = cls(*(content[k] for k in ("about", "images", "names")), *(_table(content, k) for k in TABLES))
        except (OSError, ValueError, RecursionError):
            return None
        return found if all(_inside(found, table) for table in (found.truth, found.found)) else None


TABLES = ("truth", "found")


def _table(content: dict[str, Any], key: str) -> np.ndarray:
    return np.asarray(content[key], np.float64).reshape(-1, 7)


def _inside(found: Findings, table: np.ndarray) -> bool:
    """Whether its images and classes are among those there are."""
    index, label = table[:, 0], table[:, 5]
    return bool(((index >= 0) & (index < len(found.images)) & (label >= 0) & (label < len(found.names))).all())


def _plain(table: np.ndarray, digits: int) -> list[list[float]]:
    """Rows with whole numbers as such, boxes to a tenth of a pixel."""
    return [[int(r[0]), *(round(v, 1) for v in r[1:5]), int(r[5]), round(r[6], digits)] for r in table.tolist()]


@dataclass
class Matches:
    """right: bool [M]; crowd: bool [M], wrong but on a crowd, so that it does not count; owner: int [N], the
    detection that found a true box, -1 for none."""

    right: np.ndarray
    crowd: np.ndarray
    owner: np.ndarray


def iou(a: np.ndarray, b: np.ndarray, crowd: np.ndarray | None = None) -> np.ndarray:
    """[A, 4] and [B, 4] -> [A, B]. Where crowd[b], the share of `a` that lies within b instead, as COCO has it."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(-1)
    of_a, of_b = ((x[:, 2:] - x[:, :2]).prod(-1) for x in (a, b))
    union = of_a[:, None] + of_b[None] - shared
    if crowd is not None:
        union = np.where(crowd[None], of_a[:, None], union)
    return shared / np.maximum(union, 1e-9)


def by_image(table: np.ndarray, images: int) -> list[np.ndarray]:
    """Row numbers of each image."""
    order = np.argsort(table[:, 0], kind="stable")
    return np.split(order, np.searchsorted(table[order, 0], np.arange(1, images)))


def match(findings: Findings) -> Matches:
    """Give true boxes to detections, the surest first."""
    truth, found = findings.truth, findings.found
    out = Matches(np.zeros(len(found), bool), np.zeros(len(found), bool), np.full(len(truth), -1))
    count = len(findings.images)
    for own_truth, own_found in zip(by_image(truth, count), by_image(found, count), strict=True):
        if not len(own_found) or not len(own_truth):
            continue
        own_found = own_found[np.argsort(-found[own_found, 6], kind="stable")]
        crowd = truth[own_truth, 6] > 0
        overlap = iou(found[own_found, 1:5], truth[own_truth, 1:5], crowd)
        overlap[found[own_found, 5][:, None] != truth[own_truth, 5][None]] = 0
        for row, detection in enumerate(own_found.tolist()):
            free = np.where(crowd | (out.owner[own_truth] >= 0), 0, overlap[row])
            best = int(free.argmax())
            if free[best] >= IOU:
                out.right[detection], out.owner[own_truth[best]] = True, detection
            else:
                out.crowd[detection] = bool((overlap[row][crowd] >= IOU).any())
    return out


@dataclass
class Curves:
    """precision: [K, 101] over recall GRID; f1: [K, 101] over confidence GRID, NaN rows for classes never annotated.

    best    the confidence with the highest mean F1; table: a row a class {"name", "boxes", "conf", "f1", "precision",
            "recall"}, at its own best confidence
    """

    precision: np.ndarray
    f1: np.ndarray
    best: float
    table: list[dict[str, Any]]


def curves(findings: Findings, matches: Matches) -> Curves:
    k = len(findings.names)
    precision, f1 = np.full((k, len(GRID)), np.nan), np.full((k, len(GRID)), np.nan)
    table = []
    counted = ~matches.crowd
    for label, name in enumerate(findings.names):
        true = int(((findings.truth[:, 5] == label) & (findings.truth[:, 6] == 0)).sum())
        rows = np.flatnonzero((findings.found[:, 5] == label) & counted)
        rows = rows[np.argsort(-findings.found[rows, 6], kind="stable")]
        entry: dict[str, Any] = {"name": name, "boxes": true, "conf": None, "f1": None}
        if true:
            right = np.cumsum(matches.right[rows])  # among the n surest
            n = np.arange(1, len(rows) + 1)
            recall, exact = right / true, right / n
            falling = np.maximum.accumulate(exact[::-1])[::-1]  # the best precision at this recall or more
            at = np.searchsorted(recall, GRID)
            precision[label] = np.append(falling, 0.0)[at]
            kept = np.searchsorted(-findings.found[rows, 6], -GRID, side="right")  # detections at or above each conf
            hits = np.append(0, right)[kept]
            f1[label] = 2 * hits / (kept + true)
            best = int(f1[label].argmax())
            entry |= {"conf": float(GRID[best]), "f1": float(f1[label, best]), "recall": hits[best] / true}
            entry["precision"] = hits[best] / kept[best] if kept[best] else None
        table.append(entry)
    annotated = ~np.isnan(f1[:, 0])
    best_conf = float(GRID[f1[annotated].mean(0).argmax()]) if annotated.any() else 0.5
    return Curves(precision, f1, best_conf, table)


def confusion(findings: Findings, conf: float) -> np.ndarray:
    """Counts int [K + 1, K + 1]: annotated class (row) against found class (column) among detections from `conf` on;
    the last row is found where nothing is annotated, the last column annotated but not found.

    A detection goes with a box of its own class where it can, else with the one it overlaps most (IoU >= 0.5). Crowds
    are neither missed nor found.
    """
    k = len(findings.names)
    out = np.zeros((k + 1, k + 1), int)
    found = findings.found[findings.found[:, 6] >= conf]
    count = len(findings.images)
    for own_truth, own_found in zip(by_image(findings.truth, count), by_image(found, count), strict=True):
        true, seen = findings.truth[own_truth], found[own_found]
        crowd = true[:, 6] > 0
        overlap = iou(seen[:, 1:5], true[:, 1:5], crowd)
        same = seen[:, 5][:, None] == true[:, 5][None]
        rows, columns = np.nonzero((overlap >= IOU) & ~crowd)
        order = np.lexsort((-overlap[rows, columns], ~same[rows, columns]))
        of_seen, of_true = np.full(len(seen), -1), np.full(len(true), -1)
        for row, column in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
            if of_seen[row] < 0 and of_true[column] < 0:
                of_seen[row], of_true[column] = column, row
                out[int(true[column, 5]), int(seen[row, 5])] += 1
        on_crowd = ((overlap >= IOU) & crowd & same).any(1)
        np.add.at(out[k], seen[(of_seen < 0) & ~on_crowd, 5].astype(int), 1)
        np.add.at(out[:, k], true[(of_true < 0) & ~crowd, 5].astype(int), 1)
    return out


@dataclass(frozen=True)
class Mistake:
    """image: index; box: xyxy pixels; label: class of the box; score: of a detection, None of a missed box; why: in
    words."""

    image: int
    box: tuple[float, float, float, float]
    label: int
    score: float | None
    why: str


def worst_false_positives(findings: Findings, matches: Matches, most: int) -> list[Mistake]:
    """The surest detections that are wrong, each class in turn, at most two of an image, and what is wrong."""
    wrong = np.flatnonzero(~matches.right & ~matches.crowd)
    wrong = wrong[np.argsort(-findings.found[wrong, 6], kind="stable")]
    rows = [r for r in wrong.tolist() if not _on_crowd(findings, r)]
    return [
        Mistake(int(d[0]), _box(d), int(d[5]), float(d[6]), _why_wrong(findings, matches, row))
        for row in _spread(rows, findings.found, most)
        for d in [findings.found[row]]
    ]


def worst_false_negatives(findings: Findings, matches: Matches, conf: float, most: int) -> list[Mistake]:
    """Annotated boxes that no detection from `conf` on has found, each class in turn: those the model knew least of
    first, and of them the largest; at most two of an image."""
    truth, found = findings.truth, findings.found
    owner = matches.owner
    score = np.where(owner >= 0, found[owner, 6] if len(found) else 0.0, 0.0)
    missed = np.flatnonzero(((owner < 0) | (score < conf)) & (truth[:, 6] == 0))
    area = (truth[:, 3] - truth[:, 1]) * (truth[:, 4] - truth[:, 2])
    missed = missed[np.lexsort((-area[missed], score[missed]))]
    return [
        Mistake(int(t[0]), _box(t), int(t[5]), None, _why_missed(findings, row, float(score[row]), conf))
        for row in _spread(missed.tolist(), truth, most)
        for t in [truth[row]]
    ]


def _spread(rows: Sequence[int], table: np.ndarray, most: int) -> list[int]:
    """The first rows of each class in turn, no more than two of an image: one frequent class must not fill the page."""
    seen: Counter[int] = Counter()
    waiting: dict[int, list[int]] = {}
    for row in rows:
        waiting.setdefault(int(table[row, 5]), []).append(row)
    out: list[int] = []
    for row in (r for turn in zip_longest(*waiting.values()) for r in turn if r is not None):
        image = int(table[row, 0])
        seen[image] += 1
        if seen[image] <= 2 and len(out) < most:
            out.append(row)
    return out


def _box(row: np.ndarray) -> tuple[float, float, float, float]:
    return float(row[1]), float(row[2]), float(row[3]), float(row[4])


def _neighbours(table: np.ndarray, own: np.ndarray) -> np.ndarray:
    return table[table[:, 0] == own[0]]


def _on_crowd(findings: Findings, row: int) -> bool:
    """A detection on a crowd of any class is no mistake to show."""
    own = findings.found[row]
    true = _neighbours(findings.truth, own)
    crowds = true[true[:, 6] > 0]
    return bool((iou(own[None, 1:5], crowds[:, 1:5], np.ones(len(crowds), bool)) >= IOU).any())


def _why_wrong(findings: Findings, matches: Matches, row: int) -> str:
    own = findings.found[row]
    true = _neighbours(findings.truth, own)
    overlap = iou(own[None, 1:5], true[:, 1:5])[0] if len(true) else np.zeros(0)
    same = true[:, 5] == own[5] if len(true) else np.zeros(0, bool)
    if (overlap[same] >= IOU).any():
        return "found twice"
    if (overlap[~same] >= IOU).any():
        other = true[~same][overlap[~same].argmax()]
        return f"it is a {findings.names[int(other[5])]}"
    if overlap[same].max(initial=0) >= 0.1:
        return f"badly placed: IoU {overlap[same].max():.2f}"
    return "nothing is annotated here"


def _why_missed(findings: Findings, row: int, score: float, conf: float) -> str:
    own = findings.truth[row]
    if score > 0:
        return f"seen with {score:.2f}, below {conf:.2f}"
    seen = _neighbours(findings.found, own)
    overlap = iou(own[None, 1:5], seen[:, 1:5])[0] if len(seen) else np.zeros(0)
    same = seen[:, 5] == own[5] if len(seen) else np.zeros(0, bool)
    others = seen[~same & (overlap >= IOU)] if len(seen) else seen
    if len(others):
        other = others[others[:, 6].argmax()]
        return f"taken for a {findings.names[int(other[5])]} ({other[6]:.2f})"
    if overlap[same].max(initial=0) >= IOU:
        return "what was found here went to a neighbour"
    if overlap[same].max(initial=0) >= 0.1:
        return f"badly placed: IoU {overlap[same].max():.2f}"
    return "not seen at all"
