"""Dense distillation: for every candidate the student learns the teacher's probabilities and boxes, with no threshold.

L_cls = sum_i w_i BCE(p_S, p_T) / sum_i w_i over classes, L_loc = sum_i w_i (1 - IoU(b_S, b_T)) / sum_i w_i, with
w_i = max_c p_T(i, c): candidates count as much as the teacher sees an object there, and none is declared background.
Where classes exclude each other (a region head) KL over the classes and the background takes the place of the BCE.

Any strategy with a teacher may use it. Letters: M candidates of the batch, F rows of them, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssod import dist
from ssod.detectors.base import Detector, full_precision
from ssod.ops.boxes import iou, nms
from ssod.ops.distill import foreground_weight, heavy, soft_bce, soft_kl
from ssod.ops.host import true_rows
from ssod.strategies.foreground import JUDGED
from ssod.strategies.pairing import Paired, pair

NEGLECT = 0.01  # share of all weight whose boxes are not compared: L_loc, a mean in 0 .. 1, is at most this too small
LEAST = 1e-6  # keeps the mean finite where no candidate has any weight
OBJECT = 0.5  # probability from which the log counts a candidate as an object of the teacher
COUNTED = 1000  # candidates an image that the log's count of boxes looks at


@dataclass(frozen=True)
class Distillation:
    """The losses of one view of the unlabelled images.

    box_weight  factor of L_loc
    reweight    False: w = 1 for every candidate
    """

    box_weight: float = 1.0
    reweight: bool = True

    def __call__(
        self, student: Detector, output: Any, teacher: Detector, seen: Any, matrices: Tensor | None
    ) -> dict[str, Tensor]:
        """The losses of `losses`, of all candidates that both raw outputs speak of: arguments as in `pair`.

        `output` may be that of half-size images (`features(..., shift=1)`): they are in the frame of the full size.
        """
        return self.losses(pair(student, output, teacher, seen, matrices))

    def losses(self, pairs: list[Paired]) -> dict[str, Tensor]:
        """Named scalars: "cls", "box" and, with a centerness, "centerness"; first stages' as "rpn_...", "encoder_...".

        Each is a mean over the candidates of all ranks, weighted by w. The gradient reaches the learner only.
        """
        found: dict[str, Tensor] = {}
        weights = [self._weight(p) for p in pairs]
        boxes = true_rows([heavy(weight, NEGLECT) for weight in weights])
        for p, weight, rows in zip(pairs, weights, boxes, strict=True):
            prefix = "" if p.stage in JUDGED else f"{p.stage}_"
            with full_precision(p.logits):
                found |= {f"{prefix}{name}": value for name, value in self._of_stage(p, weight, rows).items()}
        return found

    def _weight(self, p: Paired) -> Tensor:  # [M]
        weight = foreground_weight(p.target, p.exclusive)
        return weight if self.reweight else torch.ones_like(weight)

    def _of_stage(self, p: Paired, weight: Tensor, rows: Tensor) -> dict[str, Tensor]:
        """weight [M]; rows int64 [F], the candidates whose boxes are compared."""
        total = dist.shared(weight.sum(), LEAST)
        classes = soft_kl if p.exclusive else soft_bce
        found = {"cls": classes(p.logits, p.target, weight) / total}
        if p.quality is not None and p.target_quality is not None:
            centered = soft_bce(p.quality.unsqueeze(1), p.target_quality.unsqueeze(1), weight)
            found["centerness"] = self.box_weight * centered / total
        boxes, targets = p.boxes(rows)
        found["box"] = self.box_weight * (weight[rows] * (1 - iou(boxes, targets))).sum() / total
        return found


@torch.no_grad()
def statistics(pairs: list[Paired], batch: int, threshold: float, max_boxes: int) -> dict[str, Tensor | float]:
    """What the teacher's weights are like, for the log: of the last stage's candidates.

    distill/mean_weight     mean of w
    distill/object_share    0 .. 1, share of all weight that lies on candidates with w above 0.5
    distill/boxes_per_image boxes with w above 0.5 after class-wise NMS at `threshold`, at most `max_boxes` an image
    """
    p = next(p for p in pairs if p.stage in JUDGED)
    with full_precision(p.logits):
        weight = foreground_weight(p.target, p.exclusive)  # [M]
        best, rows = weight.topk(min(COUNTED * batch, len(weight)))
        rows = rows[best > OBJECT]
        classes = p.target[:, :-1] if p.exclusive else p.target
        group = p.image[rows] * classes.shape[1] + classes[rows].argmax(dim=1)
        kept = rows[nms(p.boxes(rows)[1], weight[rows], group, threshold)]
        every = torch.arange(batch, device=kept.device)
        boxes = (p.image[kept] == every[:, None]).sum(dim=1).clamp(max=max_boxes)  # [B]; bincount would wait twice
        return {
            "distill/mean_weight": weight.sum() / max(1, len(weight)),
            "distill/object_share": (weight * (weight > OBJECT)).sum() / weight.sum().clamp(min=LEAST),
            "distill/boxes_per_image": boxes.sum() / batch,
        }
