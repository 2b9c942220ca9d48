"""Contact sheets: images of a data set with their boxes, to see whether the annotations fit, and the views that
training would make of them, to see whether the boxes follow."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image

from ssod.data.batching import targets_in
from ssod.data.draw import draw_boxes, fit, sheet
from ssod.data.image import ImageError, read_image
from ssod.data.loader import SAME, Bad, ViewMaker, stream_views
from ssod.data.reader import Reader
from ssod.data.samples import Dataset, Sample
from ssod.data.streams import Stream
from ssod.data.views.geometry import Size, to_hwc
from ssod.data.views.operations import Frame
from ssod.data.views.transforms import Spec, Views, pipeline
from ssod.errors import UserError
from ssod.ops.views import between, map_instances
from ssod.structures import Instances

TILE = 400  # pixels, long side of each image
DEFAULT_IMGSZ = 640  # of `ssod train`


class Specs(Protocol):
    """A config's `augment` section."""

    @property
    def labeled(self) -> Spec: ...
    @property
    def weak(self) -> Spec: ...
    @property
    def strong(self) -> Spec: ...


def draw_samples(dataset: Dataset, n: int, out_path: str | os.PathLike[str], seed: int = 0) -> Path:
    """Write a PNG of n images (all, if there are fewer), boxes and class names drawn in; returns its path.

    Images with boxes come first; which of them depends on the seed alone. Crowd boxes are drawn in gray.
    Raises UserError when no image can be drawn.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    order = sorted(rng.permutation(len(dataset)), key=lambda i: len(dataset.samples[i].boxes) == 0)
    tiles: list[np.ndarray] = []
    titles: list[str] = []
    for i in order:
        if len(tiles) == n:
            break
        sample = dataset.samples[i]
        try:
            tiles.append(_tile(sample, dataset.names))
        except ImageError:
            continue  # `check_data` lists these
        titles.append(f"{sample.path.name}   {sample.width}x{sample.height}")
    if not tiles:
        raise UserError(f"No image of '{dataset.split}' can be drawn: give n above 0, and mend the unreadable images.")
    out = Path(out_path)
    out.parent.mkdir(parents=True, exist_ok=True)
    page = sheet(tiles, titles, columns=math.ceil(math.sqrt(len(tiles))))
    Image.fromarray(page).save(out, "PNG")
    return out


class ThreeViews(NamedTuple):
    """The views of labelled images, of the teacher and of the student."""

    labeled: Views
    weak: Views
    strong: Views


def read_views(specs: Specs, imgsz: Size | None) -> ThreeViews:
    """The views that a run with these specs makes at a long side of `imgsz` pixels, by default that of training."""
    side = imgsz or DEFAULT_IMGSZ
    return ThreeViews(
        pipeline(specs.labeled, side, "labeled"), pipeline(specs.weak, side, "weak"), pipeline(specs.strong, side)
    )


def draw_views(dataset: Dataset, views: ThreeViews, n: int, out_path: str | os.PathLike[str], seed: int = 0) -> Path:
    """Write a PNG of the views of n images, made by the training loader's own maker; returns its path.

    Each image gets its weak and its strong view, then the views of a labelled image where these are not the weak
    one. Boxes in the strong view are those of the weak view, carried by the two views' matrices as pseudo boxes are.
    Images with boxes come first; which of them depends on the seed alone. Raises UserError as `build_loader` does.
    """
    samples = [s for s in dataset.samples if len(s.boxes)] or dataset.samples
    streams = stream_views(*views)
    reader = Reader(samples, streams.longest)
    stream = Stream(len(samples), seed, 1)
    bad: Bad = []
    pairs = ViewMaker(reader, stream, 1, streams.weak, streams.weak.mixing)
    others = ViewMaker(reader, stream, 0, streams.weak, streams.labeled_mixing)
    extra = () if views.labeled.chains == (SAME,) else views.labeled.chains
    tiles: list[np.ndarray] = []
    titles: list[str] = []
    for position in range(min(n, len(samples))):
        source, (below, above) = pairs.draw(position, (SAME, streams.strong), bad)
        objects = targets_in(source.objects(samples), below)
        shown = [("weak", below, objects), ("strong", above, _carried(objects, below, above))]
        if extra:
            source, frames = others.draw(position, extra, bad)
            shown += [("labelled", frame, targets_in(source.objects(samples), frame)) for frame in frames]
        for title, frame, boxes in shown:
            tiles.append(_view_tile(frame, boxes, dataset.names))
            h, w = frame.image.shape[1:]
            titles.append(f"{title}  {w}x{h}  {samples[source.index].path.name}")
    out = Path(out_path)
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet(tiles, titles, columns=4 if not extra else len(extra) + 2)).save(out, "PNG")
    return out


def _carried(objects: Instances, start: Frame, end: Frame) -> Instances:
    """Objects of one frame in another of the same source, as the strategies carry pseudo boxes."""
    matrix = between(torch.from_numpy(start.matrix), torch.from_numpy(end.matrix))
    h, w = end.image.shape[1:]
    return map_instances(objects, matrix, (h, w))[0]


def _view_tile(frame: Frame, objects: Instances, names: list[str]) -> np.ndarray:
    image, factor = fit(np.ascontiguousarray(to_hwc(frame.image)), TILE)
    labels = objects.labels.tolist()
    return draw_boxes(image, objects.boxes.numpy() * factor, labels, [names[i] for i in labels])


def _tile(sample: Sample, names: list[str]) -> np.ndarray:
    image, factor = fit(read_image(sample.path), TILE)
    labels = [
        -1 if crowd else label for label, crowd in zip(sample.labels.tolist(), sample.crowd.tolist(), strict=True)
    ]
    return draw_boxes(image, sample.boxes * factor, labels, [names[i] for i in sample.labels.tolist()])
