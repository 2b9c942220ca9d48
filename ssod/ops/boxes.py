"""Boxes: area, overlap, clipping, suppression. Everything is xyxy pixels and works on any leading shape."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import batched_nms

EPS = 1e-7  # keeps the GIoU of two empty boxes finite


def area(boxes: Tensor) -> Tensor:
    """Area in square pixels: [..., 4] -> [...]."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def centers(boxes: Tensor) -> Tensor:
    """Centre (x, y): [..., 4] -> [..., 2]."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def distances(boxes: Tensor, points: Tensor) -> Tensor:
    """Pixels from points [..., 2] to the left, top, right and bottom side: [..., 4] -> [..., 4], > 0 inside."""
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], dim=-1)


def ordered(boxes: Tensor) -> Tensor:
    """The same boxes [..., 4] with x1 <= x2 and y1 <= y2: sides that are found one by one may cross."""
    first, second = boxes[..., :2], boxes[..., 2:]
    return torch.cat([torch.minimum(first, second), torch.maximum(first, second)], dim=-1)


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Cut boxes [..., 4] to images of sizes (h, w) [..., 2], broadcast over the leading shape."""
    limit = sizes.flip(-1).to(boxes.dtype)  # (w, h)
    limit = torch.cat([limit, limit], dim=-1)
    return torch.minimum(boxes.clamp(min=0), limit)


def not_smaller(boxes: Tensor, side: float) -> Tensor:
    """True where both sides are at least `side` pixels: [..., 4] -> bool [...]."""
    return ((boxes[..., 2:] - boxes[..., :2]) >= side).all(dim=-1)


def iou_matrix(a: Tensor, b: Tensor) -> Tensor:
    """Overlap of every pair: [..., N, 4] and [..., M, 4] -> [..., N, M], 0 where the union is empty."""
    inter, union = inter_union(a.unsqueeze(-2), b.unsqueeze(-3))
    return torch.where(union > 0, inter / union, torch.zeros_like(union))


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Overlap of each pair, 0 .. 1, 0 where both are empty: [M, 4] and [M, 4] -> [M]."""
    inter, union = inter_union(a, b)
    return inter / (union + EPS)


def giou_loss(a: Tensor, b: Tensor) -> Tensor:
    """`1 - GIoU` of each pair, 0 .. 2: [M, 4] and [M, 4] -> [M].

    GIoU = IoU - (hull - union) / hull, hull = area of the smallest box around both
    (Rezatofighi et al., "Generalized Intersection over Union", 2019, Algorithm 1).
    """
    inter, union = inter_union(a, b)
    top_left = torch.minimum(a[..., :2], b[..., :2])
    bottom_right = torch.maximum(a[..., 2:], b[..., 2:])
    hull = (bottom_right - top_left).prod(dim=-1)
    return 1 - inter / (union + EPS) + (hull - union) / (hull + EPS)


def nms(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> Tensor:
    """Suppress boxes of lower score that overlap by more than `threshold` with a kept one of the same group.

    boxes [N, 4], scores [N], groups int64 [N] (class, or level in an RPN).
    Returns the indices of the kept boxes by descending score.
    """
    return batched_nms(boxes, scores, groups, threshold)


def inter_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Areas of intersection and union, square pixels: xyxy boxes [..., 4] and [..., 4] -> [...] each, broadcast."""
    sides = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    inter = sides.clamp(min=0).prod(dim=-1)
    return inter, area(a) + area(b) - inter
