"""Mosaic and mixup: a new source image made of several.

Mixing happens before any view is made. What it gives is a source image like a decoded one, and every view's
matrix maps from it: weak and strong views of one mosaic are related by one matrix, as those of one photograph are.
Only annotations need to know the parts: each part has its own matrix into the mixed source.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from ssod.data.batching import objects_of
from ssod.data.samples import Sample
from ssod.data.views import geometry
from ssod.data.views.operations import Frame, Range, Ranged, Rng
from ssod.ops.views import map_instances
from ssod.structures import Instances

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Part:
    """One image in a mixed source.

    index   position of the image in its sample list
    matrix  float64 [3, 3], pixels of that image file -> pixels of the mixed source
    window  xyxy, where it is seen in the mixed source
    """

    index: int
    matrix: np.ndarray
    window: Box

    def moved(self, matrix: np.ndarray, limits: Box) -> Part | None:
        """The part after an axis-parallel `matrix`, clipped to `limits`; None when nothing of it is left."""
        (x1, y1), (x2, y2) = ((matrix @ (x, y, 1.0))[:2] for x, y in (self.window[:2], self.window[2:]))
        window = (max(x1, limits[0]), max(y1, limits[1]), min(x2, limits[2]), min(y2, limits[3]))
        if window[0] >= window[2] or window[1] >= window[3]:
            return None
        return Part(self.index, matrix @ self.matrix, window)


@dataclass(frozen=True)
class Source:
    """What views are made of: a frame, the position in its sample list of the image whose turn it is, and the parts.

    A plain source is that image alone: no parts, and the frame's matrix maps from the pixels of its file. A mixed
    source is itself the image that matrices map from; its parts map from their files.
    """

    index: int
    frame: Frame
    parts: tuple[Part, ...] = ()

    def objects(self, samples: Sequence[Sample]) -> Instances:
        """Annotations in the pixels that matrices map from: crowds left out, hidden ones of a mixed source dropped."""
        if not self.parts:
            return objects_of(samples[self.index])
        return Instances.cat([_visible(objects_of(samples[part.index]), part) for part in self.parts])

    def complete(self, samples: Sequence[Sample]) -> bool:
        """Whether every object is annotated: False as soon as one of the images that are seen may lack some."""
        indices = [part.index for part in self.parts] or [self.index]
        return all(samples[index].complete for index in indices)

    def as_parts(self) -> tuple[Part, ...]:
        """Itself as the one part it has, or the parts that it has."""
        h, w = self.frame.image.shape[1:]
        return self.parts or (Part(self.index, self.frame.matrix, (0, 0, w, h)),)


def _visible(objects: Instances, part: Part) -> Instances:
    """Objects of one file in the mixed source, clipped to their part's window and dropped where clipped away."""
    x1, y1, x2, y2 = part.window
    to_window = geometry.translation(-x1, -y1) @ part.matrix
    inside = map_instances(objects, torch.from_numpy(to_window), torch.tensor([y2 - y1, x2 - x1]))[0]
    return inside.with_boxes(inside.boxes + torch.tensor([x1, y1, x1, y1], dtype=torch.float32))


@dataclass(frozen=True)
class Mixing(Ranged):
    """Base of what makes one source of several; `other` gives one more source, drawn at random."""

    def __call__(self, source: Source, other: Callable[[], Source], rng: Rng) -> Source:
        raise NotImplementedError


@dataclass(frozen=True)
class Mosaic(Mixing):
    """With probability `p`, four images around a point drawn from `centre` (shares of the side) of a square.

    The square has a side of 2 `imgsz` and each image a long side of `imgsz`, one corner at the point; what reaches
    outside is cut, what stays empty between them is grey, and empty margins are dropped (after YOLOv4, Bochkovskiy
    et al., 2020). The view's own resize follows.
    """

    name: ClassVar[str] = "mosaic"
    p: float = 1.0
    centre: Range = (0.25, 0.75)
    imgsz: int = 640

    @classmethod
    def limits(cls) -> dict[str, Range]:
        return {"p": (0, 1), "centre": (0, 1), "imgsz": (16, 16384)}

    def __call__(self, source: Source, other: Callable[[], Source], rng: Rng) -> Source:
        if rng.random() >= self.p:
            return source
        side = 2 * self.imgsz
        x, y = (int(v) for v in np.round(rng.uniform(*self.centre, 2) * side))
        canvas = _blank(side, side)
        parts: list[Part | None] = []
        used = [side, side, 0, 0]  # xyxy of what the four images cover
        for corner, tile in enumerate((source, other(), other(), other())):
            image, zoom = geometry.resize(tile.frame.image, self.imgsz)
            h, w = image.shape[1:]
            left, top = (x, x - w)[corner in (0, 2)], (y, y - h)[corner in (0, 1)]
            x1, y1, x2, y2 = max(left, 0), max(top, 0), min(left + w, side), min(top + h, side)
            canvas[:, y1:y2, x1:x2] = image[:, y1 - top : y2 - top, x1 - left : x2 - left]
            matrix = geometry.translation(left, top) @ zoom
            parts += [part.moved(matrix, (x1, y1, x2, y2)) for part in tile.as_parts()]
            used = [min(used[0], x1), min(used[1], y1), max(used[2], x2), max(used[3], y2)]
        x1, y1, x2, y2 = used
        window, shift = geometry.crop(canvas, y1, x1, y2 - y1, x2 - x1)
        moved = [part.moved(shift, (0, 0, x2 - x1, y2 - y1)) for part in parts if part is not None]
        return Source(source.index, Frame(window, np.eye(3)), tuple(part for part in moved if part is not None))


@dataclass(frozen=True)
class MixUp(Mixing):
    """With probability `p`, a blend with another image, shares r and 1 - r, r drawn from Beta(alpha, alpha).

    Zhang et al., ICLR 2018; as detectors use it (Zhang et al., 2019), the objects of both images count in full.
    The other image is fitted into the first, at the upper left; beyond it the first stays as it is.
    """

    name: ClassVar[str] = "mixup"
    p: float = 0.5
    alpha: float = 32.0

    @classmethod
    def limits(cls) -> dict[str, Range]:
        return {"p": (0, 1), "alpha": (0.01, 1000)}

    def __call__(self, source: Source, other: Callable[[], Source], rng: Rng) -> Source:
        if rng.random() >= self.p:
            return source
        share, guest = rng.beta(self.alpha, self.alpha), other()
        h, w = source.frame.image.shape[1:]
        h0, w0 = guest.frame.image.shape[1:]
        image, zoom = geometry.resize(guest.frame.image, max(1, int(min(h / h0, w / w0) * max(h0, w0))))
        image = image[:, :h, :w]  # rounding of the short side may overshoot by one
        h, w = image.shape[1:]
        blend = source.frame.image.clone()
        part = blend[:, :h, :w]
        part.copy_((share * part.float() + (1 - share) * image.float()).add_(0.5))
        guests = (p.moved(zoom, (0, 0, w, h)) for p in guest.as_parts())
        parts = (*source.as_parts(), *(p for p in guests if p is not None))
        return Source(source.index, Frame(blend, np.eye(3)), parts)


def _blank(height: int, width: int) -> torch.Tensor:
    return geometry.from_hwc(np.full((height, width, 3), geometry.GREY, np.uint8))
