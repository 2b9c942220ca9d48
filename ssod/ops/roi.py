"""Features of regions, cut out of a pyramid by RoIAlign (He et al., Mask R-CNN, 2017, section 3).

RoIAlign is linear in the features: each cell of a region is a weighted sum of a few pixels' feature vectors. On a CPU
that sum is taken as such, over whole vectors at once; there it costs a fifteenth of the per-channel kernel, forward and
backward together. Elsewhere torchvision's operator is the better one, and in an exported graph what its target has.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from ssod.ops.boxes import area
from ssod.ops.forms import extent, graph_target, in_graph
from ssod.ops.host import true_rows
from ssod.ops.roi_samples import SAMPLING, by_samples

CANONICAL_SIZE, CANONICAL_STRIDE = 224, 16  # a box of 224 px is cut from the map of stride 16 (FPN, Eq. 1)
TAPS = (2 * SAMPLING) ** 2  # pixels that make up one cell


def roi_strides(boxes: Tensor, strides: list[int]) -> Tensor:
    """The stride whose map each box [M, 4] is cut from: int64 [M], one of `strides` (ascending powers of two)."""
    level = torch.floor(torch.log2(area(boxes).clamp(min=0).sqrt() / CANONICAL_SIZE) + 1e-6)
    wanted = CANONICAL_STRIDE * torch.exp2(level)
    return wanted.clamp(strides[0], strides[-1]).long()


def rows_by_stride(boxes: Tensor, wanted: Tensor, strides: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Rows of the wanted boxes, [M, 4] and bool [M] -> int64 [n], and which of these n each stride's map is for: what
    `roi_features` asks for of them. A GPU is waited for once for both."""
    own = roi_strides(boxes, strides)
    rows, *of_stride = true_rows([wanted, *(wanted & (own == s) for s in strides)])
    place = wanted.cumsum(0) - 1  # [M] where each is then
    return rows, [place[each] for each in of_stride]


def roi_features(
    maps: dict[int, Tensor], boxes: Tensor, image: Tensor, size: int, of_stride: list[Tensor] | None = None
) -> Tensor:
    """RoIAlign over several maps, 2 x 2 samples per cell, without the half-pixel shift (`aligned=False`).

    maps   {stride: [B, C, h, w]}, ascending strides
    boxes  [M, 4] xyxy pixels, no gradient; image int64 [M] the image of each
    size   cells per side of the result
    of_stride  which boxes belong to each map, int64 [n] each, where the caller knows already

    In a graph for onnxruntime all images have as many regions, those of the first image first.
    Returns [M, C, size, size]; float32, or the dtype of the maps on a CPU.
    """
    if graph_target() == "onnxruntime":
        of_images = boxes.view(next(iter(maps.values())).shape[0], -1, 4)
        return by_samples(maps, of_images, roi_strides(boxes, list(maps)).view(of_images.shape[:2]), size)
    if graph_target() == "tensorrt":
        return _by_gathers(maps, boxes, image, size)
    by_pixels = boxes.device.type == "cpu" and not in_graph()
    return _by_pixels(maps, boxes, image, size) if by_pixels else _by_operator(maps, boxes, image, size, of_stride)


def _by_operator(
    maps: dict[int, Tensor], boxes: Tensor, image: Tensor, size: int, of_stride: list[Tensor] | None = None
) -> Tensor:
    rois = torch.cat([image.to(boxes.dtype).unsqueeze(1), boxes], dim=1)  # [M, 5]
    channels = next(iter(maps.values())).shape[1]
    out = boxes.new_zeros(boxes.shape[0], channels, size, size)
    if of_stride is None:
        stride_of = roi_strides(boxes, list(maps))
        masks = [stride_of == stride for stride in maps]
        # A graph has no numbers to read.
        of_stride = [m.nonzero().squeeze(1) for m in masks] if in_graph() else true_rows(masks)
    for (stride, x), index in zip(maps.items(), of_stride, strict=True):
        pooled = roi_align(x.float(), rois[index], size, spatial_scale=1 / stride, sampling_ratio=SAMPLING)
        out = out.index_copy(0, index, pooled)
    return out


def _by_pixels(maps: dict[int, Tensor], boxes: Tensor, image: Tensor, size: int) -> Tensor:
    table, pixel, weight = _recipe(maps, boxes, image, size)
    cells = _WeightedRows.apply(table, pixel, weight.to(table.dtype))
    return cells.view(boxes.shape[0], size, size, table.shape[1]).permute(0, 3, 1, 2)


