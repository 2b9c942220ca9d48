"""Decoded, shrunk images kept between epochs: in shared memory, or on disk where other runs find them, too.

Both are filled by whichever worker meets an image first, and shared by all workers. I images.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import time
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from ssod.data.store import cache_folder, identity, sweep, write_whole
from ssod.data.table import SampleTable
from ssod.data.views.geometry import from_hwc, to_hwc
from ssod.data.views.operations import Frame
from ssod.errors import UserError


class FrameCache(Protocol):
    """get: the Frame of the i-th image, or None; put: keep it, if possible."""

    def get(self, index: int) -> Frame | None: ...

    def put(self, index: int, frame: Frame) -> None: ...


def open_cache(kind: bool | str, samples: SampleTable, limit: int) -> FrameCache | None:
    """The cache that `cache=` asks for: "ram" (or true), "disk" or none (false), for images shrunk to `limit`.

    Raises UserError when memory or disk cannot hold it.
    """
    if not kind:
        return None
    return DiskCache(samples, limit) if kind == "disk" else RamCache(samples, limit)


def shrunk(sizes: np.ndarray, limit: int) -> np.ndarray:
    """(height, width) int64 [I, 2] of images of (width, height) `sizes` shrunk to a long side of at most `limit`."""
    sides = sizes[:, ::-1].astype(np.int64)
    longest = np.maximum(sides.max(axis=1, initial=1), 1)[:, None]
    fitted = np.maximum(1, np.rint(sides * (limit / longest)).astype(np.int64))  # as `geometry.fitted`
    return np.where(longest > limit, fitted, sides)


class RamCache:
    """Images in one block of shared memory.

    Takes 3 bytes per pixel after shrinking, for example 0.9 MB per image of 640 x 480; the whole block is
    reserved at the start and every rank of a machine has its own. An image whose decoded size is not the
    announced one is not kept.
    """

    def __init__(self, samples: SampleTable, limit: int) -> None:
        shapes = shrunk(samples.sizes, limit)
        starts = np.concatenate(([0], np.cumsum(3 * shapes.prod(axis=1))))
        need, free = int(starts[-1]), _free_shared_memory()
        if need > 0.8 * free:
            raise UserError(
                f"cache=ram would keep {len(samples)} images in {need / 2**30:.1f} GiB of shared memory, of which "
                f"{free / 2**30:.1f} GiB are free; set cache=disk, cache=False or a smaller imgsz."
            )
        self.shapes = torch.from_numpy(shapes).share_memory_()
        self.sizes = torch.from_numpy(samples.sizes.astype(np.int64)).share_memory_()
        self.starts = torch.from_numpy(starts).share_memory_()
        self.block = torch.empty(need, dtype=torch.uint8).share_memory_()
        self.filled = torch.zeros(len(samples), dtype=torch.uint8).share_memory_()

    def get(self, index: int) -> Frame | None:
        if not self.filled[index]:
            return None
        (h, w), (width, height) = self.shapes[index].tolist(), self.sizes[index].tolist()
        return Frame(self._slot(index), np.diag([w / width, h / height, 1.0]))

    def put(self, index: int, frame: Frame) -> None:
        if list(frame.image.shape[1:]) == self.shapes[index].tolist():
            # Two workers may do this at once: both write the same bytes, and the flag comes last.
            self._slot(index).copy_(frame.image)
            self.filled[index] = 1

    def _slot(self, index: int) -> torch.Tensor:
        h, w = self.shapes[index].tolist()
        return self.block[self.starts[index] : self.starts[index + 1]].view(h, w, 3).permute(2, 0, 1)


class DiskCache:
    """Images as files of raw pixels in the user's cache folder, found again by every run with the same `limit`.

    A file's name follows from the path, size and time of change of its image, so an image that was changed is decoded
    anew. Files appear whole or not at all, carry a check sum, and are removed when nobody used them for a month.
    """

    def __init__(self, samples: SampleTable, limit: int) -> None:
        self.folder = cache_folder() / "decoded" / f"{_VERSION}-{limit}"
        try:
            for part in range(256):
                (self.folder / f"{part:02x}").mkdir(parents=True, exist_ok=True)
                sweep(self.folder / f"{part:02x}")
            keys = _keys(samples)
            present = {f"{part.name}{file}" for part in self.folder.iterdir() for file in os.listdir(part)}
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise UserError(
                f"cache=disk cannot write to {self.folder} ({error}); set the environment variable SSOD_CACHE to "
                "another folder, or set cache=False."
            ) from error
        lacking = np.array([key.hex() not in present for key in keys], np.bool_)
        need = int((3 * shrunk(samples.sizes, limit).prod(axis=1) + _HEADER.size)[lacking].sum())
        if need > 0.9 * free:
            raise UserError(
                f"cache=disk would write {need / 2**30:.1f} GiB to {self.folder}, where {free / 2**30:.1f} GiB are "
                "free; set the environment variable SSOD_CACHE to a folder on a larger disk, or set cache=False or a "
                "smaller imgsz."
            )
        joined = np.frombuffer(bytearray(b"".join(keys)), np.uint8).reshape(-1, _KEY)
        self.keys = torch.from_numpy(joined).share_memory_()  # uint8 [I, _KEY]

    def get(self, index: int) -> Frame | None:
        try:
            with open(self._place(index), "rb") as file:
                data = bytearray(file.read())
                if time.time() - os.fstat(file.fileno()).st_mtime > _TOUCH:
                    os.utime(file.name)
        except OSError:
            return None
        if len(data) < _HEADER.size:
            return None
        mark, check, h, w, height, width = _HEADER.unpack_from(data)
        pixels = memoryview(data)[_HEADER.size :]
        if mark != _MARK or len(pixels) != 3 * h * w or zlib.crc32(pixels) != check:
            return None
        return Frame(from_hwc(np.frombuffer(pixels, np.uint8).reshape(h, w, 3)), np.diag([w / width, h / height, 1.0]))

    def put(self, index: int, frame: Frame) -> None:
        pixels = np.ascontiguousarray(to_hwc(frame.image))
        h, w = pixels.shape[:2]
        width, height = original_size(frame)
        data = pixels.data.cast("B")
        header = _HEADER.pack(_MARK, zlib.crc32(data), h, w, height, width)
        with suppress(OSError):  # a disk that has become full costs time, not the run
            write_whole(self._place(index), lambda file: (file.write(header), file.write(data)))

    def _place(self, index: int) -> Path:
        key = self.keys[index].numpy().tobytes().hex()
        return self.folder / key[:2] / key[2:]


_VERSION = "v1"
_MARK = b"SSODFRME"
_HEADER = struct.Struct("<8sIIIII")  # mark, check sum, then height and width of the pixels and of the image file
_KEY = 16  # bytes
_TOUCH = 86_400  # seconds after which a file that is used is marked as used again


def original_size(frame: Frame) -> tuple[int, int]:
    """(width, height) of the file of a frame that was at most shrunk."""
    h, w = frame.image.shape[1:]
    return round(w / frame.matrix[0, 0]), round(h / frame.matrix[1, 1])


def _keys(samples: SampleTable) -> list[bytes]:
    """What tells an image's content apart; of a missing one, its path alone."""
    out = []
    tars: dict[Path, str] = {}
    for i in range(len(samples)):
        path, place = samples.file(i)
        about = str(path)
        with suppress(OSError):
            if place is None:
                about = identity(path)
            else:
                tars[place[0]] = tars.get(place[0]) or identity(place[0])
                about = f"{tars[place[0]]}|{place[1]}|{place[2]}"
        out.append(hashlib.blake2b(os.fsencode(about), digest_size=_KEY).digest())
    return out


def _free_shared_memory() -> int:
    """Bytes that fit both in shared memory and in RAM; containers often have little of the former."""
    ram = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 2**62
    shared = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 2**62
    return min(ram, shared)
