"""Detections in fixed shapes: what a graph can hold, where `suppress` gives lists of any length.

Letters: B images, T candidates of an image, D detections of an image, filled up where there are fewer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssod.ops.boxes import iou_matrix, nms
from ssod.ops.forms import graph_target

MATRIX_CANDIDATES = 1000  # of an image, for which the matrix form compares every pair
# Each pass settles boxes one link further down a chain of boxes that suppress one another.
MATRIX_PASSES = 16
NEVER = -1.0  # score of what is no detection


class Detections(NamedTuple):
    """B images' detections by descending score, filled up with 0, 0 and -1.

    num_dets  int32 [B, 1];  boxes  float32 [B, D, 4] xyxy pixels;  scores  float32 [B, D];  labels  int32 [B, D]
    """

    num_dets: Tensor
    boxes: Tensor
    scores: Tensor
    labels: Tensor


def best_of(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` highest of each row and where they are, all where there are fewer: [B, N] -> [B, T] twice."""
    there = scores.shape[1]
    # A trace has tensors for sizes, and a fixed input; a graph has symbols, of which `min` would make constants.
    return scores.topk(min(count, int(there)) if torch.jit.is_tracing() else torch.sym_min(count, there), dim=1)


def fixed_detections(
    boxes: Tensor, scores: Tensor, labels: Tensor, num_classes: int, conf: float, iou: float, max_det: int
) -> Detections:
    """`suppress` in fixed shapes: boxes [B, T, 4], scores and labels [B, T]; scores below 0 are never detections.

    The matrix form looks at the best MATRIX_CANDIDATES of an image only.
    """
    if graph_target() == "tensorrt":
        scores, index = best_of(scores, MATRIX_CANDIDATES)
        boxes, labels = take_boxes(boxes, index), labels.gather(1, index)
    scores = scores.where(scores > conf, NEVER)
    keep = keep_mask(boxes, scores, labels, num_classes, iou)
    return fill(boxes, scores.where(keep, NEVER), labels, conf, max_det)


def fill(boxes: Tensor, scores: Tensor, labels: Tensor, conf: float, max_det: int) -> Detections:
    """The best `max_det` of an image with scores above conf: boxes [B, T, 4], scores and labels [B, T]."""
    # Rows that are no detections, so that there are enough of them for any size of image.
    spare = scores.new_full((1, max_det), NEVER).expand(scores.shape[0], -1)
    scores, index = torch.cat([scores, spare], dim=1).topk(max_det, dim=1)  # [B, D]
    valid = scores > conf
    index = index.clamp(max=boxes.shape[1] - 1)
    boxes = take_boxes(boxes, index) * valid.unsqueeze(-1)
    return Detections(
        valid.sum(dim=1, keepdim=True).int(),
        boxes,
        scores * valid,
        labels.gather(1, index).where(valid, -1).int(),
    )


def take_boxes(boxes: Tensor, index: Tensor) -> Tensor:
    """Rows of boxes [B, T, 4] by index int64 [B, D] -> [B, D, 4]."""
    return boxes.gather(1, index.unsqueeze(-1).expand(-1, -1, 4))


def keep_mask(boxes: Tensor, scores: Tensor, groups: Tensor, num_groups: int, iou: float) -> Tensor:
    """Which boxes survive the NMS within their group: boxes [B, T, 4], scores and groups int64 [B, T] -> bool [B, T].

    Scores are finite. In a graph for `tensorrt` a matrix form, equal to the greedy one wherever no chain of boxes that
    suppress one another has more than MATRIX_PASSES links.
    """
    if graph_target() == "tensorrt":
        return _by_matrix(boxes, scores, groups, iou)
    kept: Tensor = torch.ops.ssod.nms_keep(boxes, scores, groups, num_groups, iou)
    return kept


def _by_matrix(boxes: Tensor, scores: Tensor, groups: Tensor, iou: float) -> Tensor:
    order = torch.arange(scores.shape[1], device=scores.device)
    ahead = (scores.unsqueeze(2) > scores.unsqueeze(1)) | (
        (scores.unsqueeze(2) == scores.unsqueeze(1)) & (order.unsqueeze(1) < order)
    )  # [B, T, T]: whether the first has the higher score, ties by place
    alike = groups.unsqueeze(2) == groups.unsqueeze(1)
    beats = ((iou_matrix(boxes, boxes) > iou) & ahead & alike).float()
    keep = torch.ones_like(scores)
    for _ in range(MATRIX_PASSES):
        keep = 1 - (beats * keep.unsqueeze(2)).amax(dim=1)  # suppressed by one that is kept
    return keep > 0.5


@torch.library.custom_op("ssod::nms_keep", mutates_args=())
def nms_keep(boxes: Tensor, scores: Tensor, groups: Tensor, num_groups: int, iou: float) -> Tensor:
    """As `keep_mask`, by the greedy NMS of torchvision; one operator, which an exporter can translate as it likes."""
    keep = torch.zeros_like(scores, dtype=torch.bool)
    for b in range(len(boxes)):
        keep[b, nms(boxes[b], scores[b], groups[b], iou)] = True
    return keep


@nms_keep.register_fake
def _(boxes: Tensor, scores: Tensor, groups: Tensor, num_groups: int, iou: float) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)
