"""Multi-scale deformable attention (Zhu et al., Deformable DETR, 2021, Eq. 3): a few samples per query instead of all.

Letters: B images, S cells of all levels, Q queries, M heads, D channels per head, L levels, T points per level.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def deform_attn(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of bilinear samples of each head's values.

    value      [B, S, M, D]        levels concatenated, each row by row
    shapes     L pairs (h, w), sum of h * w = S
    locations  [B, Q, M, L, T, 2]  (x, y) of each sample, 0 .. 1 of its level's map; outside of it everything is 0
    weights    [B, Q, M, L, T]     attention, sums to 1 over L and T

    Returns [B, Q, M * D].
    """
    return _plain(value, shapes, locations, weights)


def _plain(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    batch, queries, heads, _, points, _ = locations.shape
    dim = value.shape[-1]
    grids = (2 * locations - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # [L, B * M, Q, T, 2]
    levels = value.split([h * w for h, w in shapes], dim=1)
    total = value.new_zeros(batch * heads, dim, queries)
    for (h, w), level, grid, weight in zip(shapes, levels, grids, weights.unbind(3), strict=True):
        maps = level.permute(0, 2, 3, 1).reshape(batch * heads, dim, h, w)
        sampled = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        weight = weight.transpose(1, 2).reshape(batch * heads, 1, queries, points)
        total = total + (sampled * weight).sum(-1)  # [B * M, D, Q]
    return total.view(batch, heads * dim, queries).transpose(1, 2)
