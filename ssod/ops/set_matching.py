"""Which query learns which target: the cost of every pair (Zhu et al., Deformable DETR, 2021; Carion et al., 2020).

Boxes here are (cx, cy, w, h), 0 .. 1 of each image's valid area.
Letters: B images, L decoder layers, Q queries, S proposals of the encoder, N targets (padded), K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ssod.ops.hungarian import match_hungarian

FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0  # of the class cost; the published code does not tie it to the loss's alpha
EPS = 1e-8  # keeps the logarithm finite where a probability is 0


@dataclass
class CostWeights:
    """How much the class, the L1 distance and the GIoU of a pair count."""

    cls: float
    l1: float
    giou: float


def to_corners(boxes: Tensor) -> Tensor:
    """(cx, cy, w, h) -> (x1, y1, x2, y2): [..., 4] -> [..., 4]."""
    center, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([center - half, center + half], dim=-1)


def to_centers(boxes: Tensor) -> Tensor:
    """(x1, y1, x2, y2) -> (cx, cy, w, h): [..., 4] -> [..., 4]."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


@torch.no_grad()
def pair_costs(logits: Tensor, boxes: Tensor, labels: Tensor, targets: Tensor, weights: CostWeights) -> Tensor:
    """Cost of each query and target.

    logits [..., B, Q, K], boxes [..., B, Q, 4], labels int64 [B, N], targets [B, N, 4]  ->  float32 [..., B, Q, N]
    Soft labels are probabilities of each class, float32 [B, N, K]: each class costs as much as it is probable.

    The class cost is what the focal loss of the target's class would gain by taking it as an object.
    """
    if labels.is_floating_point():
        classes = _class_cost(logits.float().sigmoid()) @ labels.transpose(-1, -2)
    else:
        index = labels.unsqueeze(1).expand(*logits.shape[:-1], -1)  # [..., B, Q, N]
        classes = _class_cost(logits.float().sigmoid().gather(-1, index))
    boxes = boxes.float()
    distance = torch.cdist(boxes, targets.expand(*boxes.shape[:-2], -1, -1), p=1)
    giou = _giou_matrix(to_corners(boxes), to_corners(targets))
    return weights.cls * classes + weights.l1 * distance - weights.giou * giou


def _class_cost(probability: Tensor) -> Tensor:
    as_object = FOCAL_ALPHA * (1 - probability) ** FOCAL_GAMMA * -(probability + EPS).log()
    as_nothing = (1 - FOCAL_ALPHA) * probability**FOCAL_GAMMA * -(1 - probability + EPS).log()
    return as_object - as_nothing


@torch.no_grad()
def match_queries(queries: Tensor, proposals: Tensor | None, valid: Tensor) -> tuple[Tensor, Tensor | None]:
    """Match all decoder layers, and the encoder's proposals if there are any, with one copy off the device.

    queries [L, B, Q, N] and proposals [B, S, N] are costs, valid bool [B, N]
    Returns int64 [L, B, Q] and [B, S]: the target of each, -1 = background.
    """
    layers, _, count, targets = queries.shape
    if proposals is None:
        return match_hungarian(queries.flatten(0, 1), valid.repeat(layers, 1)).view(queries.shape[:3]), None

    # A best matching needs only the N cheapest proposals of each target, as N - 1 others leave one of them free:
    # at most N * N of the many thousand rows travel.
    size = proposals.shape[1]
    cheapest = proposals.nan_to_num(torch.inf).topk(min(targets, size), dim=1, largest=False).indices  # [B, N, N]
    wanted = torch.zeros_like(proposals[..., 0]).scatter_(1, cheapest.flatten(1), 1.0)  # [B, S]
    rows = wanted.topk(min(size, targets * targets), dim=1).indices  # [B, R], filled up with others
    few = proposals.gather(1, rows.unsqueeze(-1).expand(-1, -1, targets))  # [B, R, N]

    high = max(count, few.shape[1])
    padded = [F.pad(queries.flatten(0, 1), (0, 0, 0, high - count), value=torch.inf)]
    padded.append(F.pad(few, (0, 0, 0, high - few.shape[1]), value=torch.inf))
    matched = match_hungarian(torch.cat(padded), valid.repeat(layers + 1, 1))  # [(L + 1) * B, high]
    of_queries, of_rows = matched[: -len(valid), :count], matched[-len(valid) :, : rows.shape[1]]
    of_proposals = torch.full(proposals.shape[:2], -1, device=valid.device).scatter_(1, rows, of_rows)
    return of_queries.view(queries.shape[:3]), of_proposals


def _giou_matrix(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU of every pair: xyxy [..., B, Q, 4] and [B, N, 4] -> [..., B, Q, N]."""
    ax1, ay1, ax2, ay2 = a.unsqueeze(-2).unbind(-1)  # [..., B, Q, 1]
    bx1, by1, bx2, by2 = b.unsqueeze(-3).unbind(-1)  # [B, 1, N]
    across = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    inter = across * (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - inter
    hull = (torch.maximum(ax2, bx2) - torch.minimum(ax1, bx1)) * (torch.maximum(ay2, by2) - torch.minimum(ay1, by1))
    return inter / union - (hull - union) / hull
