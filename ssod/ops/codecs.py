"""Box parametrisations: what D numbers per candidate mean, and the loss that trains them.

A codec is stateless. Detectors ask it for `dim`, hand its codes over raw, and never look inside them.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ssod.ops.boxes import centers, distances, giou_loss, ordered
from ssod.ops.host import on_device
from ssod.ops.losses import weighted_sum

MAX_LOG_SCALE = math.log(1000 / 16)  # a box grows at most 62.5 times: keeps exp() finite
MAX_LOG_VARIANCE = 10.0  # either way: e^10 of a loss is more than any gradient survives
CORNER_UNIT = 0.1  # of the anchor's side: then errors and variances of learned boxes are of the order of 1


class Codec(Protocol):
    """dim: numbers per box, D. Leading shapes [...] are free, anchors broadcast against codes."""

    dim: int

    def encode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """boxes [..., 4] xyxy px relative to anchors [..., 4] -> codes [..., D]."""

    def decode(self, codes: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor | None]:
        """codes [..., D] -> boxes [..., 4] xyxy px, not clipped, and quality [...] in 0 .. 1 or None."""

    def loss(
        self,
        codes: Tensor,
        anchors: Tensor,
        boxes: Tensor,
        weight: Tensor | None = None,
        learn_quality: bool = True,
    ) -> Tensor:
        """Sum over M candidates: codes [M, D], anchors [M, 4], target boxes [M, 4], weight [M] or None = 1.

        learn_quality  False: no gradient reaches numbers that only say how certain the box is. A codec without such
                       numbers (deltas, distances, or buckets, whose certainty is what finds the side) has one loss.
        """

    def start(self) -> Tensor:
        """Codes [D] that an untrained head should give, that is the bias of the layer that predicts them."""


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
        return torch.cat([shift, scale], dim=-1) * on_device(self.weights, shift.device, shift.dtype)

    def decode(self, codes: Tensor, anchors: Tensor) -> tuple[Tensor, None]:
        size = anchors[..., 2:] - anchors[..., :2]
        codes = codes / on_device(self.weights, codes.device, codes.dtype)
        center = centers(anchors) + codes[..., :2] * size
        half = codes[..., 2:].clamp(max=MAX_LOG_SCALE).exp() * size / 2
        return torch.cat([center - half, center + half], dim=-1), None

    def loss(
        self,
        codes: Tensor,
        anchors: Tensor,
        boxes: Tensor,
        weight: Tensor | None = None,
        learn_quality: bool = True,
    ) -> Tensor:
        error = F.smooth_l1_loss(codes, self.encode(boxes, anchors), beta=self.beta, reduction="none")
        return weighted_sum(error.sum(dim=-1), weight)

    def start(self) -> Tensor:
        """First boxes = the anchors."""
        return torch.zeros(self.dim)


class DeltaGIoUCodec(L1Codec):
    """The codes of `L1Codec`, trained by the GIoU of the boxes they mean (Rezatofighi et al., 2019).

    What `giou` means where the centre of an anchor may lie outside the box: on anchors and proposals.
    """

    def loss(
        self,
        codes: Tensor,
        anchors: Tensor,
        boxes: Tensor,
        weight: Tensor | None = None,
        learn_quality: bool = True,
    ) -> Tensor:
        return weighted_sum(giou_loss(self.decode(codes, anchors)[0], boxes), weight)


class GIoUCodec:
    """Distances from the anchor's centre to the left, top, right and bottom side, in anchor sizes, with GIoU loss.

    Tian et al., FCOS, 2019, Eq. 1; a negative distance counts as 0, so the centre stays inside the box.
    """

    dim = 4

    def encode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        size = anchors[..., 2:] - anchors[..., :2]
        return distances(boxes, centers(anchors)) / torch.cat([size, size], dim=-1)

    def decode(self, codes: Tensor, anchors: Tensor) -> tuple[Tensor, None]:
        point, size = centers(anchors), anchors[..., 2:] - anchors[..., :2]
        distances = codes.clamp(min=0)
        return torch.cat([point - distances[..., :2] * size, point + distances[..., 2:] * size], dim=-1), None

    def loss(
        self,
        codes: Tensor,
        anchors: Tensor,
        boxes: Tensor,
        weight: Tensor | None = None,
        learn_quality: bool = True,
    ) -> Tensor:
        return weighted_sum(giou_loss(self.decode(codes, anchors)[0], boxes), weight)

    def start(self) -> Tensor:
        """One anchor size a side: around 0 half of the distances are negative and get no gradient."""
        return torch.ones(self.dim)


class GaussianCodec:
    """Shifts of the four sides, each with the variance of its error: a localisation quality comes with every box.

    D = 8: shifts of (x1, y1, x2, y2) in tenths of the anchor's width and height, then their log variances s.
    LER/PRC, Eq. 5-10; the parametrisation by sides is that of He et al., "Bounding Box Regression with Uncertainty",
    2019, Eq. 1.
    """

    dim = 8

    def encode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """Shifts of boxes that are certain: the smallest variance there is."""
        shifts = (boxes - anchors) / self._unit(anchors)
        return torch.cat([shifts, torch.full_like(shifts, -MAX_LOG_VARIANCE)], dim=-1)

    def decode(self, codes: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes [..., 4] xyxy px, and s_loc [...] = 1 - sigmoid(mean of the four variances), in (0, 0.5] (Eq. 5)."""
        shifts, log_variance = self._split(codes)
        quality = (-log_variance.exp().mean(dim=-1)).sigmoid()
        return ordered(anchors + shifts * self._unit(anchors)), quality

    def loss(
        self,
        codes: Tensor,
        anchors: Tensor,
        boxes: Tensor,
        weight: Tensor | None = None,
        learn_quality: bool = True,
    ) -> Tensor:
        """Eq. 8-10: smooth-L1 of each shift times exp(-s), plus s / 2; summed over sides and candidates.

        Without `learn_quality` Eq. 11: smooth-L1 of the shifts alone, no gradient for the variances.
        """
        errors = self._errors(codes, anchors, boxes)  # [M, 4]
        if not learn_quality:
            return weighted_sum(errors.sum(dim=-1), weight)
        log_variance = self._split(codes)[1]
        attenuated = (-log_variance).exp() * errors + log_variance / 2
        return weighted_sum(attenuated.sum(dim=-1), weight)

    def start(self) -> Tensor:
        """First boxes = the anchors, of variance 1: the loss starts as plain smooth-L1."""
        return torch.zeros(self.dim)

    def _errors(self, codes: Tensor, anchors: Tensor, boxes: Tensor) -> Tensor:
        wanted = (boxes - anchors) / self._unit(anchors)
        return F.smooth_l1_loss(self._split(codes)[0], wanted, reduction="none")  # beta 1: where Eq. 8 meets Eq. 10

    def _split(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        return codes[..., :4], codes[..., 4:].clamp(-MAX_LOG_VARIANCE, MAX_LOG_VARIANCE)

    def _unit(self, anchors: Tensor) -> Tensor:
        size = anchors[..., 2:] - anchors[..., :2]
        return CORNER_UNIT * torch.cat([size, size], dim=-1)
