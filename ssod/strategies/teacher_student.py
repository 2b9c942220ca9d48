"""What strategies with a teacher share: its detections, their way into the student's view, and what is logged.

`L = L_s + w_u * L_u`. Weak view -> teacher -> pseudo boxes -> mapped by the two views' matrices into the strong view
-> student. A strategy says which detections are kept, what they weigh, and calls `step_output` with the losses.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ssod import dist
from ssod.detectors.base import Detector
from ssod.errors import UserError
from ssod.nn.held import statistics_held
from ssod.ops.half import half_size
from ssod.ops.pseudo import class_counts
from ssod.ops.views import between, chosen_into_view, into_view
from ssod.strategies.base import Plan, StepOutput, Strategy, StrategyOptions
from ssod.strategies.distillation import Distillation
from ssod.structures import Instances, SemiBatch, View


class TeacherStudentOptions(StrategyOptions):
    weight: float = Field(1.0, ge=0, description="w_u, weight of the unlabelled images' loss")
    ramp: int = Field(0, ge=0, description="steps after burn-in over which w_u grows from 0")
    nms: float = Field(0.6, gt=0, le=1, description="NMS threshold of the teacher's boxes")
    max_boxes: int = Field(100, ge=1, description="most pseudo boxes of one image before the threshold")
    scale_weight: float = Field(
        0.0, ge=0, description="weight, within w_u, of the half-size image's consistency with the teacher, as in SED"
    )


class TeacherStudent(Strategy):
    """Base of strategies whose teacher, a moving average of the student, labels the unlabelled images.

    label_counts, label_images  annotated boxes of each class [K] in so many labelled images, over all steps and ranks
    """

    Options = TeacherStudentOptions
    options: TeacherStudentOptions
    teacher: Detector
    label_counts: Tensor
    label_images: Tensor

    def __init__(self, student: Detector, options: TeacherStudentOptions, plan: Plan) -> None:
        if options.scale_weight and not student.spec["options"].get("half_scale"):
            raise UserError(
                f"strategy.scale_weight={options.scale_weight} looks at half-size images, which need one pyramid level "
                "more; set detector.half_scale=true, or strategy.scale_weight=0."
            )
        super().__init__(student, options, plan, with_teacher=True)
        self.distillation = Distillation()
        self.register_buffer("label_counts", torch.zeros(student.num_classes))
        self.register_buffer("label_images", torch.zeros(()))

    def supervised(self, batch: SemiBatch, output: Any) -> dict[str, Tensor]:
        self.count_labels(batch.labeled)
        return super().supervised(batch, output)

    def count_labels(self, view: View) -> None:
        """Add the labelled images of a step, of all ranks, to the label statistics."""
        boxes = class_counts(view.targets, self.student.num_classes)
        counts = dist.all_reduce_sum(torch.cat([boxes, boxes.new_full((1,), len(view))]))
        self.label_counts += counts[:-1]
        self.label_images += counts[-1]

    @torch.no_grad()
    def teacher_output(self, view: View) -> Any:
        """The teacher's raw output on a view, without gradient: what its `decode`, `classify` and `refine` take."""
        return self.teacher.head(self.teacher.features(view.images, view.sizes))

    @torch.no_grad()
    def decode(self, output: Any, conf: float) -> list[Instances]:
        """Detections of the teacher's raw output that score above conf, by descending score, without gradient."""
        return self.teacher.pseudo(output, conf=conf, iou=self.options.nms, max_det=self.options.max_boxes)

    @torch.no_grad()
    def label(self, view: View, conf: float, by: Detector) -> list[Instances]:
        output = by.head(by.features(view.images, view.sizes))
        return by.pseudo(output, conf=conf, iou=self.options.nms, max_det=self.options.max_boxes)

    def to_strong(self, batch: SemiBatch, detections: list[Instances]) -> list[Instances]:
        """Detections in the weak view -> in the strong view's pixels, with their scores, quality and weights; those
        clipped away are dropped."""
        assert batch.weak is not None
        assert batch.strong is not None
        return into_view(detections, batch.weak, batch.strong)

    def chosen_to_strong(
        self, batch: SemiBatch, detections: list[Instances], *choices: list[Tensor]
    ) -> list[list[Instances]]:
        """As `to_strong` for each choice, a bool [N] an image: the chosen detections. A GPU is waited for once."""
        assert batch.weak is not None
        assert batch.strong is not None
        return chosen_into_view(detections, list(choices), batch.weak, batch.strong)

    def across_scales(self, batch: SemiBatch, *seen: Any) -> dict[str, Tensor]:
        """Losses "half/NAME": the student on the strong view at half size against the teacher on the weak view at full
        size (SED's consistency across scales), times `scale_weight`; none where that is 0.

        seen  the teacher's raw output on the weak view; of several pairs one each, in order, the second one's losses
              are "2/half/NAME"
        """
        if not self.options.scale_weight:
            return {}
        assert batch.strong is not None
        images, sizes = half_size(batch.strong)
        matrices = to_weak(batch)
        losses: dict[str, Tensor] = {}
        for i, ((student, teacher), judged) in enumerate(zip(self.pairs(), seen, strict=True)):
            with statistics_held(student):  # inference sees full-size images
                half = student.head(student.features(images, sizes, shift=1))
            for name, value in self.distillation(student, half, teacher, judged, matrices).items():
                losses[f"{i + 1}/half/{name}" if i else f"half/{name}"] = self.options.scale_weight * value
        return losses

    def step_output(
        self, losses: dict[str, Tensor], step: int, found: list[Instances], used: list[Instances], tau: Tensor | float
    ) -> StepOutput:
        """The losses times w_u, and the statistics that the log, the plots and the alarm read.

        found  what the teacher gave, used  what the student learns from, tau  threshold(s): a number or one a class
        """
        weight = self.options.weight * self.ramp(step)
        count = sum(map(len, used))
        stats: dict[str, Tensor | float] = {
            "pseudo/per_image": count / len(used),
            "pseudo/above_per_image": _reaching(found, tau) / len(found),
            "pseudo/kept": count / max(sum(map(len, found)), 1),
            "pseudo/labeled_per_image": (self.label_counts.sum() / self.label_images.clamp(min=1)),
            "pseudo/tau": tau.mean() if isinstance(tau, Tensor) else tau,
            "pseudo/weight": weight,
        }
        return StepOutput({k: weight * v for k, v in losses.items()}, stats, found, used)

    def ramp(self, step: int) -> float:
        """0..1, linear over `ramp` steps after burn-in."""
        return min(1.0, (step - self.plan.burn_in + 1) / self.options.ramp) if self.options.ramp else 1.0


def _reaching(found: list[Instances], tau: Tensor | float) -> Tensor:
    """How many detections reach the threshold, wherever they lie in the student's view: []."""
    scores, labels = torch.cat([f.scores for f in found if f.scores is not None]), torch.cat([f.labels for f in found])
    return (scores >= (tau[labels] if isinstance(tau, Tensor) else tau)).sum()


def to_weak(batch: SemiBatch) -> Tensor | None:
    """Pixels of the strong view -> pixels of the weak view, float64 [B, 3, 3]; None where they are the same, which
    spares the search for what lies where."""
    assert batch.weak is not None
    assert batch.strong is not None
    if batch.aligned():
        return None
    return between(batch.strong.matrices, batch.weak.matrices)
