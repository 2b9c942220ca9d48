"""What every dense head does around its own rules: name its candidates, choose the best, suppress the rest.

Letters: B images, P candidates of one image over all levels, K classes, D numbers per code, T chosen candidates.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ssod.ops.assign import BACKGROUND, IGNORED, PaddedTargets
from ssod.ops.fixed import best_of
from ssod.ops.suppression import nms_batch
from ssod.structures import Candidates, Instances


def dense_candidates(
    matched: Tensor, anchors: Tensor, targets: PaddedTargets, num_classes: int, divisor: Tensor
) -> Candidates:
    """All M = B * P candidates after assignment: matched int64 [B, P] (target, -1 background, -2 ignored).

    divisor  what each image's losses will be divided by, [B]
    """
    batch, count = matched.shape
    labels = targets.labels.gather(1, matched.clamp(min=0)).where(matched >= 0, num_classes)
    image = torch.arange(batch, device=matched.device).repeat_interleave(count)
    return Candidates(
        boxes=anchors.expand(batch, count, 4).reshape(-1, 4),
        image=image,
        labels=labels.where(matched != IGNORED, -1).flatten(),
        matched=matched.clamp(min=BACKGROUND).flatten(),
        stage="dense",
        divisor=divisor[image],
    )


def best_per_level(scores: Tensor, spans: Mapping[int, slice], count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` highest of scores [B, P, K] of each level: score, candidate and class, [B, T] each."""
    num_classes = scores.shape[-1]
    values, indices = [], []
    for span in spans.values():
        level = scores[:, span].flatten(1)  # [B, P_level * K]
        value, index = best_of(level, count)
        values.append(value)
        indices.append(index + span.start * num_classes)
    index = torch.cat(indices, dim=1)
    return torch.cat(values, dim=1), index // num_classes, index % num_classes


def codes_of(codes: Tensor, candidate: Tensor) -> Tensor:
    """Codes [B, P, D] of candidates int64 [B, T] -> float32 [B, T, D]."""
    return codes.gather(1, candidate.unsqueeze(-1).expand(-1, -1, codes.shape[-1])).float()


def suppress(
    boxes: Tensor, scores: Tensor, labels: Tensor, quality: Tensor | None, conf: float, iou: float, max_det: int
) -> list[Instances]:
    """Detections of each image: score above conf, class-wise NMS, the best max_det by descending score.

    boxes [B, T, 4], scores, labels and quality [B, T]
    """
    kept = nms_batch(boxes, scores, labels, scores > conf, iou, max_det)
    return [
        Instances(boxes[b, keep], labels[b, keep], scores[b, keep], None if quality is None else quality[b, keep])
        for b, keep in enumerate(kept)
    ]
