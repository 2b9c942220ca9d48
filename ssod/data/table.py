"""Samples, and many of them as a few flat arrays.

N boxes of one image, I images, M boxes of all of them. Boxes are xyxy pixels of the upright image:
0 <= x1 < x2 <= width, 0 <= y1 < y2 <= height.

A Python object costs memory of its own, and a worker that only looks at it gets a copy of the page it lies on, since
its reference count is written. Arrays are shared with forked workers as they are, and with spawned ones through
shared memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np

if TYPE_CHECKING:
    import torch

from ssod.data.image import ImageError


@dataclass(frozen=True, eq=False)
class Sample:
    """One image and what is known about it; no pixels.

    path      the image file; of an image in a tar, the tar's path and the name in it
    image_id  int, unique in its split: the annotation file's id (COCO), else 1, 2, ... in the order of the names
    width     pixels, after EXIF rotation
    height    pixels, after EXIF rotation
    boxes     float32 [N, 4]  xyxy pixels
    labels    int64 [N]       0 .. K-1
    crowd     bool [N]        COCO iscrowd or VOC difficult: for evaluation to ignore, never a training target
    labeled   False where annotations are absent or must not be looked at (then N = 0)
    areas     float32 [N]     pixels, the area by which COCO sorts small, medium and large; None = the boxes' own
    place     (tar file, first byte, bytes) of an image in a tar; None for a file of its own
    complete  False where objects may be without annotation
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
    place: tuple[Path, int, int] | None = None
    complete: bool = True

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
    def unlabeled(
        path: Path, image_id: int, width: int, height: int, place: tuple[Path, int, int] | None = None
    ) -> Sample:
        """An image of which only the pixels may be used."""
        return Sample(path, image_id, width, height, *no_objects(), labeled=False, place=place)

    def stream(self) -> BytesIO | None:
        """The bytes of an image in a tar, to be decoded in place of a file; None for a file of its own.

        Raises ImageError where the tar does not hold them.
        """
        return None if self.place is None else read_place(self.path, *self.place)


