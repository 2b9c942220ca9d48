"""Decoded images for the loaders: read once, shrunk once, kept if asked."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np

from ssod.data.cache import FrameCache, original_size
from ssod.data.image import ImageError, read_image
from ssod.data.table import Sample, SampleTable, read_place
from ssod.data.views.geometry import from_hwc, resize
from ssod.data.views.operations import Frame


def read_frame(path: Path, stream: BytesIO | None = None) -> Frame:
    """A decoded image before any operation, from the bytes in `stream` where it is no file. Raises ImageError."""
    writable = np.require(read_image(path, stream=stream), requirements="W")  # a decoder's own buffer may be read-only
    return Frame(from_hwc(writable), np.eye(3))


class Reader:
    """Item i is the Frame of the i-th image, shrunk to a long side of at most `limit` pixels.

    The shrinking happens with and without a cache, so a cache changes no pixel. Only paths and sizes of the
    samples are kept, never their boxes: whoever reads unlabelled images through this cannot see a label.
    Items raise ImageError for an image that cannot be read, and for a labelled one that is not of the size which its
    boxes were read for: they would lie elsewhere.
    """

    def __init__(self, samples: Sequence[Sample], limit: int, cache: FrameCache | None = None) -> None:
        table = SampleTable.of(samples)
        self.images, self.labeled = table.without_labels(), table.labeled
        self.limit, self.cache = limit, cache

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Frame:
        frame = self.cache.get(index) if self.cache else None
        cached = frame is not None
        if frame is None:
            path, place = self.images.file(index)
            frame = read_frame(path, read_place(path, *place) if place else None)
        if self.labeled[index]:
            self._check_size(index, frame)
        if max(frame.image.shape[1:]) > self.limit:
            frame = frame.moved(*resize(frame.image, self.limit))
        if self.cache and not cached:
            self.cache.put(index, frame)
        return frame

    def _check_size(self, index: int, frame: Frame) -> None:
        told, true = self.images.size(index), original_size(frame)
        if told != true:
            reason = f"annotated as {told[0]}x{told[1]}, but upright it is {true[0]}x{true[1]}; left out"
            raise ImageError(self.images.file(index)[0], reason)
