"""Decoded images for the loaders: read once, shrunk once, kept in memory if asked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ssod.data.geometry import fitted, from_hwc, resize
from ssod.data.image import read_image
from ssod.data.operations import Frame
from ssod.data.samples import Sample
from ssod.errors import UserError


def read_frame(path: Path) -> Frame:
    """A decoded image before any operation. Raises ImageError."""
    writable = np.require(read_image(path), requirements="W")  # a decoder's own buffer may be read-only
    return Frame(from_hwc(writable), np.eye(3))


class Reader:
    """Item i is the Frame of the i-th image, shrunk to a long side of at most `limit` pixels.

    The shrinking happens with and without a cache, so a cache changes no pixel. Only paths and sizes of the
    samples are kept, never their boxes: whoever reads unlabelled images through this cannot see a label.
    Items raise ImageError for an image that cannot be read.
    """

    def __init__(self, samples: Sequence[Sample], limit: int, cache: ImageCache | None = None) -> None:
        self.paths: list[Path] = [sample.path for sample in samples]
        self.limit, self.cache = limit, cache

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Frame:
        cached = self.cache.get(index) if self.cache else None
        if cached is not None:
            return cached
        frame = read_frame(self.paths[index])
        if max(frame.image.shape[1:]) > self.limit:
            frame = frame.moved(*resize(frame.image, self.limit))
        if self.cache:
            self.cache.put(index, frame)
        return frame


class ImageCache:
    """Shrunk images in one block of shared memory, filled by whichever worker meets an image first.

    Takes 3 bytes per pixel after shrinking, for example 0.9 MB per image of 640 x 480; the whole block is
    reserved at the start and every rank of a machine has its own. An image whose decoded size is not the
    announced one is not kept.
    """

    def __init__(self, samples: Sequence[Sample], limit: int) -> None:
        self.shapes = [
            (s.height, s.width) if max(s.height, s.width) <= limit else fitted(s.height, s.width, limit)
            for s in samples
        ]
        self.scales = [(w / s.width, h / s.height) for s, (h, w) in zip(samples, self.shapes, strict=True)]
        self.starts = np.concatenate(([0], np.cumsum([3 * h * w for h, w in self.shapes])))
        need, free = int(self.starts[-1]), _free_shared_memory()
        if need > 0.8 * free:
            raise UserError(
                f"cache=True would keep {len(samples)} images in {need / 2**30:.1f} GiB of shared memory, of which "
                f"{free / 2**30:.1f} GiB are free; set cache=False or a smaller imgsz."
            )
        self.block = torch.empty(need, dtype=torch.uint8).share_memory_()
        self.filled = torch.zeros(len(samples), dtype=torch.uint8).share_memory_()

    def get(self, index: int) -> Frame | None:
        if not self.filled[index]:
            return None
        return Frame(self._slot(index), np.diag([*self.scales[index], 1.0]))

    def put(self, index: int, frame: Frame) -> None:
        if frame.image.shape[1:] == torch.Size(self.shapes[index]):
            # Two workers may do this at once: both write the same bytes, and the flag comes last.
            self._slot(index).copy_(frame.image)
            self.filled[index] = 1

    def _slot(self, index: int) -> torch.Tensor:
        h, w = self.shapes[index]
        return self.block[self.starts[index] : self.starts[index + 1]].view(h, w, 3).permute(2, 0, 1)


def _free_shared_memory() -> int:
    """Bytes that fit both in shared memory and in RAM; containers often have little of the former."""
    ram = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 2**62
    shared = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 2**62
    return min(ram, shared)
