"""Which boxes overlap, among many, on a CPU: only boxes near each other are compared.

Where the IoU of two boxes is above t, their centres are at most (1 - t) / (2 t) of the narrower one's width apart, and
as much of the lower one's height. Along an axis let o be their intersection and u what they span together; their union
has at least the area u times the other axis's intersection, so o / u > t. The centres are at most (u - o) / 2 apart,
which is less than o (1 / t - 1) / 2, and o is at most the shorter side.

Letters: B images, N boxes of each, n pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssod.ops.boxes import inter_union

# Boxes near one, on average, that are looked at. Where there are more they lie in heaps, of which few are kept, and to
# compare these with all is faster.
MOST = 120
ROUNDING = 1.00001


def overlapping_pairs(boxes: Tensor, groups: Tensor, valid: Tensor, threshold: float) -> Tensor | None:
    """Pairs of valid boxes of one image and group whose IoU is above `threshold`, in no order.

    boxes [B, N, 4] xyxy, groups int64 [N] from 0, valid bool [B, N]; threshold above 0
    Returns int64 [2, n], indices into all B * N boxes, the smaller one first; None where they lie in heaps.
    """
    box, usable = boxes.where(valid.unsqueeze(-1), 0.0).flatten(0, 1), valid.flatten()
    center, side = (box[:, :2] + box[:, 2:]) / 2, box[:, 2:] - box[:, :2]
    # How far the next one's centre may be, [B * N, 2], and a little more than rounding takes.
    reach = side * (ROUNDING * (1 - threshold) / (2 * threshold)) + box.abs().amax() * (ROUNDING - 1)
    reach = reach.where(usable.unsqueeze(1), -1.0)  # from no valid box to any

    # Images and groups lie side by side, too far apart for any reach.
    strip = (torch.arange(len(boxes)).unsqueeze(1) * (groups.max() + 1) + groups).flatten()
    x = center[:, 0].double()
    place, order = (x + strip * (x.amax() - x.amin() + reach.amax() + 1)).sort()
    box, center, reach = (v.index_select(0, order) for v in (box, center, reach))

    rank = torch.arange(len(place), dtype=torch.int32)
    after = (torch.searchsorted(place, place + reach[:, 0], right=True, out_int32=True) - rank - 1).clamp(min=0)
    ends = after.cumsum(0)
    if ends[-1] > MOST * len(rank):
        return None
    left = rank.repeat_interleave(after)
    first = (rank + 1 + after - ends).int()  # of each box: what makes the place in the list the rank of its partner
    right = torch.arange(len(left), dtype=torch.int32) + first.index_select(0, left)
    y, reach_y = center[:, 1].contiguous(), reach[:, 1].contiguous()
    apart = (y.index_select(0, left) - y.index_select(0, right)).abs_()
    near = (apart <= reach_y.index_select(0, left)).nonzero().squeeze(1)
    left, right = left.index_select(0, near), right.index_select(0, near)

    inter, union = inter_union(box.index_select(0, left), box.index_select(0, right))
    over = (inter / union > threshold).nonzero().squeeze(1)
    pairs = order[torch.stack([left, right]).index_select(1, over)]
    return pairs[:, usable[pairs[1]]].sort(dim=0).values