def _by_gathers(maps: dict[int, Tensor], boxes: Tensor, image: Tensor, size: int) -> Tensor:
    table, pixel, weight = _recipe(maps, boxes, image, size)
    cells = torch.zeros_like(table[:1])
    for rows, share in zip(pixel.unbind(1), weight.unbind(1), strict=True):  # not all TAPS at once: gigabytes
        cells = cells + table.index_select(0, rows) * share.unsqueeze(1)
    return cells.view(-1, size, size, table.shape[1]).permute(0, 3, 1, 2)


def _recipe(maps: dict[int, Tensor], boxes: Tensor, image: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """What each of the n = M * size^2 cells is made of: all pixels as rows [T, C], TAPS of them int32 [n, TAPS] and
    how much of each, float32 [n, TAPS]."""
    strides = list(maps)
    batch, channels = next(iter(maps.values())).shape[:2]
    # Every pixel of every map and image is a row: level by level, within it image by image.
    table = torch.cat([m.permute(0, 2, 3, 1).reshape(-1, channels) for m in maps.values()])  # [T, C]
    shapes = torch.stack([extent(m.shape[-2], m.shape[-1], boxes.device) for m in maps.values()])  # [L, 2]
    counts = batch * shapes.prod(dim=1)
    starts = counts.cumsum(0) - counts  # [L]

    level = (roi_strides(boxes, strides).unsqueeze(1) > torch.tensor(strides)).sum(dim=1)  # [M]
    height, width = shapes[level].unbind(1)
    origin = starts[level] + image * height * width  # [M] row of the pixel (0, 0) of each region's map
    x1, y1, x2, y2 = (boxes / torch.tensor(strides)[level, None]).unbind(1)
    row, row_weight = _taps(y1, y2, height, size)  # [M, size, 2 * SAMPLING] each
    column, column_weight = _taps(x1, x2, width, size)

    first = origin[:, None, None] + row * width[:, None, None]  # the pixel at the left end of each row
    of_row, of_column = _pairs(first.int(), column.int())
    row_part, column_part = _pairs(row_weight, column_weight)
    return table, (of_row + of_column).view(-1, TAPS), (row_part * column_part).view(-1, TAPS)


def _pairs(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Every row of each cell beside every column of it, [M, size, 4] each -> [M, size, 1, TAPS] and
    [M, 1, size, TAPS]. Written out: where torch goes through four numbers at a time it takes three times as long."""
    count = 2 * SAMPLING
    every_row = rows.unsqueeze(3).expand(-1, -1, -1, count).flatten(2)
    every_column = columns.unsqueeze(2).expand(-1, -1, count, -1).flatten(2)
    return every_row.unsqueeze(2), every_column.unsqueeze(1)


def _taps(low: Tensor, high: Tensor, length: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Along one axis: which pixels make up each cell, and with what weight: [M, size, 2 * SAMPLING] each.

    low, high [M] span the regions in pixels of their maps, which are `length` [M] pixels long.
    Samples up to one pixel outside the map take its border, those farther out count as 0.
    """
    side = (high - low).clamp(min=1)
    steps = (torch.arange(size * SAMPLING, device=low.device) + 0.5) / (size * SAMPLING)
    at = low[:, None] + side[:, None] * steps  # [M, size * SAMPLING]
    last = (length - 1)[:, None]
    inside = (at >= -1) & (at <= length[:, None])
    at = torch.minimum(at.clamp(min=0), last.to(at.dtype))
    first = at.floor()
    fraction = at - first
    index = torch.stack([first.long(), torch.minimum(first.long() + 1, last)], dim=-1)
    weight = torch.stack([1 - fraction, fraction], dim=-1) * (inside.unsqueeze(-1) / SAMPLING)
    return index.reshape(-1, size, 2 * SAMPLING), weight.reshape(-1, size, 2 * SAMPLING)


class _WeightedRows(torch.autograd.Function):
    """out[i] = sum_j weight[i, j] * table[index[i, j]], with a gradient for the table only.

    table [T, C], index int32 [n, J], weight [n, J] -> [n, C]. The backward is the same kind of sum with the roles of
    rows and outputs exchanged, which needs the entries sorted by row (int32 sorts in half the time of int64); torch's
    own backward takes five times as long.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(index, weight)
        ctx.rows = len(table)
        return F.embedding_bag(index, table, mode="sum", per_sample_weights=weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        index, weight = ctx.saved_tensors
        flat = index.flatten()
        order = flat.argsort()
        ends = torch.bincount(flat, minlength=ctx.rows).cumsum(0)
        offsets = torch.cat([ends.new_zeros(1), ends]).int()
        source = torch.div(order, index.shape[1], rounding_mode="floor").int()
        grad = F.embedding_bag(
            source,
            grads[0].contiguous(),
            offsets,
            mode="sum",
            per_sample_weights=weight.flatten().index_select(0, order),  # indexing takes seven times as long
            include_last_offset=True,
        )
        return grad, None, None