def no_objects() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes [0, 4], labels [0] and crowd [0] of an image without objects."""
    return np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.bool_)


def read_place(path: Path, tar: Path, first: int, size: int) -> BytesIO:
    """The `size` bytes of an image from byte `first` of a tar on; raises ImageError, of `path`, where they are not."""
    try:
        with open(tar, "rb", buffering=0) as file:
            file.seek(first)
            data = file.read(size)
    except OSError as error:
        raise ImageError(path, f"{tar}: {error.strerror}") from error
    if len(data) < size:
        raise ImageError(path, f"{tar} ends within it")
    return BytesIO(data)


@dataclass(eq=False)
class Columns:
    """The arrays of a table. `ends` of texts and of boxes: where those of each image stop.

    paths      uint8 [...]      bytes of all paths, one after the other; ends in path_ends, int64 [I]
    ids        int64 [I]
    sizes      int32 [I, 2]     width, height
    box_ends   int64 [I]        of boxes float32 [M, 4], labels int64 [M], crowd bool [M], areas float32 [M]
    has_areas  bool [I]         False: Sample.areas is None
    labeled    bool [I]
    complete   bool [I]
    places     int64 [I, 3]     length of the part of the path that names the tar (0: a file of its own), first byte,
                                bytes
    """

    paths: np.ndarray
    path_ends: np.ndarray
    ids: np.ndarray
    sizes: np.ndarray
    box_ends: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    has_areas: np.ndarray
    labeled: np.ndarray
    complete: np.ndarray
    places: np.ndarray

    def __getstate__(self) -> dict[str, torch.Tensor]:
        import torch  # readers do without it; whoever sends a table to a worker has it

        # torch hands shared tensors to spawned processes without a copy. They are moved to shared memory once, for all
        # workers, and this process goes on with the same memory.
        if not hasattr(self, "_tensors"):
            arrays = {f.name: getattr(self, f.name) for f in fields(self)}
            self.__setstate__({name: torch.from_numpy(a).share_memory_() for name, a in arrays.items()})
        return self._tensors

    def __setstate__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self.__dict__.update({name: tensor.numpy() for name, tensor in tensors.items()})


class SampleTable(Sequence[Sample]):
    """A sequence of samples that are made when they are asked for. Parts of a table share its arrays.

    Given a slice it returns a table. It is not to be changed.
    """

    def __init__(self, columns: Columns, order: np.ndarray | None = None) -> None:
        self.columns = columns
        self.order = np.arange(len(columns.ids)) if order is None else order  # int64 [len(self)], rows of the columns

    @staticmethod
    def of(samples: Sequence[Sample]) -> SampleTable:
        """Samples as a table; a table as it is."""
        return samples if isinstance(samples, SampleTable) else SampleTable(_columns(samples))

    @staticmethod
    def join(parts: Sequence[Sequence[Sample]]) -> SampleTable:
        """Samples of several sequences, one after the other."""
        tables = [SampleTable.of(part) for part in parts]
        if len(tables) == 1:
            return tables[0]
        packed = [table._packed() for table in tables]
        out = {f.name: np.concatenate([getattr(c, f.name) for c in packed]) for f in fields(Columns)}
        for name, counted in (("path_ends", "paths"), ("box_ends", "boxes")):
            shifts = np.cumsum([0, *(len(getattr(c, counted)) for c in packed)])
            out[name] = np.concatenate([getattr(c, name) + s for c, s in zip(packed, shifts[:-1], strict=True)])
        return SampleTable(Columns(**out))

    def __len__(self) -> int:
        return len(self.order)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> SampleTable: ...
    def __getitem__(self, index: int | slice) -> Sample | SampleTable:
        if isinstance(index, slice):
            return SampleTable(self.columns, self.order[index])
        c, row = self.columns, int(self.order[index])
        path, place = self.file(index)
        first, last = (int(c.box_ends[row - 1]) if row else 0), int(c.box_ends[row])
        width, height = self.size(index)
        return Sample(
            path,
            int(c.ids[row]),
            width,
            height,
            c.boxes[first:last],
            c.labels[first:last],
            c.crowd[first:last],
            bool(c.labeled[row]),
            c.areas[first:last] if c.has_areas[row] else None,
            place,
            bool(c.complete[row]),
        )

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def file(self, index: int) -> tuple[Path, tuple[Path, int, int] | None]:
        """`path` and `place` of a sample."""
        c, row = self.columns, int(self.order[index])
        text = c.paths[int(c.path_ends[row - 1]) if row else 0 : int(c.path_ends[row])].tobytes()
        tar, first, size = c.places[row].tolist()
        return Path(os.fsdecode(text)), (Path(os.fsdecode(text[:tar])), first, size) if tar else None

    def size(self, index: int) -> tuple[int, int]:
        """(width, height) of a sample."""
        width, height = self.columns.sizes[self.order[index]].tolist()
        return width, height

    def select(self, indices: Sequence[int] | np.ndarray) -> SampleTable:
        """The samples at these positions, in this order."""
        return SampleTable(self.columns, self.order[np.asarray(indices, np.int64)])

    def without_labels(self) -> SampleTable:
        """The same images as unlabelled samples; the arrays of this table hold no box that could be looked at."""
        c, rows, (paths, path_ends) = self.columns, self.order, self._paths()
        return unlabeled_table(paths, path_ends, c.ids[rows], c.sizes[rows], c.places[rows], c.complete[rows])

    def as_partial(self) -> SampleTable:
        """The same samples, none of them complete."""
        columns = replace(self.columns, complete=np.zeros_like(self.columns.complete))
        return SampleTable(columns, self.order)

    def renumbered(self) -> SampleTable:
        """The same samples with the image ids 1, 2, ..."""
        packed = self._packed()
        packed.ids = np.arange(1, len(self) + 1)
        return SampleTable(packed)

    @property
    def ids(self) -> np.ndarray:
        """Image ids, int64 [I]."""
        return self.columns.ids[self.order]

    @property
    def sizes(self) -> np.ndarray:
        """(width, height), int32 [I, 2]."""
        return self.columns.sizes[self.order]

    @property
    def labeled(self) -> np.ndarray:
        """Whether each sample is labelled, bool [I]."""
        return self.columns.labeled[self.order]

    @property
    def complete(self) -> np.ndarray:
        """Whether all objects of each sample are annotated, bool [I]."""
        return self.columns.complete[self.order]

    def objects(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of all boxes of all samples: position of the sample, label, crowd; int64 [M], int64 [M], bool [M]."""
        counts, rows = self._boxes()
        return np.repeat(np.arange(len(self)), counts), self.columns.labels[rows], self.columns.crowd[rows]

    def names(self) -> list[str]:
        """The last part of each sample's path."""
        text, ends = self._paths()
        stops, blob = ends.tolist(), text.tobytes()
        return [
            os.fsdecode(blob[a:b].rsplit(b"/", 1)[-1] if os.sep == "/" else os.path.basename(blob[a:b]))
            for a, b in pairwise([0, *stops])
        ]

    def _boxes(self) -> tuple[np.ndarray, np.ndarray]:
        """How many boxes each sample has [I], and the rows of these boxes [M]."""
        return _ranges(self.columns.box_ends, self.order)

    def _paths(self) -> tuple[np.ndarray, np.ndarray]:
        lengths, places = _ranges(self.columns.path_ends, self.order)
        return self.columns.paths[places], np.cumsum(lengths)

    def _packed(self) -> Columns:
        """Columns that hold these samples and no others, in this order."""
        c, rows = self.columns, self.order
        paths, path_ends = self._paths()
        counts, boxes = self._boxes()
        return Columns(
            paths,
            path_ends,
            c.ids[rows],
            c.sizes[rows],
            np.cumsum(counts),
            c.boxes[boxes],
            c.labels[boxes],
            c.crowd[boxes],
            c.areas[boxes],
            has_areas=c.has_areas[rows],
            labeled=c.labeled[rows],
            complete=c.complete[rows],
            places=c.places[rows],
        )


