"""Localisation as classification: each side of a box is looked for in K intervals, then refined.

Li et al., "Rethinking Pseudo Labels for Semi-Supervised Object Detection" (RPL), 2022, Eq. 3-5. What that paper leaves
open follows Wang et al., "Side-Aware Boundary Localization" (SABL), 2020.

Letters: M candidates, K intervals a side, S = 4 sides (left, top, right, bottom).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ssod.ops.boxes import centers, ordered
from ssod.ops.losses import weighted_sum

CERTAIN = 10.0  # logit of an interval that `encode` is certain of: probability 0.99995
BETA = 0.1  # of an interval: where the refinement's smooth-L1 turns linear (SABL)


class BucketCodec:
    """Per side K logits, one an interval, and K refinements in interval widths: D = 8 K numbers, [2, 4, K].

    The segment of a side runs from the side of the candidate, scaled by `scale` around its centre, to that centre;
    interval 0 is the outermost. A true side that lies outside its segment is no target for that side.

    buckets  K >= 2
    scale    sigma >= 1: RPL's segments want 1.7 on proposals and 3.0 on the anchors of a dense head
    """

    def __init__(self, buckets: int = 30, scale: float = 1.7) -> None:
        self.buckets = buckets
        self.scale = scale
        self.dim = 8 * buckets

    def encode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """Codes of a head that is certain: they give the same boxes back, whatever side lies outside its segment."""
        place = self._place(boxes, anchors)  # [..., 4]
        offsets = place.unsqueeze(-1) - self._middles(place)  # [..., 4, K]
        logits = torch.full_like(offsets, -CERTAIN).scatter(-1, self._interval(place).unsqueeze(-1), CERTAIN)
        return torch.stack([logits, offsets], dim=-3).flatten(-3)

    def decode(self, codes: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes [..., 4] xyxy px, and their quality v [...] = mean over the sides of the best interval's probability.

        RPL, Eq. 4. The sides of a box that would come out inside out change places.
        """
        logits, offsets = self._split(codes)  # [..., 4, K] each
        best, interval = logits.max(dim=-1)  # [..., 4]
        place = interval + 0.5 + offsets.gather(-1, interval.unsqueeze(-1)).squeeze(-1)
        outer, step = self._segments(anchors)
        return ordered(outer + place * step), best.sigmoid().mean(dim=-1)

    def loss(
        self,
        codes: Tensor,
        anchors: Tensor,
        boxes: Tensor,
        weight: Tensor | None = None,
        learn_quality: bool = True,
    ) -> Tensor:
        """RPL, Eq. 5, summed over candidates: codes [M, D], anchors and boxes [M, 4], weight [M] or None = 1.

        Binary cross entropy over all K intervals: Eq. 3 as printed has only the positive term, which a head that says
        yes everywhere minimises. As in SABL the neighbour whose middle is within one width of the side is neither
        right nor wrong, and is refined too: it may well win.
        """
        logits, offsets = self._split(codes)  # [M, 4, K]
        place = self._place(boxes, anchors)  # [M, 4]
        apart = place.unsqueeze(-1) - self._middles(place)  # [M, 4, K]
        right = torch.zeros_like(logits).scatter(-1, self._interval(place).unsqueeze(-1), 1.0)
        near = apart.abs() < 1

        judged = (right == 1) | ~near
        classification = F.binary_cross_entropy_with_logits(logits, right, reduction="none") * judged
        refined = (right == 1) | near
        refinement = F.smooth_l1_loss(offsets, apart, beta=BETA, reduction="none") * refined
        inside = (place >= 0) & (place <= self.buckets)  # [M, 4]
        return weighted_sum(((classification + refinement).sum(dim=-1) * inside).sum(dim=-1), weight)

    def start(self) -> Tensor:
        """First codes [D]: all intervals improbable but the candidate's own, at 0.5; first boxes are the candidates."""
        own = self.buckets * (self.scale - 1) / self.scale  # where a candidate's own sides lie, in intervals
        interval = min(int(own), self.buckets - 1)
        codes = torch.zeros(2, 4, self.buckets)
        codes[0] = -math.log(self.buckets)
        codes[0, :, interval] = 0
        codes[1, :, interval] = own - interval - 0.5
        return codes.flatten()

    def _split(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        logits, offsets = codes.unflatten(-1, (2, 4, self.buckets)).unbind(-3)
        return logits, offsets

    def _segments(self, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """Outer ends [..., 4] of the segments, and the way [..., 4] from one interval to the next, inwards."""
        center = centers(anchors)
        reach = (anchors[..., 2:] - anchors[..., :2]) * (self.scale / 2)
        outer = torch.cat([center - reach, center + reach], dim=-1)
        return outer, torch.cat([reach, -reach], dim=-1) / self.buckets

    def _place(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """Where the sides of boxes [..., 4] lie on their segments: 0 = outer end, K = centre of the candidate."""
        outer, step = self._segments(anchors)
        return (boxes - outer) / step

    def _interval(self, place: Tensor) -> Tensor:
        return place.floor().long().clamp(0, self.buckets - 1)

    def _middles(self, like: Tensor) -> Tensor:
        return torch.arange(self.buckets, device=like.device) + 0.5
