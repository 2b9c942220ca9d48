"""Anchors: the boxes that dense codes refer to, made per stride and never per level index.

A map of stride s has its cell (i, j) at the pixel (j * s, i * s); every anchor of that cell is centred there
(the placement of torchvision's anchor generator). A half-size image whose strides are relabelled (`shift=1`)
therefore gets exactly the anchors of the full-size frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class AnchorGrid:
    """Anchors of each stride, shifted over the maps.

    cells  {stride: float32 [A, 4]}  the A anchors of one cell, xyxy pixels around (0, 0)
    """

    def __init__(self, cells: Mapping[int, Tensor]) -> None:
        self.cells = dict(cells)
        self.per_cell = next(iter(self.cells.values())).shape[0]
        self._cache: dict[tuple, Tensor] = {}

    def __call__(self, shapes: Mapping[int, Sequence[int]], device: torch.device) -> tuple[Tensor, dict[int, slice]]:
        """Anchors of maps with the given (height, width), in the order of `shapes`.

        Returns [P, 4] xyxy pixels, ordered by row, column, anchor within a level, and the slice of each stride.
        """
        spans, start = {}, 0
        for stride, (height, width) in shapes.items():
            count = height * width * self.per_cell
            spans[stride] = slice(start, start + count)
            start += count

        key = (*((s, *shape) for s, shape in shapes.items()), device)
        if key not in self._cache:
            if len(self._cache) > 64:  # many input shapes: rebuild now and then rather than grow
                self._cache.clear()
            self._cache[key] = torch.cat([self._level(s, h, w, device) for s, (h, w) in shapes.items()])
        return self._cache[key], spans

    def __deepcopy__(self, memo: dict) -> AnchorGrid:
        return AnchorGrid(self.cells)  # a teacher needs no copy of the cache

    def _level(self, stride: int, height: int, width: int, device: torch.device) -> Tensor:
        y, x = torch.meshgrid(
            torch.arange(height, device=device) * stride, torch.arange(width, device=device) * stride, indexing="ij"
        )
        origin = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)  # [H * W, 1, 4]
        return (origin + self.cells[stride].to(device)).reshape(-1, 4)  # [H * W * A, 4]


def square_cells(strides: Sequence[int]) -> dict[int, Tensor]:
    """One square of side `stride` per cell: the points of FCOS, with their stride as size."""
    return {s: torch.tensor([[-s / 2, -s / 2, s / 2, s / 2]]) for s in strides}


def ratio_cells(sizes: Mapping[int, float], ratios: Sequence[float]) -> dict[int, Tensor]:
    """Anchors of area sizes[stride]^2 and height / width = ratio, with corners rounded to whole pixels.

    Faster R-CNN (Ren et al., 2015, section 3.1.1) with one size per level (Lin et al., FPN, 2017, section 4.1).
    """
    cells = {}
    for stride, size in sizes.items():
        height = torch.tensor(ratios).sqrt()
        half = torch.stack([1 / height, height], dim=1) * size / 2  # [A, 2], (w, h) / 2
        cells[stride] = torch.cat([-half, half], dim=1).round()
    return cells
