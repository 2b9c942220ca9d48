"""Soft Teacher (Xu et al., ICCV 2021): backgrounds weighted by the teacher's doubt, boxes chosen by jittering them.

Classes and boxes learn from different pseudo boxes, each by its own measure: the score for classes and the RPN; for
boxes, how little the teacher's answer moves when its question does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ssod import dist
from ssod.detectors.base import Detector, HasRegions
from ssod.errors import UserError
from ssod.strategies.base import Plan, StepOutput
from ssod.strategies.reliability import WeakView, region_background
from ssod.strategies.teacher_student import TeacherStudent, TeacherStudentOptions
from ssod.strategies.verdicts import FLOOR, Verdict, compared, judged, scores
from ssod.structures import Candidates, Instances, SemiBatch, View, Weigh, Weights


class SoftTeacher(TeacherStudent):
    class Options(TeacherStudentOptions):
        candidates: float = Field(0.5, ge=0, le=1, description="lowest score of a box that is looked at at all")
        tau: float = Field(0.9, ge=0, le=1, description="lowest score of a box that teaches classes and the RPN")
        weight: float = Field(4.0, ge=0, description="w_u, weight of the unlabelled images' loss")
        nms: float = Field(0.5, gt=0, le=1, description="NMS threshold of the teacher's boxes")
        soft_background: bool = Field(
            True, description="background candidates weighted by the teacher's background probability"
        )
        jitters: int = Field(
            10, ge=0, description="jittered copies that choose the boxes to learn from; 0 = choose by the score tau"
        )
        jitter: float = Field(0.06, gt=0, description="standard deviation of a copy's sides, as a share of the box")
        spread: float = Field(0.02, gt=0, description="largest spread of the refined copies, as a share of the box")

    options: Options
    needs = (HasRegions,)
    teacher: Any  # a Detector with HasRegions

    def __init__(self, student: Detector, options: Options, plan: Plan) -> None:
        super().__init__(student, options, plan)
        if options.jitters == 1:
            raise UserError("strategy.jitters=1 has no spread; give at least 2 copies, or 0 to choose boxes by score.")

    def unsupervised(self, batch: SemiBatch, step: int, output: Any) -> StepOutput:
        assert batch.weak is not None
        assert batch.strong is not None
        seen = self.teacher_output(batch.weak)
        found = self.decode(seen, self.lowest())
        marked = self.mark_steady(seen, found)
        sure = [scores(m) > self.options.tau for m in marked]
        both = self.chosen_to_strong(batch, marked, sure, [_steady(m) for m in marked])
        classes, boxes = ([_bare(t) for t in targets] for targets in both)

        # Two sets of targets, so the candidates are assigned and sampled twice, as in the authors' code.
        losses = self.student.loss(output, classes, self.weigh_classes(WeakView.of(batch, seen)))
        for name, value in self.student.loss(output, boxes, weigh_boxes).items():
            losses[name] = losses[name] + value
        losses |= self.across_scales(batch, seen)
        out = self.step_output(losses, step, found, classes, self.options.tau)
        out.stats["pseudo/boxes_per_image"] = sum(map(len, boxes)) / len(boxes)
        return out

    def lowest(self) -> float:
        return min(self.options.candidates, self.options.tau)

    def detections(self, view: View, by: Detector) -> list[Instances]:
        """Steady ones have a `box_weight` of 1; which are depends on copies that are drawn alike at every call."""
        seen = by.head(by.features(view.images, view.sizes))
        conf = min(FLOOR, self.lowest())
        every = by.pseudo(seen, conf=conf, iou=self.options.nms, max_det=self.options.max_boxes)
        certain = [f[scores(f) > self.lowest()] for f in every]  # the first ones
        generator = torch.Generator(view.images.device).manual_seed(0)
        steady = [_steady(m) for m in self.mark_steady(seen, certain, by, generator)]
        rest = [f.boxes.new_zeros(len(f) - len(s)) for f, s in zip(every, steady, strict=True)]
        return [replace(f, box_weight=torch.cat([s, r])) for f, s, r in zip(every, steady, rest, strict=True)]

    def judge(self, found: list[Instances]) -> list[Verdict]:
        """A box may teach classes, places or both, and is kept where it teaches either."""
        tau = self.thresholds_in_force()
        verdicts = []
        for f in found:
            sure, steady = scores(f) > self.options.tau, _steady(f)
            kept = sure | steady
            targets = replace(_bare(f[kept]), cls_weight=sure[kept].float(), box_weight=steady[kept].float())
            reasons = compared(f, tau[f.labels], sure, "tau")
            for i, (s, b, score) in enumerate(zip(sure.tolist(), steady.tolist(), scores(f).tolist(), strict=True)):
                reasons[i] += self._said(s, b, score)
            verdicts.append(judged(f, kept, targets, reasons, tau))
        return verdicts

    def _said(self, sure: bool, steady: bool, score: float) -> str:
        """The end of the sentence on a box: what it teaches, and what of its jittered copies."""
        if not self.options.jitters:
            return ": teaches classes and places" if sure else ": background"
        if score <= self.lowest():
            return f": background; up to {self.lowest():.2f} no box is jittered"
        classes = "teaches classes" if sure else "background to classes"
        how = "within" if steady else "beyond"
        boxes = "teaches its place" if steady else "does not teach its place"
        return f": {classes}; the spread of its jittered copies is {how} {self.options.spread:g}: {boxes}"

    @torch.no_grad()
    def mark_steady(
        self, seen: Any, found: list[Instances], network: Any = None, generator: torch.Generator | None = None
    ) -> list[Instances]:
        """Boxes with a `box_weight` of 1 where boxes may be learned from them and 0 elsewhere.

        network, generator  what refines the copies, and draws them, in the place of the teacher and the global one
        """
        if not self.options.jitters:
            return [replace(f, box_weight=(scores(f) > self.options.tau).float()) for f in found]
        spreads = self.spreads(seen, found, network, generator)
        return [replace(f, box_weight=(s < self.options.spread).float()) for f, s in zip(found, spreads, strict=True)]

    @torch.no_grad()
    def spreads(
        self, seen: Any, found: list[Instances], network: Any = None, generator: torch.Generator | None = None
    ) -> list[Tensor]:
        """How much the teacher's answers to jittered copies of each box differ: [N] of each image, in box sides.

        The standard deviation of each side over the refined copies, divided by the mean width or height of these (at
        least 1 px), mean over the four sides (section 3.3, and the authors' code).
        """
        times = self.options.jitters
        copies = [jittered(f.boxes, times, self.options.jitter, generator) for f in found]  # [times, N, 4]
        labels = [f.labels.repeat(times) for f in found]
        if not sum(map(len, found)):
            return [f.boxes.new_zeros(0) for f in found]
        refined = (network or self.teacher).refine(seen, [c.flatten(0, 1) for c in copies], labels)
        return [_spread(r.boxes.view(times, -1, 4)) for r in refined]

    def weigh_classes(self, view: WeakView) -> Weigh:
        """Foreground 1, background the teacher's background probability; the loss is sum(w CE) / sum(w)."""

        def weigh(candidates: Candidates) -> Weights:
            if candidates.stage == "rpn":
                return Weights()
            foreground = candidates.matched >= 0
            weight = foreground.float()
            if self.options.soft_background:
                weight = weight + region_background(self.teacher, view, candidates, ~foreground)
            else:
                weight = torch.ones_like(weight)
            scale = candidates.divisor / dist.shared(weight.sum())
            return Weights(cls=weight * scale, box=torch.zeros_like(weight))

        return weigh

    def thresholds_in_force(self) -> Tensor:
        """Of the boxes that teach classes; those that teach boxes are chosen by jittering."""
        return torch.full_like(self.label_counts, self.options.tau)


def weigh_boxes(candidates: Candidates) -> Weights:
    """The regions' boxes and nothing else."""
    none = candidates.boxes.new_zeros(len(candidates.labels))
    return Weights(cls=none, box=none if candidates.stage == "rpn" else None, learn_classes=False)


def jittered(boxes: Tensor, times: int, jitter: float, generator: torch.Generator | None = None) -> Tensor:
    """Copies of boxes [N, 4] whose four sides moved by normal noise of `jitter` times the width or height (at least
    1 px): [times, N, 4]."""
    side = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1).repeat(1, 2)  # [N, 4] w, h, w, h
    return boxes + torch.randn(times, *boxes.shape, device=boxes.device, generator=generator) * side * jitter


def _spread(copies: Tensor) -> Tensor:
    """[times, N, 4] -> [N]."""
    mean = copies.sum(dim=0) / len(copies)
    # The standard deviation written out: `std` warns of an image without boxes.
    deviation = ((copies - mean).square().sum(dim=0) / (len(copies) - 1)).sqrt()
    side = (mean[:, 2:] - mean[:, :2]).clamp(min=1).repeat(1, 2)  # [N, 4]
    return (deviation / side).mean(dim=1)


def _steady(instances: Instances) -> Tensor:
    assert instances.box_weight is not None
    return instances.box_weight > 0


def _bare(instances: Instances) -> Instances:
    return Instances(instances.boxes, instances.labels)
