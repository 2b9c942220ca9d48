"""Shared memory that goes round: a slab is taken again when its last tensor is gone, and never before."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch

from ssod.data import slabs
from ssod.data.evalset import EvalLoader
from ssod.data.samples import Sample
from ssod.data.slabs import Envelope, blank, outgoing


@pytest.fixture(autouse=True)
def _own_pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(slabs, "_pool", slabs._Pool())
    monkeypatch.setattr(slabs, "_known", {})
    yield
    gc.collect()


def sent(value: int, shape: tuple[int, ...] = (2, 3, 8, 8)) -> torch.Tensor:
    """A tensor full of `value`, through the pickler of a worker's queue and back."""
    images = blank(shape).fill_(value)
    envelope: Envelope = ForkingPickler.loads(ForkingPickler.dumps(outgoing(images)))
    return envelope.open()


def test_a_slab_is_taken_again_once_nobody_looks_at_it() -> None:
    first = sent(1)
    place = slabs._pool.slabs[0].number
    part = first[1, :, 2:]  # a view of the memory keeps it
    del first
    second = sent(2)
    assert len(slabs._pool.slabs) == 2
    assert (part == 1).all()
    del part, second
    third = sent(3)
    assert len(slabs._pool.slabs) == 2
    assert slabs._pool.slabs[0].number == place
    assert (third == 3).all()


def test_batches_that_are_kept_stay_as_they_are() -> None:
    kept = [sent(i) for i in range(20)]
    assert [int(t.float().mean()) for t in kept] == list(range(20))
    assert all((t == i).all() for i, t in enumerate(kept))


def test_a_larger_batch_gets_a_larger_slab_and_the_small_free_ones_go() -> None:
    shapes = [(1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 16, 16), (1, 3, 8, 8)]
    for value, shape in enumerate(shapes):
        images = sent(value, shape)
        assert images.shape == shape
        assert (images == value).all()
        del images
    assert len(slabs._pool.slabs) == 1  # the smallest batch fits into the largest slab


def test_a_tensor_is_aligned_and_writable() -> None:
    images = sent(5)
    assert images.data_ptr() % 64 == 0
    images += 1
    assert (images == 6).all()


def _worker(pipe: Connection) -> None:
    while (value := pipe.recv()) is not None:
        images = blank((4, 3, 32, 32)).fill_(value)
        pipe.send((ForkingPickler.dumps(outgoing(images)).tobytes(), len(slabs._pool.slabs), os.getpid()))


def test_between_processes_and_after_one_is_gone() -> None:
    context = multiprocessing.get_context("fork")
    held: list[torch.Tensor] = [sent(99)]  # the child inherits this one and must not free it
    for _ in range(2):
        here, there = context.Pipe()
        process = context.Process(target=_worker, args=(there,))
        process.start()
        for value in range(6):
            here.send(value)
            message, count, pid = here.recv()
            images = ForkingPickler.loads(message).open()
            assert (images == value).all()
            assert count == (1 if value < 4 else value - 2)  # from 3 on they are kept
            if value >= 3:
                held.append(images)
            del images
        here.send(None)
        process.join(20)
        assert process.exitcode == 0
        assert {key[0] for key in slabs._known} == {os.getpid(), pid}  # those of the first worker are let go
    assert [int(t.float().mean()) for t in held] == [99, 3, 4, 5, 3, 4, 5]  # alive after their worker's end


def test_a_fork_frees_nothing_of_its_parent() -> None:
    images = sent(4)
    slab = slabs._pool.slabs[0]
    child = os.fork()
    if child == 0:
        del images
        gc.collect()
        os._exit(0 if not slab.free else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not slab.free
    del images
    assert slab.free


def test_a_long_loader_does_with_few_slabs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the reader learns to know is bounded by what is on its way, not by the number of batches."""
    import numpy as np
    from PIL import Image

    path = tmp_path / "a.png"
    Image.fromarray(np.full((32, 48, 3), 120, np.uint8)).save(path)
    empty: Any = (np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, bool))
    samples = [Sample(path, i + 1, 48, 32, *empty, labeled=True) for i in range(60)]
    seen = sum(len(view) for view in EvalLoader(samples, 48, batch=2, workers=1))
    assert seen == 60
    assert 0 < len(slabs._known) <= 6
