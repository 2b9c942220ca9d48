"""What every reader produces: samples, and an honest list of what was wrong with the files.

N boxes of one image. Boxes are xyxy pixels of the upright image: 0 <= x1 < x2 <= width, 0 <= y1 < y2 <= height.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ssod.data.image import ImageError, image_size
from ssod.errors import UserError


@dataclass(frozen=True, eq=False)
class Sample:
    """One image and what is known about it; no pixels.

    path      the image file
    image_id  int, unique in its split: the annotation file's id (COCO), else 1, 2, ... in the order of the names
    width     pixels, after EXIF rotation
    height    pixels, after EXIF rotation
    boxes     float32 [N, 4]  xyxy pixels
    labels    int64 [N]       0 .. K-1
    crowd     bool [N]        COCO iscrowd or VOC difficult: for evaluation to ignore, never a training target
    labeled   False where annotations are absent or must not be looked at (then N = 0)
    areas     float32 [N]     pixels, the area by which COCO sorts small, medium and large; None = the boxes' own
    """

    path: Path
    image_id: int
    width: int
    height: int
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    labeled: bool
    areas: np.ndarray | None = None

    def __post_init__(self) -> None:
        n = len(self.boxes)
        for name, shape, dtype in (
            ("boxes", (n, 4), np.float32),
            ("labels", (n,), np.int64),
            ("crowd", (n,), np.bool_),
        ):
            array = getattr(self, name)
            assert (array.shape, array.dtype) == (shape, dtype), f"{name} is {array.dtype} {array.shape}"
        assert self.labeled or n == 0, f"{self.path} is unlabelled but has {n} boxes"

    @staticmethod
    def unlabeled(path: Path, image_id: int, width: int, height: int) -> Sample:
        """An image of which only the pixels may be used."""
        return Sample(path, image_id, width, height, *no_objects(), labeled=False)


def no_objects() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes [0, 4], labels [0] and crowd [0] of an image without objects."""
    return np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.bool_)


@dataclass(frozen=True)
class Problem:
    """One flaw of the data: what kind, in which file, at which record of it, and why."""

    kind: str
    path: str
    record: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}{', ' + self.record if self.record else ''}: {self.reason}"


# Kinds of Problem. The first is a remark and legitimate; any other makes `strict=True` fail.
NO_LABEL_FILE = "image without a label file, taken as background"
BOX_CLIPPED = "box reaching outside, clipped"
BOX_DROPPED = "box dropped"
IMAGE_MISSING = "image missing"
IMAGE_UNREADABLE = "image unreadable"
IMAGE_TWICE = "image listed twice"
SIZE_DIFFERS = "image size differs from the annotation's"
ANNOTATION_MISSING = "annotation file missing, image left out"
ANNOTATION_ORPHAN = "annotation without its image"
ANNOTATION_ID = "annotation id duplicate or 0, renumbered"


@dataclass
class Dataset:
    """One split. samples: sorted, so that the order is the same everywhere; names: class of label 0, 1, ..."""

    samples: list[Sample]
    names: list[str]
    problems: list[Problem]
    format: str
    root: Path
    split: str

    def __len__(self) -> int:
        return len(self.samples)

    def summary(self) -> str:
        """One line for the log: how many images, boxes and problems."""
        boxes = sum(len(s.boxes) for s in self.samples)
        what = f"{boxes} boxes of {len(self.names)} classes" if self.samples[0].labeled else "no labels used"
        line = f"{self.split}: {len(self)} images, {what} ({self.format}, {self.root})"
        counts = count_problems(self.problems)
        return line + "".join(f"; {n} x {kind}" for kind, n in counts.items())


def count_problems(problems: Sequence[Problem]) -> dict[str, int]:
    """{kind: how often}, most frequent first, ties by name."""
    counts = Counter(p.kind for p in problems)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def class_counts(samples: Sequence[Sample], num_classes: int) -> np.ndarray:
    """Boxes per class, int64 [K]; crowd boxes are not counted, for nothing is learnt from them."""
    labels = [s.labels[~s.crowd] for s in samples]
    return np.bincount(np.concatenate([np.zeros(0, np.int64), *labels]), minlength=num_classes)


@dataclass
class Inspector:
    """Judges what the readers find. With `strict`, the first problem is an error instead of an entry in the list."""

    strict: bool = False
    problems: list[Problem] = field(default_factory=list)

    def report(self, kind: str, path: str | os.PathLike[str], record: str, reason: str) -> None:
        problem = Problem(kind, os.fspath(path), record, reason)
        if self.strict and kind != NO_LABEL_FILE:
            raise UserError(f"{problem} ({kind}); mend it, or leave out strict=True to go on without it.")
        self.problems.append(problem)

    def size(self, path: Path) -> tuple[int, int] | None:
        """Upright (width, height) of an image, or None after reporting why it cannot be used."""
        try:
            return image_size(path)
        except ImageError as error:
            kind = IMAGE_UNREADABLE if os.path.exists(path) else IMAGE_MISSING
            self.report(kind, path, "", error.reason)
            return None

    def compare_size(self, path: Path, actual: tuple[int, int], declared: tuple[int, int], record: str) -> None:
        """Report an image whose annotation was made for another (width, height)."""
        if actual == declared:
            return
        told, true = (f"{w}x{h}" for w, h in (declared, actual))
        self.report(
            SIZE_DIFFERS, path, record, f"annotated as {told}, but upright it is {true}; boxes are read in that"
        )

    def clean(
        self, boxes: Sequence[Sequence[float]], size: tuple[int, int], path: str | os.PathLike[str], records: list[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Clip N boxes (xyxy pixels) to the image; drop those that are not finite, of no area, or wholly outside.

        `records` says for each box where it stands in the file `path`, for the report. An overhang of at most one
        pixel is rounding and clipped without a word. Returns float32 [M, 4] and the indices int64 [M] of those kept.
        """
        raw = np.array(boxes, np.float64).reshape(-1, 4)
        assert len(raw) == len(records)
        width, height = size
        # As float32 at once: two sides that differ in float64 may coincide afterwards.
        clipped = np.clip(raw, 0, np.array([width, height, width, height])).astype(np.float32)
        finite = np.abs(raw).max(axis=1, initial=0) < np.inf  # false for NaN, too
        ordered = (raw[:, 2] > raw[:, 0]) & (raw[:, 3] > raw[:, 1])
        remains = (clipped[:, 2] > clipped[:, 0]) & (clipped[:, 3] > clipped[:, 1])
        keep = finite & ordered & remains
        overhang = np.abs(raw - clipped).max(axis=1, initial=0) > 1
        for i in np.flatnonzero(~keep | overhang):
            box = "[" + ", ".join(f"{v:g}" for v in raw[i]) + "]"
            if keep[i]:
                self.report(BOX_CLIPPED, path, records[i], f"{box} reaches outside of the {width}x{height} image")
            else:
                why = "is not finite" if not finite[i] else "has no area" if not ordered[i] else "lies outside"
                self.report(BOX_DROPPED, path, records[i], f"{box} {why} (xyxy, image {width}x{height})")
        return clipped[keep], np.flatnonzero(keep)
