"""The first stage of Faster R-CNN: its output, and the regions that it proposes (Ren et al., 2015, section 3).

Letters: B images, P anchors of one image over all levels, T of them looked at, R regions of one image.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from ssod.ops.boxes import clip, not_smaller
from ssod.ops.codecs import Codec
from ssod.ops.dense import codes_of
from ssod.ops.fixed import best_of, keep_mask, take_boxes
from ssod.ops.suppression import nms_levels
from ssod.structures import DenseOutput

NO_REGION = -1e30  # a logit that no anchor has
SMALLEST = 1e-3  # pixels; narrower boxes are no regions


@dataclass
class RpnOutput(DenseOutput):
    """Objectness logits [B, P, 1] and codes of all anchors.

    proposed  what was proposed by it, by the limits asked for: strategies ask the same output more than once
    whole     where this is a piece of an output, that output and the first of its images that are here
    """

    proposed: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict)
    whole: tuple[RpnOutput, int] | None = None

    def split(self, counts: list[int]) -> list[DenseOutput]:
        pieces = zip(super().split(counts), accumulate(counts, initial=0), strict=False)
        return [replace(piece, proposed={}, whole=(self, start)) for piece, start in pieces]  # type: ignore[call-arg]


@dataclass(frozen=True)
class Proposer:
    """codec: what the codes mean; nms: IoU above which a region suppresses another of its level."""

    codec: Codec
    nms: float

    @torch.no_grad()
    def __call__(self, output: DenseOutput, pre_nms: int, post_nms: int) -> list[Tensor]:
        """The best regions of each image: B tensors [R, 4] xyxy pixels, by descending objectness, no gradient.

        pre_nms   anchors of each level that enter the NMS
        post_nms  most regions of an image
        """
        assert isinstance(output, RpnOutput)
        limits = pre_nms, post_nms
        if limits not in output.proposed:
            if output.whole is not None and output.logits.device.type != "cpu":
                # A GPU is waited for once for all pieces.
                whole, start = output.whole
                output.proposed[limits] = self(whole, *limits)[start : start + len(output.logits)]
            else:
                output.proposed[limits] = self._find(output, *limits)
        return output.proposed[limits]

    def _find(self, output: DenseOutput, pre_nms: int, post_nms: int) -> list[Tensor]:
        scores = output.logits.squeeze(-1).float()  # [B, P]
        best, index = [], []
        for span in output.spans.values():
            value, where = scores[:, span].topk(min(pre_nms, span.stop - span.start), dim=1)
            best.append(value)
            index.append(where + span.start)
        score, anchor = torch.cat(best, dim=1), torch.cat(index, dim=1)  # [B, T]
        codes = output.codes.float().gather(1, anchor.unsqueeze(-1).expand(-1, -1, self.codec.dim))
        boxes, _ = self.codec.decode(codes, output.anchors[anchor])
        boxes = clip(boxes, output.pyramid.sizes[:, None])
        lengths = [b.shape[1] for b in best]
        kept = nms_levels(boxes, score, lengths, not_smaller(boxes, SMALLEST), self.nms, post_nms)
        return [boxes[b, keep] for b, keep in enumerate(kept)]

    def fixed(self, output: DenseOutput, pre_nms: int, post_nms: int) -> tuple[Tensor, Tensor]:
        """The same filled up to one number, as a graph wants it: [B, R, 4], and which of them are real, bool [B, R]."""
        boxes, scores = [], []
        for span in output.spans.values():
            score, anchor = best_of(output.logits[:, span, 0].float(), pre_nms)  # [B, T]
            codes = codes_of(output.codes[:, span], anchor)
            box = clip(self.codec.decode(codes, output.anchors[span][anchor])[0], output.pyramid.sizes[:, None])
            score = score.where(not_smaller(box, SMALLEST), NO_REGION)
            keep = keep_mask(box, score, torch.zeros_like(anchor), 1, self.nms)  # level by level
            boxes.append(box)
            scores.append(score.where(keep, NO_REGION))
        best, index = best_of(torch.cat(scores, dim=1), post_nms)
        return take_boxes(torch.cat(boxes, dim=1), index), best > NO_REGION
