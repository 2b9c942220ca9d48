"""Non-maximum suppression of a whole batch, which waits for a GPU once or twice and not once an image.

On a GPU the greedy choice is found as what no longer changes when every box is kept that no kept box of higher score
suppresses: the same boxes (Cluster-NMS, Zheng et al., 2020, Proposition 1), all images and groups at once. A CPU does
so for the thousands of boxes of an RPN, with pairs of boxes near each other in the place of all pairs; for others it
takes torchvision's operator, image by image.

Letters: B images, N boxes of each, L levels, n boxes that are compared with each other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssod.ops.boxes import iou_matrix, nms
from ssod.ops.near_pairs import overlapping_pairs

# Each pass settles boxes one link further down a chain of boxes that suppress one another; few chains are longer.
PASSES = 20
PAIRS = 2**25  # compared at once: 128 MB for a number of each
FEW = 256  # boxes of an image that are compared without asking how many there are: sure ones, as pseudo boxes come from
IN_CACHE = 5000  # boxes of all images that a CPU looks at together: what it knows of their pairs stays in its cache
LARGEST = 6000  # boxes of an image above their threshold, as of a network that knows nothing yet


def nms_batch(
    boxes: Tensor, scores: Tensor, groups: Tensor, valid: Tensor, threshold: float, most: int
) -> list[Tensor]:
    """The boxes of each image that no kept one of its group and of higher score overlaps by more than `threshold`.

    boxes [B, N, 4], scores [B, N], groups int64 [B, N], valid bool [B, N]: the others are no boxes
    Returns indices int64 of each image by descending score, at most `most`.
    """
    together = boxes.device.type != "cpu" and boxes.shape[1] > 0
    take = _batch_together if together else _one_by_one
    return take(boxes, scores, groups, valid, threshold, most)


def nms_levels(
    boxes: Tensor, scores: Tensor, lengths: list[int], valid: Tensor, threshold: float, most: int
) -> list[Tensor]:
    """As `nms_batch`, of groups that follow one another, of `lengths` boxes each by descending score."""
    take = _levels_by_pairs if boxes.device.type == "cpu" else _levels_together
    return take(boxes, scores, lengths, valid, threshold, most)


def _one_by_one(
    boxes: Tensor, scores: Tensor, groups: Tensor, valid: Tensor, threshold: float, most: int
) -> list[Tensor]:
    found = []
    for b in range(len(boxes)):
        there = valid[b].nonzero().squeeze(1)
        found.append(there[nms(boxes[b, there], scores[b, there], groups[b, there], threshold)[:most]])
    return found


def _levels_by_pairs(
    boxes: Tensor, scores: Tensor, lengths: list[int], valid: Tensor, threshold: float, most: int
) -> list[Tensor]:
    groups = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    step = max(1, IN_CACHE // max(1, boxes.shape[1]))
    found = []
    for rows in (slice(i, i + step) for i in range(0, len(boxes), step)):
        some, score, there = boxes[rows], scores[rows], valid[rows]
        pairs = overlapping_pairs(some, groups, there, threshold)
        if pairs is None:
            found += _one_by_one(some, score, groups.expand(score.shape), there, threshold, most)
            continue
        before, behind = pairs  # each level's boxes stand by descending score
        keep = usable = there.flatten()
        while True:
            last, keep = keep, usable.index_fill(0, behind[keep.index_select(0, before)], False)
            if keep.equal(last):
                break
        keep = keep.view(score.shape)
        ranked = score.where(keep, -torch.inf).sort(dim=1, descending=True, stable=True).indices
        found += [best[: min(n, most)] for best, n in zip(ranked, keep.sum(dim=1).tolist(), strict=True)]
    return found


def _batch_together(
    boxes: Tensor, scores: Tensor, groups: Tensor, valid: Tensor, threshold: float, most: int, size: int = FEW
) -> list[Tensor]:
    """size: boxes of each image that are compared; where an image has more, as many as it has in a second attempt. All
    N of a dense head would be millions of pairs."""
    ranked = scores.where(valid, -torch.inf).sort(dim=1, descending=True, stable=True).indices[:, :size]  # [B, n]
    near = boxes.gather(1, ranked.unsqueeze(-1).expand(-1, -1, 4))
    over = _suppressing(near, groups.gather(1, ranked), threshold)
    keep, counts, largest = _settle(over, valid.gather(1, ranked), len(boxes), valid.sum(dim=1).amax())
    if largest > LARGEST:
        return _one_by_one(boxes, scores, groups, valid, threshold, most)
    if largest > size:
        return _batch_together(boxes, scores, groups, valid, threshold, most, largest)
    first = keep.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices  # kept ones, still by score
    kept = ranked.gather(1, first)
    return [rows[: min(n, most)] for rows, n in zip(kept, counts, strict=True)]


def _levels_together(
    boxes: Tensor, scores: Tensor, lengths: list[int], valid: Tensor, threshold: float, most: int
) -> list[Tensor]:
    longest = max(lengths)

    def stack(values: Tensor, fill: float) -> Tensor:
        """[B, N, ...] -> [B, L, n, ...], shorter levels filled up."""
        ends = [0, 0] * (values.dim() - 2)
        parts = values.split(lengths, dim=1)
        return torch.stack([F.pad(p, (*ends, 0, longest - p.shape[1]), value=fill) for p in parts], dim=1)

    place = stack(torch.arange(boxes.shape[1], device=boxes.device).expand(scores.shape), 0).flatten(1)  # [B, L * n]
    over = _suppressing(stack(boxes, 0.0).flatten(0, 1), None, threshold)  # [B * L, n, n]
    there = stack(valid, False).flatten(0, 1)
    keep, counts, _ = _settle(over, there, len(boxes), there.sum(dim=1).amax())
    score = stack(scores, -torch.inf).flatten(1).where(keep.view(len(boxes), -1), -torch.inf)
    ranked = place.gather(1, score.sort(dim=1, descending=True, stable=True).indices)
    return [rows[: min(n, most)] for rows, n in zip(ranked, counts, strict=True)]


def _suppressing(boxes: Tensor, groups: Tensor | None, threshold: float) -> Tensor:
    """Whether box j comes before box i and overlaps it too much: boxes [G, n, 4], groups [G, n] -> bool
    [G, n, n]."""
    count, size = boxes.shape[:2]
    before = torch.ones(size, size, dtype=torch.bool, device=boxes.device).tril(-1)
    over = torch.empty(count, size, size, dtype=torch.bool, device=boxes.device)
    step = max(1, PAIRS // max(1, size * size))
    for rows in (slice(i, i + step) for i in range(0, count, step)):
        over[rows] = (iou_matrix(boxes[rows], boxes[rows]) > threshold) & before
        if groups is not None:
            over[rows] &= groups[rows, :, None] == groups[rows, None]
    return over


def _settle(over: Tensor, valid: Tensor, images: int, largest: Tensor) -> tuple[Tensor, list[int], int]:
    """Which boxes the greedy choice keeps, bool [G, n], how many of each image, and `largest` as a number: one wait,
    where PASSES suffice.

    largest  int64 [], most boxes of an image; beyond n there are some that were not compared, and nothing is settled
    """
    keep = valid
    while True:
        for _ in range(PASSES):
            last, keep = keep, valid & ~(over & keep.unsqueeze(1)).any(dim=2)
        counts = keep.view(images, -1).sum(dim=1)
        *numbers, most, changed = torch.cat([counts, torch.stack([largest, (keep != last).any()])]).tolist()
        if not changed or most > over.shape[-1]:
            return keep, numbers, most
