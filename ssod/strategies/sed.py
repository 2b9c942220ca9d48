"""SED: scale-equivalent distillation (Guo et al., "Scale-Equivalent Distillation for Semi-Supervised Object Detection",
2022).

The moving average of the student looks at the weak view. The student learns its soft predictions twice: from the
strong view (self-distillation), and from the strong view at half size against the teacher's full size (consistency
across scales). No threshold says what is background: each candidate weighs as much as the teacher sees an object.

`L = L_s + w_u (L_full + w_half L_half)`.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from ssod.detectors.base import Detector
from ssod.errors import UserError
from ssod.nn.held import statistics_held
from ssod.ops.half import half_size
from ssod.ops.views import between
from ssod.strategies.base import Plan, StepOutput
from ssod.strategies.distillation import Distillation, statistics
from ssod.strategies.pairing import pair
from ssod.strategies.teacher_student import TeacherStudent, TeacherStudentOptions
from ssod.structures import SemiBatch


class SED(TeacherStudent):
    class Options(TeacherStudentOptions):
        nms: float = Field(0.6, gt=0, le=1, description="NMS threshold of the teacher's boxes that the log counts")
        max_boxes: int = Field(100, ge=1, description="most boxes of one image that the log counts")
        scale: bool = Field(
            True, description="half-size images learn from the teacher's full size; needs detector.half_scale=true"
        )
        scale_weight: float = Field(
            1.0, ge=0, description="weight of the half-size images' loss beside the full size's"
        )
        box_weight: float = Field(1.0, ge=0, description="weight of the boxes' loss beside the classes'")
        reweight: bool = Field(
            True, description="candidates weigh as much as the teacher sees an object there; false: all alike"
        )

    options: Options

    def __init__(self, student: Detector, options: Options, plan: Plan) -> None:
        if options.scale and not student.spec["options"].get("half_scale"):
            raise UserError(
                "strategy=sed looks at half-size images, which need one pyramid level more; set "
                "detector.half_scale=true, or strategy.scale=false."
            )
        super().__init__(student, options, plan)
        self.distillation = Distillation(options.box_weight, options.reweight)

    def unsupervised(self, batch: SemiBatch, step: int) -> StepOutput:
        assert batch.weak is not None
        assert batch.strong is not None
        seen = self.teacher_output(batch.weak)
        matrices = to_weak(batch)
        pairs = pair(self.student, self.student_output(batch.strong), self.teacher, seen, matrices)
        losses = self.distillation.losses(pairs)
        if self.options.scale:
            images, sizes = half_size(batch.strong)
            with statistics_held(self.student):  # inference sees full-size images
                half = self.student.head(self.student.features(images, sizes, shift=1))
            own = self.distillation(self.student, half, self.teacher, seen, matrices)
            losses |= {f"half/{name}": self.options.scale_weight * value for name, value in own.items()}
        weight = self.options.weight * self.ramp(step)
        stats = statistics(pairs, len(batch.strong), self.options.nms, self.options.max_boxes)
        return StepOutput({name: weight * value for name, value in losses.items()}, stats | {"pseudo/weight": weight})


def to_weak(batch: SemiBatch) -> Tensor | None:
    """Pixels of the strong view -> pixels of the weak view, float64 [B, 3, 3]; None where they are the same, which
    spares the search for what lies where."""
    assert batch.weak is not None
    assert batch.strong is not None
    if torch.equal(batch.weak.matrices, batch.strong.matrices):
        return None
    return between(batch.strong.matrices, batch.weak.matrices)
