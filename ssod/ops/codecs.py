"""Box parametrisations: what D numbers per candidate mean, and the loss that trains them.

A codec is stateless. Detectors ask it for `dim`, hand its codes over raw, and never look inside them.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ssod.ops.boxes import centers, giou_loss
from ssod.ops.losses import weighted_sum

MAX_LOG_SCALE = math.log(1000 / 16)  # a box grows at most 62.5 times: keeps exp() finite


class Codec(Protocol):
    """dim: numbers per box, D. Leading shapes [...] are free, anchors broadcast against codes."""

    dim: int

    def encode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """boxes [..., 4] xyxy px relative to anchors [..., 4] -> codes [..., D]."""

    def decode(self, codes: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor | None]:
        """codes [..., D] -> boxes [..., 4] xyxy px, not clipped, and quality [...] in 0 .. 1 or None."""

    def loss(self, codes: Tensor, anchors: Tensor, boxes: Tensor, weight: Tensor | None = None) -> Tensor:
        """Sum over M candidates: codes [M, D], anchors [M, 4], target boxes [M, 4], weight [M] or None = 1."""


class L1Codec:
    """Centre shift in anchor sizes and log scale (Girshick et al., R-CNN, 2014, appendix C), smooth-L1 loss.

    weights  multiply (dx, dy, dw, dh): (10, 10, 5, 5) for RoIs, (1, 1, 1, 1) for anchors
    beta     where the loss turns from quadratic to linear; 0 = plain L1
    """

    dim = 4

    def __init__(self, weights: tuple[float, float, float, float] = (1, 1, 1, 1), beta: float = 1 / 9) -> None:
        self.weights = weights
        self.beta = beta

    def encode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        size = anchors[..., 2:] - anchors[..., :2]
        shift = (centers(boxes) - centers(anchors)) / size
        scale = ((boxes[..., 2:] - boxes[..., :2]) / size).log()
        return torch.cat([shift, scale], dim=-1) * shift.new_tensor(self.weights)

    def decode(self, codes: Tensor, anchors: Tensor) -> tuple[Tensor, None]:
        size = anchors[..., 2:] - anchors[..., :2]
        codes = codes / codes.new_tensor(self.weights)
        center = centers(anchors) + codes[..., :2] * size
        half = codes[..., 2:].clamp(max=MAX_LOG_SCALE).exp() * size / 2
        return torch.cat([center - half, center + half], dim=-1), None

    def loss(self, codes: Tensor, anchors: Tensor, boxes: Tensor, weight: Tensor | None = None) -> Tensor:
        error = F.smooth_l1_loss(codes, self.encode(boxes, anchors), beta=self.beta, reduction="none")
        return weighted_sum(error.sum(dim=-1), weight)


class GIoUCodec:
    """Distances from the anchor's centre to the left, top, right and bottom side, in anchor sizes, with GIoU loss.

    Tian et al., FCOS, 2019, Eq. 1; a negative distance counts as 0, so the centre stays inside the box.
    """

    dim = 4

    def encode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        point, size = centers(anchors), anchors[..., 2:] - anchors[..., :2]
        return torch.cat([(point - boxes[..., :2]) / size, (boxes[..., 2:] - point) / size], dim=-1)

    def decode(self, codes: Tensor, anchors: Tensor) -> tuple[Tensor, None]:
        point, size = centers(anchors), anchors[..., 2:] - anchors[..., :2]
        distances = codes.clamp(min=0)
        return torch.cat([point - distances[..., :2] * size, point + distances[..., 2:] * size], dim=-1), None

    def loss(self, codes: Tensor, anchors: Tensor, boxes: Tensor, weight: Tensor | None = None) -> Tensor:
        return weighted_sum(giou_loss(self.decode(codes, anchors)[0], boxes), weight)
