"""Unbiased Teacher (Liu et al., ICLR 2021): hard pseudo boxes above one threshold, for classes only.

Its remedy against the imbalance of pseudo labels, a focal loss in place of cross-entropy, is the detector's:
`detector.roi_focal_gamma=1.5` of Faster R-CNN; the other detectors have one anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ssod.strategies.base import StepOutput
from ssod.strategies.teacher_student import TeacherStudent, TeacherStudentOptions
from ssod.strategies.verdicts import Verdict, compared, judged, scores
from ssod.structures import Instances, SemiBatch


class UnbiasedTeacher(TeacherStudent):
    class Options(TeacherStudentOptions):
        tau: float = Field(0.7, ge=0, le=1, description="score above which a box is a pseudo box")
        weight: float = Field(4.0, ge=0, description="w_u, weight of the unlabelled images' loss")
        nms: float = Field(0.5, gt=0, le=1, description="NMS threshold of the teacher's boxes, class by class")
        box_loss: bool = Field(False, description="learn boxes from pseudo boxes too; the paper does not")

    options: Options

    def unsupervised(self, batch: SemiBatch, step: int, output: Any) -> StepOutput:
        assert batch.weak is not None
        assert batch.strong is not None
        seen = self.teacher_output(batch.weak)
        found = self.decode(seen, self.lowest())
        targets = [self.as_targets(d) for d in self.to_strong(batch, found)]
        losses = self.student.loss(output, targets)
        losses |= self.across_scales(batch, seen)
        return self.step_output(losses, step, found, targets, self.options.tau)

    def lowest(self) -> float:
        return self.options.tau

    def judge(self, found: list[Instances]) -> list[Verdict]:
        tau = self.thresholds_in_force()
        verdicts = []
        for f in found:
            kept = scores(f) > self.lowest()
            reasons = compared(f, tau[f.labels], kept, "tau", below=": background")
            verdicts.append(judged(f, kept, self.as_targets(f[kept]), reasons, tau))
        return verdicts

    def as_targets(self, pseudo: Instances) -> Instances:
        box_weight = None if self.options.box_loss else pseudo.boxes.new_zeros(len(pseudo))
        return Instances(pseudo.boxes, pseudo.labels, box_weight=box_weight)

    def thresholds_in_force(self) -> Tensor:
        return torch.full_like(self.label_counts, self.options.tau)
