"""What exported models that run on arrays have in common, and the loop over images. Needs no torch."""

from __future__ import annotations

import os
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ssod.data.image import ImageError
from ssod.data.sizes import Fit
from ssod.deploy.contract import Card, Outputs
from ssod.deploy.prepare import Prepared, prepare, to_source
from ssod.deploy.results import Boxes
from ssod.deploy.sources import Picture


class ArrayModel:
    """An exported model: arrays in, arrays out. Subclasses load the file and implement `run`.

    path  the file; card  what it is; device  what it runs on, for people to read
    """

    path: Path
    card: Card
    device: str

    @property
    def names(self) -> list[str]:
        """Class names, in label order."""
        return self.card.names

    def run(self, images: np.ndarray, sizes: np.ndarray) -> Outputs:
        """images float32 [B, 3, H, W], sizes int32 [B, 2] valid (h, w): see ssod.deploy.contract."""
        raise NotImplementedError

    def feed(self, images: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
        """The inputs by name, those alone that this model has."""
        have = {"images": images, "sizes": sizes}
        return {name: have[name] for name in self.card.inputs}


class Found(NamedTuple):
    """What was found on the picture of that number. speed: milliseconds, see `Results`."""

    number: int
    boxes: Boxes
    speed: dict[str, float]


class _Waiting(NamedTuple):
    number: int
    prepared: Prepared
    ms: float


def find_on_arrays(
    model: ArrayModel,
    pictures: Sequence[Picture],
    fit: Fit,
    batch: int,
    workers: int,
    unreadable: list[tuple[str, str]],
) -> Iterator[Found]:
    """Everything the model finds, images of one padded size together, so that no result depends on its neighbours.

    workers     threads that decode and resize ahead; 0 = none
    unreadable  receives (path, reason) of pictures that could not be read; they yield nothing
    """
    waiting: dict[tuple[int, ...], list[_Waiting]] = defaultdict(list)
    for item in _ahead(model, pictures, fit, workers):
        if isinstance(item, ImageError):
            unreadable.append((str(item.path), item.reason))
            continue
        shape = item.prepared.image.shape
        waiting[shape].append(item)
        if len(waiting[shape]) == batch:
            yield from _run(model, waiting.pop(shape))
    for group in waiting.values():
        yield from _run(model, group)


def _ahead(model: ArrayModel, pictures: Sequence[Picture], fit: Fit, workers: int) -> Iterator[_Waiting | ImageError]:
    """Prepared pictures in their order. Decoding and resizing let other threads run, so threads are enough."""

    def read(index: int) -> _Waiting | ImageError:
        start = time.perf_counter()
        try:
            prepared = prepare(pictures[index].read(), fit, model.card.mean)
        except ImageError as error:
            return error
        return _Waiting(index, prepared, (time.perf_counter() - start) * 1000)

    if workers == 0 or len(pictures) == 1:
        yield from map(read, range(len(pictures)))
        return
    with ThreadPoolExecutor(workers) as pool:
        jobs = deque(pool.submit(read, index) for index in range(min(2 * workers, len(pictures))))
        for index in range(len(pictures)):
            item = jobs.popleft().result()
            if index + 2 * workers < len(pictures):  # no more than this are in memory, however many there are
                jobs.append(pool.submit(read, index + 2 * workers))
            yield item


def _run(model: ArrayModel, group: list[_Waiting]) -> Iterator[Found]:
    start = time.perf_counter()
    images = np.stack([item.prepared.image for item in group])
    sizes = np.array([item.prepared.size for item in group], np.int32)
    num_dets, boxes, scores, labels = model.run(images, sizes)
    inference = (time.perf_counter() - start) * 1000 / len(group)
    for row, item in enumerate(group):
        start = time.perf_counter()
        n = int(num_dets[row, 0])
        own = to_source(boxes[row, :n], item.prepared)
        keep = (own[:, 2:] > own[:, :2]).all(axis=1)  # a model without `sizes` may find something in the padding
        found = Boxes(own[keep], scores[row, :n][keep], labels[row, :n][keep], item.prepared.shape)
        after = (time.perf_counter() - start) * 1000
        yield Found(item.number, found, {"preprocess": item.ms, "inference": inference, "postprocess": after})


def threads() -> int:
    """How many threads a runtime may use: OMP_NUM_THREADS, as for torch; 0 = as it likes."""
    value = os.environ.get("OMP_NUM_THREADS", "")
    return int(value) if value.isdigit() else 0