def _ranges(ends: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(length of each row's range, all indices of these ranges one after the other)."""
    starts = np.concatenate([[0], ends[:-1]])[rows] if len(ends) else ends
    lengths = ends[rows] - starts
    before = np.cumsum(lengths) - lengths
    return lengths, np.repeat(starts - before, lengths) + np.arange(lengths.sum())


def path_columns(paths: Iterable[str | Path]) -> tuple[np.ndarray, np.ndarray]:
    """`paths` and `path_ends` of Columns."""
    encoded = [os.fsencode(path) for path in paths]
    return np.frombuffer(bytearray(b"".join(encoded)), np.uint8), np.cumsum([len(e) for e in encoded], dtype=np.int64)


def unlabeled_table(
    paths: np.ndarray,
    path_ends: np.ndarray,
    ids: np.ndarray,
    sizes: np.ndarray,
    places: np.ndarray | None = None,
    complete: np.ndarray | None = None,
) -> SampleTable:
    """A table of images without labels; the arguments are those of Columns."""
    n, (boxes, labels, crowd) = len(ids), no_objects()
    return SampleTable(
        Columns(
            paths,
            path_ends,
            ids,
            sizes.astype(np.int32),
            box_ends=np.zeros(n, np.int64),
            boxes=boxes,
            labels=labels,
            crowd=crowd,
            areas=np.zeros(0, np.float32),
            has_areas=np.zeros(n, np.bool_),
            labeled=np.zeros(n, np.bool_),
            complete=np.ones(n, np.bool_) if complete is None else complete,
            places=np.zeros((n, 3), np.int64) if places is None else places,
        )
    )


def _columns(samples: Sequence[Sample]) -> Columns:
    paths, path_ends = path_columns(s.path for s in samples)
    boxes, labels, crowd = no_objects()
    no_areas = np.zeros(0, np.float32)
    return Columns(
        paths,
        path_ends,
        np.array([s.image_id for s in samples], np.int64),
        np.array([(s.width, s.height) for s in samples], np.int32).reshape(-1, 2),
        np.cumsum([len(s.boxes) for s in samples], dtype=np.int64),
        np.concatenate([boxes, *(s.boxes for s in samples)]),
        np.concatenate([labels, *(s.labels for s in samples)]),
        np.concatenate([crowd, *(s.crowd for s in samples)]),
        np.concatenate([no_areas, *map(_area, samples)]),
        np.array([s.areas is not None for s in samples], np.bool_),
        np.array([s.labeled for s in samples], np.bool_),
        np.array([s.complete for s in samples], np.bool_),
        np.array(
            [(len(os.fsencode(s.place[0])), *s.place[1:]) if s.place else (0, 0, 0) for s in samples], np.int64
        ).reshape(-1, 3),
    )


def _area(sample: Sample) -> np.ndarray:
    """One number a box, whether or not it is used."""
    return np.zeros(len(sample.boxes), np.float32) if sample.areas is None else sample.areas
