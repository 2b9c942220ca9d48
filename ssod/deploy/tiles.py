"""A large image seen in overlapping tiles, and their boxes as boxes of the image. Needs no torch.

Letters: N boxes of all tiles.

One object may be found in several tiles, whole in one and cut by the border in another. So boxes of two tiles, of one
class, are taken for one object
- where neither is cut: if their IoU is above `iou`, as within one image; the higher score stays;
- where at least one is cut, that is, ends within 1 % of the tile's side (at least 2 pixels) of a border that is not
  the image's: if their parts in what both tiles see have an IoU above `iou`. The one that is not cut stays, whatever
  the scores. Of boxes that are all cut, all together become one, the smallest box around them with the highest score:
  an object larger than the overlap.
Boxes of one tile are not compared: the model has done that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ssod.deploy.results import Boxes
from ssod.errors import UserError

_CUT = 0.01  # share of the tile's side: this near, a box ends at the border


@dataclass(frozen=True)
class Tiling:
    """side: of a tile, pixels of the source; overlap: share of it that neighbours have in common, at least.

    Raises UserError for what cannot be a side or a share.
    """

    side: int
    overlap: float = 0.2

    def __post_init__(self) -> None:
        if self.side < 32:
            raise UserError(f"tile={self.side}: the side of a tile is 32 pixels of the image or more.")
        if not 0 <= self.overlap <= 0.9:
            raise UserError(f"overlap={self.overlap:g} is a share of the tile, 0 .. 0.9.")

    def places(self, height: int, width: int) -> list[Place]:
        """Tiles of one size that cover an image, rows from the top; the whole image where it is no larger than one."""
        high, wide = min(self.side, height), min(self.side, width)
        return [
            Place(x, y, wide, high)
            for y in self._starts(height, high).tolist()
            for x in self._starts(width, wide).tolist()
        ]

    def _starts(self, length: int, tile: int) -> np.ndarray:
        step = max(1, tile - int(np.ceil(self.overlap * tile)))
        steps = -(-(length - tile) // step)
        return np.linspace(0, length - tile, steps + 1).astype(int)  # rounded down, two are never further than a step


class Place(NamedTuple):
    """Where a tile lies in its image: left, top, width and height, pixels."""

    x: int
    y: int
    width: int
    height: int

    @property
    def xyxy(self) -> tuple[int, int, int, int]:
        return self.x, self.y, self.x + self.width, self.y + self.height

    def crop(self, pixels: np.ndarray) -> np.ndarray:
        """This part of [H, W, 3], in the same memory."""
        return pixels[self.y : self.y + self.height, self.x : self.x + self.width]


def merged(parts: Sequence[Boxes], places: Sequence[Place], shape: tuple[int, int], iou: float) -> Boxes:
    """Boxes of the tiles of an image of `shape` (height, width), in each tile's own pixels, as boxes of the image.

    They come by descending score, without those that show an object once more: see the top of this file.
    """
    if len(places) == 1:
        return parts[0]
    tile = np.repeat(np.arange(len(parts)), [len(part) for part in parts])  # [N]
    windows = np.array([place.xyxy for place in places], np.float64)
    xyxy = np.concatenate([part.xyxy + np.tile(window[:2], 2) for part, window in zip(parts, windows, strict=True)])
    conf = np.concatenate([part.conf for part in parts])
    label = np.concatenate([part.cls for part in parts])
    cut = _cut(xyxy, windows[tile], shape)
    pairs = _same_object(xyxy, label, cut, windows, tile, iou)
    kept = _kept(conf, cut, pairs)
    for group in _groups(kept & cut, pairs):
        first, others = group[0], group[1:]
        xyxy[first] = np.concatenate([xyxy[group, :2].min(0), xyxy[group, 2:].max(0)])
        conf[first] = conf[group].max()
        kept[others] = False
    order = np.flatnonzero(kept)
    order = order[np.argsort(-conf[order], kind="stable")]
    return Boxes(xyxy[order], conf[order], label[order], shape)


def _cut(xyxy: np.ndarray, window: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """bool [N]: which boxes [N, 4] end at a border of their tile [N, 4] inside the image."""
    extent = window[:, 2:] - window[:, :2]
    near = np.maximum(2, _CUT * np.tile(extent, 2))  # [N, 4]
    inner = np.concatenate([window[:, :2] > 0, window[:, 2:] < [shape[1], shape[0]]], axis=1)
    return (inner & (np.abs(xyxy - window) <= near)).any(axis=1)


def _same_object(
    xyxy: np.ndarray, label: np.ndarray, cut: np.ndarray, windows: np.ndarray, tile: np.ndarray, iou: float
) -> dict[int, list[int]]:
    """For each box those of other tiles that show the same object."""
    found: dict[int, list[int]] = defaultdict(list)
    rows = np.split(np.arange(len(tile)), np.searchsorted(tile, np.arange(1, len(windows))))  # of each tile
    for a, b, both in _neighbours(windows):
        i, j = rows[a][:, None], rows[b][None]
        whole = _iou(xyxy[i], xyxy[j])
        seen = _iou(_common(xyxy[i], both), _common(xyxy[j], both))
        alike = np.where(cut[i] | cut[j], seen, whole) > iou
        for m, n in np.argwhere(alike & (label[i] == label[j])).tolist():
            found[int(rows[a][m])].append(int(rows[b][n]))
            found[int(rows[b][n])].append(int(rows[a][m]))
    return found


def _neighbours(windows: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    """Pairs of tiles that overlap, each once, and what both see; windows [tiles, 4] come in rows from the top."""
    for a, window in enumerate(windows):
        below = int(np.searchsorted(windows[:, 1], window[3]))
        common = _common(window, windows[a + 1 : below])
        for k in np.flatnonzero(_area(common) > 0).tolist():
            yield a, a + 1 + k, common[k]


def _kept(conf: np.ndarray, cut: np.ndarray, pairs: dict[int, list[int]]) -> np.ndarray:
    """bool [N]: what no better box makes superfluous. Whole boxes are better than cut ones; those do not compete."""
    kept = np.ones(len(conf), bool)
    whole = np.flatnonzero(~cut)
    for i in whole[np.argsort(-conf[whole], kind="stable")].tolist():
        if kept[i]:
            kept[pairs.get(i, [])] = False
    return kept


def _groups(some: np.ndarray, pairs: dict[int, list[int]]) -> list[list[int]]:
    """Rows of `some` (bool [N]) that are connected by pairs, each group by its smallest row first."""
    left = set(np.flatnonzero(some).tolist())
    groups = []
    for start in np.flatnonzero(some).tolist():
        if start not in left:
            continue
        left.remove(start)
        group, to_do = [start], [start]
        while to_do:
            new = [j for j in pairs.get(to_do.pop(), []) if j in left]
            left.difference_update(new)
            group += new
            to_do += new
        groups.append(group)
    return groups


def _common(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """What two boxes [..., 4] have in common; where that is nothing, its sides are not in order."""
    return np.concatenate([np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])], axis=-1)


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[..., 4] and [..., 4] -> [...], 0 where one is empty."""
    inter = _area(_common(a, b))
    union = _area(a) + _area(b) - inter
    return np.divide(inter, union, out=np.zeros(inter.shape), where=union > 0)


def _area(boxes: np.ndarray) -> np.ndarray:
    """0 where the sides are not in order."""
    return np.clip(boxes[..., 2:] - boxes[..., :2], 0, None).prod(axis=-1)
