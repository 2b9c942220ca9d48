"""Which candidate of one view looks where a candidate of another view does.

Letters: B images, P candidates of one image over all levels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssod.ops.boxes import centers
from ssod.ops.host import on_device
from ssod.ops.views import map_points
from ssod.structures import DenseOutput


def same_grid(seen: DenseOutput, other: DenseOutput) -> bool:
    """True where candidate i of one is at the place of candidate i of the other, if both views have one geometry."""
    shapes = [{stride: m.shape[-2:] for stride, m in output.pyramid.maps.items()} for output in (seen, other)]
    return shapes[0] == shapes[1]


def within(seen: DenseOutput, sizes: Tensor, matrices: Tensor) -> Tensor:
    """Whether another view, of valid sizes (h, w) [B, 2], shows the centre of each candidate: bool [B, P].

    matrices  [B, 3, 3] pixels of `seen` -> pixels of the other view
    """
    center = centers(seen.anchors)
    moved = map_points(center, matrices)  # [B, P, 2]
    return ((moved >= 0) & (moved <= sizes.flip(-1)[:, None])).all(dim=-1)


def same_place(seen: DenseOutput, other: DenseOutput, matrices: Tensor) -> Tensor:
    """For each candidate of one view the candidate of another that looks at the same place: int64 [B, P].

    seen, other  outputs of the same kind of head on two views of the same images
    matrices     [B, 3, 3] pixels of `seen` -> pixels of `other`
    The level is the one whose stride is nearest after scaling, the cell the one whose centre is nearest to the moved
    one, the anchor of a cell that of the same number.
    """
    grids = [_grid(other, stride, matrices.device) for stride in other.spans]
    strides, starts, cells, origins, pitches = (torch.stack(column) for column in zip(*grids, strict=True))
    linear = matrices[:, :2, :2].double()
    scale = (linear[:, 0, 0] * linear[:, 1, 1] - linear[:, 0, 1] * linear[:, 1, 0]).abs().sqrt()  # [B]

    places = []
    for stride, span in seen.spans.items():
        height, width = seen.pyramid.maps[stride].shape[-2:]
        count = span.stop - span.start
        per_cell = count // (height * width)
        level = (strides.log2() - (stride * scale).log2()[:, None]).abs().argmin(dim=1)  # [B]
        center = centers(seen.anchors[span])
        moved = map_points(center, matrices)  # [B, count, 2]
        cell = ((moved - origins[level, None]) / pitches[level, None]).round().long()
        cell = torch.minimum(cell.clamp(min=0), cells[level, None] - 1)  # at the border: the nearest
        row_start = cell[..., 1] * cells[level, None, 0]
        anchor = torch.arange(count, device=matrices.device) % per_cell
        places.append(starts[level, None] + (row_start + cell[..., 0]) * per_cell + anchor)
    return torch.cat(places, dim=1)


def _grid(output: DenseOutput, stride: int, device: torch.device) -> tuple[Tensor, ...]:
    """Of a level: its stride, first candidate, cells (across, down), first centre (x, y), and the way from one centre
    to the next (x, y)."""
    span = output.spans[stride]
    down, across = output.pyramid.maps[stride].shape[-2:]
    cells = on_device([across, down], device)
    first, last = centers(output.anchors[span.start]), centers(output.anchors[span.stop - 1])
    # Read off the anchors: their places are not always multiples of the stride (`rounded_strides`).
    pitch = ((last - first) / (cells - 1).clamp(min=1)).where(cells > 1, float(stride))
    return on_device(float(stride), device), on_device(span.start, device), cells, first, pitch
