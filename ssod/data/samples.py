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
from ssod.data.table import Sample, SampleTable, no_objects
from ssod.errors import UserError

__all__ = ["Dataset", "Inspector", "Problem", "Sample", "SampleTable", "class_counts", "count_problems", "no_objects"]

TRUST_ABOVE = 20_000  # images; up to here every header is read even where the annotations tell the size


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
SHARD_DAMAGED = "tar damaged, the rest of it left out"


@dataclass
class Dataset:
    """One split. samples: sorted, so that the order is the same everywhere; names: class of label 0, 1, ..."""

    samples: SampleTable
    names: list[str]
    problems: list[Problem]
    format: str
    root: Path
    split: str

    def __len__(self) -> int:
        return len(self.samples)

    def summary(self) -> str:
        """One line for the log: how many images, boxes and problems."""
        boxes = len(self.samples.objects()[0])
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
    _, labels, crowd = SampleTable.of(samples).objects()
    return np.bincount(labels[~crowd], minlength=num_classes)


@dataclass
class Inspector:
    """Judges what the readers find. With `strict`, the first problem is an error instead of an entry in the list.

    headers: read the header of every image, however many there are.
    """

    strict: bool = False
    headers: bool = False
    problems: list[Problem] = field(default_factory=list)

    def report(self, kind: str, path: str | os.PathLike[str], record: str, reason: str) -> None:
        problem = Problem(kind, os.fspath(path), record, reason)
        if self.strict and kind != NO_LABEL_FILE:
            raise UserError(f"{problem} ({kind}); mend it, or leave out strict=True to go on without it.")
        self.problems.append(problem)

    def trusts(self, images: int) -> bool:
        """Whether the sizes that annotations tell of so many images are taken as they are."""
        return images > TRUST_ABOVE and not (self.strict or self.headers)

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
        self,
        boxes: Sequence[Sequence[float]] | np.ndarray,
        size: tuple[int, int] | np.ndarray,
        path: str | os.PathLike[str],
        records: Sequence[str],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Clip N boxes (xyxy pixels) to the image; drop those that are not finite, of no area, or wholly outside.

        `size` is (width, height) of the image, or [N, 2] of each box's own. `records` says for each box where it
        stands in the file `path`, for the report. An overhang of at most one pixel is rounding and clipped without a
        word. Returns float32 [M, 4] and the indices int64 [M] of those kept.
        """
        raw = np.array(boxes, np.float64).reshape(-1, 4)
        assert len(raw) == len(records)
        limits = np.tile(np.broadcast_to(np.asarray(size), (len(raw), 2)), 2)  # [N, 4]
        # As float32 at once: two sides that differ in float64 may coincide afterwards.
        clipped = np.clip(raw, 0, limits).astype(np.float32)
        finite = np.abs(raw).max(axis=1, initial=0) < np.inf  # false for NaN, too
        ordered = (raw[:, 2] > raw[:, 0]) & (raw[:, 3] > raw[:, 1])
        remains = (clipped[:, 2] > clipped[:, 0]) & (clipped[:, 3] > clipped[:, 1])
        keep = finite & ordered & remains
        overhang = np.abs(raw - clipped).max(axis=1, initial=0) > 1
        for i in np.flatnonzero(~keep | overhang).tolist():
            box = "[" + ", ".join(f"{v:g}" for v in raw[i]) + "]"
            frame = f"{limits[i, 0]}x{limits[i, 1]}"
            if keep[i]:
                self.report(BOX_CLIPPED, path, records[i], f"{box} reaches outside of the {frame} image")
            else:
                why = "is not finite" if not finite[i] else "has no area" if not ordered[i] else "lies outside"
                self.report(BOX_DROPPED, path, records[i], f"{box} {why} (xyxy, image {frame})")
        return clipped[keep], np.flatnonzero(keep)
