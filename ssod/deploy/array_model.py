"""What exported models that run on arrays have in common, and how `predict` uses them. Needs no torch."""

from __future__ import annotations

import os
import time
from collections.abc import Hashable
from pathlib import Path

import numpy as np

from ssod.data.sizes import Fit
from ssod.deploy.contract import Card, Outputs
from ssod.deploy.prepare import Prepared, prepare, to_source
from ssod.deploy.results import Boxes
from ssod.deploy.stream import Seen


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


class OnArrays:
    """Such a model as `predict` uses it: see ssod.deploy.stream.Runner.

    fit  which size images get; batch  images at once, at most
    """

    def __init__(self, model: ArrayModel, fit: Fit, batch: int) -> None:
        self.model, self.fit, self.batch = model, fit, batch

    def ready(self, pixels: np.ndarray) -> Prepared:
        return prepare(pixels, self.fit, self.model.card.mean)

    def size(self, item: Prepared) -> Hashable:
        return item.image.shape

    def see(self, items: list[Prepared]) -> Seen:
        start = time.perf_counter()
        images = np.stack([item.image for item in items])
        sizes = np.array([item.size for item in items], np.int32)
        num_dets, boxes, scores, labels = self.model.run(images, sizes)
        ran = time.perf_counter()
        found = []
        for row, item in enumerate(items):
            n = int(num_dets[row, 0])
            own = to_source(boxes[row, :n], item)
            keep = (own[:, 2:] > own[:, :2]).all(axis=1)  # a model without `sizes` may find something in the padding
            found.append(Boxes(own[keep], scores[row, :n][keep], labels[row, :n][keep], item.shape))
        return Seen(found, {"inference": (ran - start) * 1000, "postprocess": (time.perf_counter() - ran) * 1000})


def threads() -> int:
    """How many threads a runtime may use: OMP_NUM_THREADS, as for torch; 0 = as it likes."""
    value = os.environ.get("OMP_NUM_THREADS", "")
    return int(value) if value.isdigit() else 0
