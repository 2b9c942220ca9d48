"""The images of the film: always the same ones, as they are and in the run's own views.

All draws come from generators of their own, named by the seed: a run is the same with and without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ssod.data.batching import stack, targets_in
from ssod.data.cache import original_size
from ssod.data.image import ImageError
from ssod.data.loader import SAME, Bad, ViewMaker, stream_views
from ssod.data.reader import Reader
from ssod.data.samples import Sample, SampleTable
from ssod.data.streams import Stream, generator
from ssod.data.views.geometry import to_hwc
from ssod.data.views.mixing import Source
from ssod.data.views.operations import Frame
from ssod.data.views.transforms import pipeline
from ssod.errors import UserError
from ssod.structures import Instances, View

if TYPE_CHECKING:
    from ssod.engine.trainer import SemiTrainer

OWN = 3  # the number of these draws among the streams of the loader
PAD_TO = 32  # as the loader


@dataclass(frozen=True)
class Still:
    """An image as it is, at the size of validation: a view of it alone, and (height, width) of its file in pixels."""

    index: int
    view: View
    size: tuple[int, int]

    @property
    def image(self) -> np.ndarray:
        """uint8 [h, w, 3] RGB."""
        return pixels(self.view)


class Reel:
    """Chooses images once, and reads them again at every moment.

    pool    what they are chosen from: unlabelled images; where a strategy mines, the partly labelled ones, if any
    chosen  positions in the pool, in the order of their ids 1, 2, ...
    bad     (path, reason) of those that could not be read, since last asked
    """

    def __init__(self, trainer: SemiTrainer) -> None:
        config = trainer.config
        labeled_images = SampleTable.of(trainer.data.labeled)
        partly = np.flatnonzero(~labeled_images.complete) if trainer.strategy.mines else np.zeros(0, np.int64)
        self.partly = len(partly) > 0
        self.pool: Sequence[Sample] = labeled_images.select(partly) if self.partly else trainer.data.unlabeled
        self.chosen: list[int] = []
        self.bad: Bad = []
        self.seed = config.seed
        if not self.pool:
            return
        labeled = pipeline(config.augment.labeled, config.imgsz, "labeled")
        strong = pipeline(config.augment.strong, config.imgsz, "strong")
        views = stream_views(labeled, pipeline(config.augment.weak, config.imgsz, "weak"), strong)
        self._plain = pipeline([{"resize": {}}], config.imgsz, "weak").chains[0]
        self._chains = labeled.chains[:2] if self.partly else (SAME, views.strong)
        reader = Reader(self.pool, max(views.longest, self._plain.longest))
        mixing = views.labeled_mixing if self.partly else views.weak.mixing
        self._stream = _Moment(len(self.pool), config.seed, 1)
        self._maker = ViewMaker(reader, self._stream, OWN, views.weak, mixing)

    def choose(self, most: int, wanted: Sequence[str] = ()) -> list[Still]:
        """Choose the first images of an order drawn by the seed that can be read, or those with the wanted paths."""
        if wanted:
            paths = {str(self.pool[i].path): i for i in range(len(self.pool))}
            order = [paths[p] for p in wanted if p in paths]
        else:
            order = generator(self.seed, OWN, 1).permutation(len(self.pool)).tolist()
        found: list[Still] = []
        for index in order:
            if len(found) == most:
                break
            still = self.still(index)
            if still is not None:
                found.append(still)
        self.chosen = [still.index for still in found]
        return found

    def paths(self) -> list[str]:
        return [str(self.pool[i].path) for i in self.chosen]

    def still(self, index: int) -> Still | None:
        """An image of the pool, None where it cannot be read."""
        try:
            frame = self._maker.reader[index]
        except ImageError as error:
            self.bad.append((str(error.path), error.reason))
            return None
        width, height = original_size(frame)
        frame = self._plain(frame, generator(self.seed, OWN))
        return Still(index, self._view(Source(index, frame), frame), (height, width))

    def pair(self, index: int, moment: int) -> tuple[View, View] | None:
        """The weak and the strong view of an image, drawn anew at each moment, as training would make them; of a partly
        labelled image its first two views. None where it cannot be read."""
        self._stream.moment = moment
        try:
            source, (weak, strong) = self._maker.draw(index, self._chains, self.bad)
        except UserError:  # nothing can be read any more; each image is in `bad`
            return None
        if source.index != index:
            return None
        return self._view(source, weak), self._view(source, strong)

    def _view(self, source: Source, frame: Frame) -> View:
        targets = targets_in(source.objects(self.pool), frame) if self.partly else Instances.empty()
        view = stack([frame], [targets], [source.index], PAD_TO)
        if self.partly:
            view.complete = [source.complete(self.pool)]
        return view


class _Moment(Stream):
    """Position i is image i, and the moment stands for the epoch: no two moments draw alike."""

    moment = 0

    def at(self, position: int, skip: int = 0) -> tuple[int, int]:
        return self.moment, (position + skip) % self.n


def pixels(view: View) -> np.ndarray:
    """The valid part of the one image of a view: uint8 [h, w, 3] RGB."""
    h, w = view.sizes[0].tolist()
    return np.ascontiguousarray(to_hwc(view.images[0, :, :h, :w].cpu()))
