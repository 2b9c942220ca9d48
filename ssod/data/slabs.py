"""Shared memory that goes round between a loader worker and its reader.

A batch leaves a worker in shared memory. Fresh shared memory costs more than most augmentations: the system
clears every page and maps it twice. So a worker keeps its slabs, and takes one again once the tensor that the
reader made of it is gone; the first byte of a slab says whether it is in use. A reader that keeps its batches
costs new slabs, nothing else.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import weakref
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

HEADER = 64  # bytes before the pixels: the flag, and alignment

Key = tuple[int, int]  # process, number of its slab


@dataclass
class _Slab:
    memory: Tensor  # uint8 [HEADER + capacity], shared
    number: int
    sent: bool = False  # the reader knows it by its key

    @property
    def free(self) -> bool:
        return not self.memory.numpy()[0]


@dataclass
class _Pool:
    """The slabs of this process."""

    process: int = field(default_factory=os.getpid)
    slabs: list[_Slab] = field(default_factory=list)
    made: int = 0

    def take(self, size: int) -> _Slab:
        slab = next((s for s in self.slabs if s.free and len(s.memory) >= HEADER + size), None)
        if slab is None:
            self.slabs = [s for s in self.slabs if not s.free]  # too small, the free ones
            capacity = 2 ** (math.ceil(4 * math.log2(size)) / 4)  # few sizes, however batches vary
            storage = torch.UntypedStorage._new_shared(HEADER + math.ceil(capacity))
            slab = _Slab(torch.empty(0, dtype=torch.uint8).set_(storage), self.made)
            self.slabs.append(slab)
            self.made += 1
        slab.memory[0] = 1
        return slab


_pool = _Pool()
_known: dict[Key, np.ndarray] = {}  # slabs of others that this process reads


def blank(shape: tuple[int, ...]) -> Tensor:
    """A uint8 tensor of any content in a slab of this process, to be sent by `outgoing`."""
    global _pool
    if _pool.process != os.getpid():
        _pool = _Pool()  # the parent's, copied by a fork
    size = math.prod(shape)
    return _pool.take(size).memory[HEADER : HEADER + size].view(shape)


@dataclass
class Envelope:
    """What travels instead of a tensor from `blank`: the key of its slab, and the slab itself the first time."""

    key: Key
    memory: Tensor | None
    shape: tuple[int, ...]

    def open(self) -> Tensor:
        """In the reader: the tensor. The slab is free again when the last tensor on this memory is gone."""
        if self.memory is not None:
            alive = {os.getpid(), *(child.pid for child in multiprocessing.active_children())}
            for key in [k for k in _known if k[0] not in alive]:
                del _known[key]
            _known[self.key] = self.memory.numpy()
        slab = _known[self.key]
        pixels = slab[HEADER : HEADER + math.prod(self.shape)].reshape(self.shape)
        weakref.finalize(pixels, _release, slab, os.getpid()).atexit = False
        return torch.from_numpy(pixels)


def outgoing(images: Tensor) -> Envelope:
    """The envelope of a tensor from `blank`."""
    start = images.data_ptr() - HEADER
    slab = next(s for s in _pool.slabs if s.memory.data_ptr() == start)
    memory, slab.sent = (None if slab.sent else slab.memory), True
    return Envelope((_pool.process, slab.number), memory, tuple(images.shape))


def _release(slab: np.ndarray, process: int) -> None:
    if process == os.getpid():  # not in a fork, where the parent's tensors go too
        slab[0] = 0
