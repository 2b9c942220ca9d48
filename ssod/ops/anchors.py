"""Anchors: the boxes that dense codes refer to, made per stride and never per level index.

A map of stride s has its cell (i, j) at the pixel (j * s, i * s); every anchor of that cell is centred there
(the placement of torchvision's anchor generator). A half-size image whose strides are relabelled (`shift=1`)
therefore gets exactly the anchors of the full-size frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ssod.ops.forms import in_graph


class AnchorGrid:
    """Anchors of each stride, shifted over the maps.

    cells  {stride: float32 [A, 4]}  the A anchors of one cell, xyxy pixels around (0, 0)
    """

    def __init__(self, cells: Mapping[int, Tensor]) -> None:
        self.cells = dict(cells)
        self.per_cell = next(iter(self.cells.values())).shape[0]
        self._cache: dict[tuple, Tensor] = {}

    def __call__(
        self, shapes: Mapping[int, Sequence[int]], device: torch.device, frame: tuple[int, int] | None = None
    ) -> tuple[Tensor, dict[int, slice]]:
        """Anchors of maps with the given (height, width), in the order of `shapes`.

        frame  None, or (H, W) pixels: cells are then H // height and W // width apart, as torchvision places them,
               which differs from the stride where it does not divide the frame

        Returns [P, 4] xyxy pixels, ordered by row, column, anchor within a level, and the slice of each stride.
        """
        spans, start = {}, 0
        for stride, (height, width) in shapes.items():
            count = height * width * self.per_cell
            spans[stride] = slice(start, start + count)
            start = start + count  # not +=: in a trace it is a tensor, which the slice before holds

        if in_graph():
            return self._levels(shapes, device, frame), spans
        key = (*((s, *shape) for s, shape in shapes.items()), device, frame)
        if key not in self._cache:
            if len(self._cache) > 64:  # many input shapes: rebuild now and then rather than grow
                self._cache.clear()
            self._cache[key] = self._levels(shapes, device, frame)
        return self._cache[key], spans

    def __deepcopy__(self, memo: dict) -> AnchorGrid:
        return AnchorGrid(self.cells)  # a teacher needs no copy of the cache

    def _levels(
        self, shapes: Mapping[int, Sequence[int]], device: torch.device, frame: tuple[int, int] | None
    ) -> Tensor:
        levels = []
        for stride, (height, width) in shapes.items():
            step = (stride, stride) if frame is None else (frame[0] // height, frame[1] // width)
            levels.append(self._level(self.cells[stride].to(device), height, width, step))
        return torch.cat(levels)

    def _level(self, cells: Tensor, height: int, width: int, step: tuple[int, int]) -> Tensor:
        rows = torch.arange(height, device=cells.device) * step[0]
        columns = torch.arange(width, device=cells.device) * step[1]
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        origin = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)  # [H * W, 1, 4]
        return (origin + cells).reshape(-1, 4)  # [H * W * A, 4]


def square_cells(sides: Mapping[int, float]) -> dict[int, Tensor]:
    """One square of side sides[stride] pixels per cell: what the codes of a point refer to (FCOS)."""
    return {stride: torch.tensor([[-side / 2, -side / 2, side / 2, side / 2]]) for stride, side in sides.items()}


def ratio_cells(sizes: Mapping[int, Sequence[float]], ratios: Sequence[float]) -> dict[int, Tensor]:
    """Per ratio one anchor of each size: of area size^2 and height / width = ratio, corners rounded to whole pixels.

    sizes  {stride: sizes in pixels}; A = sizes * ratios, the sizes of one ratio are neighbours

    Faster R-CNN (Ren et al., 2015, section 3.1.1) with one size per level (Lin et al., FPN, 2017, section 4.1);
    RetinaNet (Lin et al., 2017, section 4) has three.
    """
    height = torch.tensor(ratios).sqrt()[:, None]
    cells = {}
    for stride, of_level in sizes.items():
        size = torch.tensor(of_level)
        half = torch.stack([(1 / height * size).flatten(), (height * size).flatten()], dim=1) / 2  # [A, 2], (w, h) / 2
        cells[stride] = torch.cat([-half, half], dim=1).round()
    return cells
