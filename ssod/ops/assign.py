"""Assignment: which candidate learns which target.

B images, N targets (padded to the most in the batch), P candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ssod.ops.boxes import area, iou_matrix
from ssod.ops.host import on_device
from ssod.structures import Instances

BACKGROUND, IGNORED = -1, -2  # values of `matched` that are not the index of a target


@dataclass
class PaddedTargets:
    """Targets of a batch in rectangular tensors; N >= 1, so that gathering works without any box.

    boxes [B, N, 4], labels int64 [B, N], valid bool [B, N],
    cls_weight and box_weight [B, N], or None where no image has any.
    """

    boxes: Tensor
    labels: Tensor
    valid: Tensor
    cls_weight: Tensor | None = None
    box_weight: Tensor | None = None


def pad_targets(targets: Sequence[Instances]) -> PaddedTargets:
    """Stack the targets of B images; rows beyond an image's own are not `valid`."""
    device = targets[0].boxes.device
    counts = on_device([len(t) for t in targets], device)
    size = max(1, *(len(t) for t in targets))

    def stack(parts: list[Tensor], fill: float = 0) -> Tensor:
        # one tall dummy makes every batch N >= 1 rows high without a branch
        dummy = parts[0].new_zeros((size, *parts[0].shape[1:]))
        return pad_sequence([*parts, dummy], batch_first=True, padding_value=fill)[:-1]

    def weights(parts: list[Tensor | None]) -> Tensor | None:
        if all(p is None for p in parts):
            return None
        ones = [torch.ones(len(t), device=device) for t in targets]
        return stack([one if p is None else p for p, one in zip(parts, ones, strict=True)])

    return PaddedTargets(
        boxes=stack([t.boxes.float() for t in targets]),
        labels=stack([t.labels for t in targets]),
        valid=torch.arange(size, device=device) < counts[:, None],
        cls_weight=weights([t.cls_weight for t in targets]),
        box_weight=weights([t.box_weight for t in targets]),
    )


def assign_points(points: Tensor, reach: Tensor, ranges: Tensor, boxes: Tensor, valid: Tensor) -> Tensor:
    """FCOS assignment (Tian et al., 2019, sections 3.1-3.2, with centre sampling), all images at once.

    points   [P, 2]        x, y in pixels
    reach    [P]           a point must lie within this distance of the box centre, in x and in y (pixels, exclusive)
    ranges   [P, 2]        a point takes boxes whose farthest side lies between these distances (pixels, exclusive)
    boxes    [B, N, 4]     targets
    valid    bool [B, N]

    Returns int64 [B, P]: the target of each point, -1 = background. Of several, the smallest box wins.
    """
    # Per axis instead of a [B, P, N, 4] stack: the four distances are the largest tensors of the whole loss.
    x, y = points[:, 0, None], points[:, 1, None]  # [P, 1]
    x1, y1, x2, y2 = boxes[:, None].unbind(-1)  # each [B, 1, N]
    near = ((x - (x1 + x2) / 2).abs() < reach[:, None]) & ((y - (y1 + y2) / 2).abs() < reach[:, None])
    nearest = torch.minimum(torch.minimum(x - x1, x2 - x), torch.minimum(y - y1, y2 - y))  # [B, P, N]
    farthest = torch.maximum(torch.maximum(x - x1, x2 - x), torch.maximum(y - y1, y2 - y))
    fits = near & (nearest > 0) & (farthest > ranges[:, :1]) & (farthest < ranges[:, 1:]) & valid[:, None]

    cost = area(boxes)[:, None].where(fits, torch.inf)  # [B, P, N]
    smallest, matched = cost.min(dim=-1)
    return matched.where(smallest.isfinite(), BACKGROUND)


def assign_iou(
    candidates: Tensor, boxes: Tensor, low: float, high: float, allow_low_quality: bool, valid: Tensor | None = None
) -> Tensor:
    """Assignment by overlap (Ren et al., 2015, section 3.1.2), of one image or of several at once.

    candidates  [..., P, 4], boxes [..., N, 4]; valid bool [..., N], which boxes are targets, None: all
    IoU >= high takes the best target; IoU < low is background (-1); between, the candidate is ignored (-2).
    allow_low_quality  every target also keeps the candidates of its own highest IoU, however low that is

    Returns int64 [..., P].
    """
    if boxes.shape[-2] == 0:
        return torch.full(candidates.shape[:-1], BACKGROUND, dtype=torch.int64, device=candidates.device)
    overlap = iou_matrix(candidates, boxes)  # [..., P, N]
    if valid is not None:
        overlap = overlap.where(valid.unsqueeze(-2), -1.0)
    best, target = overlap.max(dim=-1)
    matched = target.where(best >= low, BACKGROUND)
    matched = matched.where((best < low) | (best >= high), IGNORED)
    if allow_low_quality:
        highest = overlap.amax(dim=-2, keepdim=True)  # [..., 1, N]
        keeps = ((overlap == highest) & (highest > 0)).any(dim=-1)  # an empty target would keep every candidate
        matched = target.where(keeps, matched)
    return matched


def sample_balanced(
    matched: Tensor, count: int, positive_fraction: float, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draw `count` candidates per image, at most `count * positive_fraction` of them matched, the rest background.

    matched    int64 [B, P]  index of a target, -1 = background, -2 = ignored
    generator  where the randomness comes from; None = torch's own, so `torch.manual_seed` decides

    Returns indices int64 [B, S] and valid bool [B, S]: a rectangle instead of lists, so that nothing waits for the
    device. Positives come first; where an image has too few of a kind, entries are not valid.
    """
    positive, negative = matched >= 0, matched == BACKGROUND
    keys = torch.rand(matched.shape, device=matched.device, generator=generator)
    size = matched.shape[1]
    key_pos, take_pos = keys.where(positive, -1.0).topk(min(int(count * positive_fraction), size), dim=1)
    key_neg, take_neg = keys.where(negative, -1.0).topk(min(count, size), dim=1)

    use_pos = key_pos >= 0
    room = count - use_pos.sum(dim=1, keepdim=True)  # [B, 1]
    use_neg = (key_neg >= 0) & (torch.arange(take_neg.shape[1], device=matched.device) < room)
    return torch.cat([take_pos, take_neg], dim=1), torch.cat([use_pos, use_neg], dim=1)
