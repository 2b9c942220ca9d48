"""SED: scale-equivalent distillation (Guo et al., "Scale-Equivalent Distillation for Semi-Supervised Object Detection",
2022).

The moving average of the student looks at the weak view. The student learns its soft predictions twice: from the
strong view (self-distillation), and from the strong view at half size against the teacher's full size (consistency
across scales). No threshold says what is background: each candidate weighs as much as the teacher sees an object.

`L = L_s + w_u (L_full + w_half L_half)`.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ssod.detectors.base import Detector
from ssod.strategies.base import Plan, StepOutput
from ssod.strategies.distillation import Distillation, statistics
from ssod.strategies.pairing import pair
from ssod.strategies.teacher_student import TeacherStudent, TeacherStudentOptions, to_weak
from ssod.structures import SemiBatch


class SED(TeacherStudent):
    class Options(TeacherStudentOptions):
        nms: float = Field(0.6, gt=0, le=1, description="NMS threshold of the teacher's boxes that the log counts")
        max_boxes: int = Field(100, ge=1, description="most boxes of one image that the log counts")
        scale_weight: float = Field(
            1.0,
            ge=0,
            description="weight of the half-size images' loss beside the full size's, which needs "
            "detector.half_scale=true; 0 = off",
        )
        box_weight: float = Field(1.0, ge=0, description="weight of the boxes' loss beside the classes'")
        reweight: bool = Field(
            True, description="candidates weigh as much as the teacher sees an object there; false: all alike"
        )

    options: Options
    unjudged = "sed learns from all candidates; no box is kept or dropped"

    def __init__(self, student: Detector, options: Options, plan: Plan) -> None:
        super().__init__(student, options, plan)
        self.distillation = Distillation(options.box_weight, options.reweight)

    def unsupervised(self, batch: SemiBatch, step: int, output: Any) -> StepOutput:
        assert batch.weak is not None
        assert batch.strong is not None
        seen = self.teacher_output(batch.weak)
        pairs = pair(self.student, output, self.teacher, seen, to_weak(batch))
        losses = self.distillation.losses(pairs) | self.across_scales(batch, seen)
        weight = self.options.weight * self.ramp(step)
        stats = statistics(pairs, len(batch.strong), self.options.nms, self.options.max_boxes)
        return StepOutput({name: weight * value for name, value in losses.items()}, stats | {"pseudo/weight": weight})
