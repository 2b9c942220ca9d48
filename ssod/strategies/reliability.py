"""How reliable the teacher finds what the student's candidates are assigned: LER/PRC, Eq. 12 and 13, on any detector.

Every judge is asked about candidates of the strong view and answers from the teacher's raw output on the weak view of
the same images: a foreground candidate is reliable where the teacher sees an object (and knows where its sides are), a
background candidate where it sees none.

Letters: B images, M candidates of the batch, P dense candidates of one image, Q queries, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssod.detectors.base import Detector, HasDense, HasRegions, HasSlots, full_precision
from ssod.detectors.set_loss import valid_extent
from ssod.ops.boxes import clip, iou_matrix
from ssod.ops.host import rows_by_owner
from ssod.ops.places import same_place
from ssod.ops.set_matching import to_corners
from ssod.ops.views import between, map_boxes, of_images
from ssod.structures import Candidates, DenseOutput, Instances, SemiBatch

Reliability = Callable[[Candidates], Tensor]  # [M] in 0 .. 1
SAME_OBJECT = 0.5  # IoU from which a query of the teacher is the pseudo box itself


@dataclass(frozen=True)
class WeakView:
    """What the teacher saw: its raw output, and the way from the strong view's pixels to the weak view's."""

    output: Any
    to_weak: Tensor  # float64 [B, 3, 3]
    sizes: Tensor  # int64 [B, 2] (h, w)

    @staticmethod
    def of(batch: SemiBatch, output: Any) -> WeakView:
        assert batch.weak is not None
        assert batch.strong is not None
        return WeakView(output, between(batch.strong.matrices, batch.weak.matrices), batch.weak.sizes)

    def mapped(self, candidates: Candidates, which: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Of each image the candidates chosen by a mask [M]: their rows, int64 [R], and their boxes in the weak view,
        clipped to it, [R, 4]."""
        ((rows, counts),) = rows_by_owner([which], candidates.image, len(self.to_weak))
        image = candidates.image[rows]
        boxes = clip(map_boxes(candidates.boxes[rows], of_images(self.to_weak, image)), self.sizes[image])
        return list(rows.split(counts)), list(boxes.split(counts))


@torch.no_grad()
def region_background(teacher: HasRegions, view: WeakView, candidates: Candidates, which: Tensor) -> Tensor:
    """Probability that the teacher's region head gives the background at the chosen candidates (Eq. 13), 0 at others:
    which bool [M] -> [M]."""
    out = candidates.boxes.new_zeros(len(which))
    rows, boxes = view.mapped(candidates, which)
    if len(torch.cat(rows)):
        out[torch.cat(rows)] = torch.cat(teacher.classify(view.output, boxes))[:, -1]
    return out


@torch.no_grad()
def region_reliability(teacher: HasRegions, view: WeakView, candidates: Candidates) -> Tensor:
    """Eq. 12 for foreground candidates, max_c p_T(c) * s_loc_T, and Eq. 13 for the others, p_T(background): [M]."""
    by_image, boxes = view.mapped(candidates, torch.ones_like(candidates.image, dtype=torch.bool))
    rows, said = torch.cat(by_image), teacher.read(view.output, boxes)
    assert said.quality is not None
    probability = said.logits.softmax(dim=1)  # [M, K + 1]
    is_object = probability.gather(1, said.labels.unsqueeze(1)).squeeze(1) * said.quality
    return torch.zeros_like(is_object).index_copy(
        0, rows, is_object.where(candidates.matched[rows] >= 0, probability[:, -1])
    )


@torch.no_grad()
def dense_reliability(teacher: HasDense, view: WeakView, candidates: Candidates, seen: DenseOutput) -> Tensor:
    """The same from the teacher's class map: p_T and s_loc_T of its candidate at the same place, [M].

    seen  the student's dense output, whose B * P candidates are asked about in order
    p_T(background) is 1 - max_c p_T(c).
    """
    dense = teacher.dense(view.output)
    place = same_place(seen, dense, view.to_weak)  # [B, P]
    with full_precision(dense.logits):
        probability = dense.logits.float().amax(dim=-1).sigmoid().gather(1, place).flatten()  # [M]
        foreground = (candidates.matched >= 0).nonzero().squeeze(1)  # [F]
        image, there = candidates.image[foreground], place.flatten()[foreground]
        _, quality = teacher.codec.decode(dense.codes[image, there].float(), dense.anchors[there])
        assert quality is not None
        out = 1 - probability
        out[foreground] = probability[foreground] * quality
        return out


@torch.no_grad()
def query_reliability(teacher: HasSlots, view: WeakView, candidates: Candidates, pseudo: list[Instances]) -> Tensor:
    """The same from the teacher's queries, which have no place of their own but a box: [M].

    A foreground candidate counts as much as a query of the teacher is an object and lies where it does, max_q p_q IoU.
    A background candidate counts 1 - max_q p_q IoU over the queries that are no pseudo box: near a pseudo box
    one-to-one matching needs its negatives, elsewhere an object seen by the teacher makes the background doubtful.

    pseudo  the pseudo boxes of each image in the weak view's pixels
    """
    slots = teacher.slots(view.output)
    score = slots.logits[-1].float().amax(dim=-1).sigmoid()  # [B, Q]
    boxes = to_corners(slots.boxes[-1].float()) * valid_extent(slots.pyramid)[:, None]  # [B, Q, 4]
    out = candidates.boxes.new_ones(len(candidates.labels))
    rows, places = view.mapped(candidates, torch.ones_like(candidates.image, dtype=torch.bool))
    for b, (own, place) in enumerate(zip(rows, places, strict=True)):
        claimed = (iou_matrix(boxes[b], pseudo[b].boxes) >= SAME_OBJECT).any(dim=1)  # [Q]
        agreement = iou_matrix(place, boxes[b]) * score[b]  # [R, Q]
        is_object = agreement.amax(dim=1)
        is_new = agreement.where(~claimed, 0.0).amax(dim=1)
        out[own] = is_object.where(candidates.matched[own] >= 0, 1 - is_new)
    return out


def judge(
    teacher: Detector, view: WeakView, student_output: Any, pseudo: list[Instances], student: Detector
) -> Reliability:
    """The reliability of candidates by what the detector offers: regions, queries or a dense map, in this order.

    student_output  the student's raw output on the strong view; pseudo: the pseudo boxes in the weak view
    """

    def of(candidates: Candidates) -> Tensor:
        if isinstance(teacher, HasRegions):
            return region_reliability(teacher, view, candidates)
        if isinstance(teacher, HasSlots):
            return query_reliability(teacher, view, candidates, pseudo)
        assert isinstance(teacher, HasDense)
        assert isinstance(student, HasDense)
        return dense_reliability(teacher, view, candidates, student.dense(student_output))

    return of
