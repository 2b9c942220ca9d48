"""The loss of detectors whose queries are matched one-to-one with the targets (Carion et al., DETR, 2020, Eq. 2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ssod import dist
from ssod.detectors.base import candidate_weights
from ssod.ops.assign import PaddedTargets, pad_targets
from ssod.ops.boxes import giou_loss
from ssod.ops.host import true_rows
from ssod.ops.losses import focal_loss, weighted_sum
from ssod.ops.set_matching import CostWeights, match_queries, pair_costs, to_centers, to_corners
from ssod.structures import Candidates, Instances, Pyramid, SlotOutput, Weigh


def valid_extent(pyramid: Pyramid) -> Tensor:
    """(w, h, w, h) of each image's valid area in pixels, which boxes are fractions of: float32 [B, 4]."""
    return pyramid.sizes.flip(-1).repeat(1, 2).float()


@dataclass
class SetLoss:
    """Focal, L1 and GIoU loss of every decoder layer and of the encoder's proposals.

    cost  how much class, L1 distance and GIoU count in the matching
    coef  what the three losses are multiplied by
    aux, encoder  what the losses of the earlier layers and of the proposals are multiplied by on top
    alpha  of the focal loss
    """

    num_classes: int
    cost: CostWeights
    coef: CostWeights
    aux: float
    encoder: float
    alpha: float

    def __call__(self, output: SlotOutput, targets: list[Instances], weigh: Weigh | None) -> dict[str, Tensor]:
        """Named scalars: "cls", "l1" and "giou" of the last layer, "aux", "encoder"; see the detector's `loss`."""
        padded = pad_targets(targets)
        wanted = to_centers(padded.boxes / valid_extent(output.pyramid)[:, None])  # [B, N, 4]
        queries = pair_costs(output.logits, output.boxes, padded.labels, wanted, self.cost)  # [L, B, Q, N]
        proposals = None
        if output.dense is not None:
            cells = output.dense.codes.sigmoid()  # [B, S, 4]
            one_class = torch.zeros_like(padded.labels)
            proposals = pair_costs(output.dense.logits, cells, one_class, wanted, self.cost)  # [B, S, N]
        matched, found = match_queries(queries, proposals, padded.valid)

        of_stage = {"query": matched[-1:], "aux": matched[:-1]} | ({} if found is None else {"encoder": found[None]})
        foreground = dict(zip(of_stage, true_rows([(m >= 0).flatten() for m in of_stage.values()]), strict=True))

        def terms(logits: Tensor, boxes: Tensor, stage: str) -> dict[str, Tensor]:
            target, fg = of_stage[stage], foreground[stage]
            return self._terms(logits, boxes, target, fg, stage, wanted, padded, output.pyramid, weigh)

        losses = terms(output.logits[-1:], output.boxes[-1:], "query")
        if len(output.logits) > 1:
            earlier = terms(output.logits[:-1], output.boxes[:-1], "aux")
            losses["aux"] = self.aux * torch.stack(list(earlier.values())).sum()
        if output.dense is not None and found is not None:
            first = terms(output.dense.logits[None], cells[None], "encoder")
            losses["encoder"] = self.encoder * torch.stack(list(first.values())).sum()
        return losses

    def _terms(
        self,
        logits: Tensor,
        boxes: Tensor,
        matched: Tensor,
        fg: Tensor,
        stage: str,
        wanted: Tensor,
        padded: PaddedTargets,
        pyramid: Pyramid,
        weigh: Weigh | None,
    ) -> dict[str, Tensor]:
        """Losses of G layers: logits [G, B, Q, K], boxes [G, B, Q, 4], matched [G, B, Q], fg int64 [F] where
        that is a target, wanted [B, N, 4]."""
        image = torch.arange(matched.shape[1], device=matched.device)[:, None].expand(matched.shape).flatten()  # [M]
        flat = boxes.flatten(0, 2).float()  # [M, 4]
        corners = to_corners(flat) * valid_extent(pyramid)[image]
        target = matched.flatten()
        labels = padded.labels[image, target.clamp(min=0)].where(target >= 0, self.num_classes)
        count = dist.shared(padded.valid.sum())
        candidates = Candidates(corners.detach(), image, labels, target, stage, count)
        weights = candidate_weights(candidates, padded, weigh)

        # Proposals are objects or not: the first of their logits says so.
        classes = labels if stage != "encoder" else torch.zeros_like(labels).where(target >= 0, self.num_classes)
        focal = focal_loss(logits.flatten(0, 2), classes, weights.cls, self.alpha, foreground=fg)

        own = image[fg], target[fg]
        distance = (flat[fg] - wanted[own]).abs().sum(dim=-1)
        # The GIoU does not care about the scale of an axis; in pixels no box is small against its epsilon.
        overlap = giou_loss(corners[fg], padded.boxes[own])
        box_weight = None if weights.box is None else weights.box[fg]
        return {
            "cls": self.coef.cls * focal / count,
            "l1": self.coef.l1 * weighted_sum(distance, box_weight) / count,
            "giou": self.coef.giou * weighted_sum(overlap, box_weight) / count,
        }
