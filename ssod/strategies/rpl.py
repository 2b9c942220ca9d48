"""RPL: certainty-aware pseudo labels, dynamic thresholds and re-weighting (Li et al., "Rethinking Pseudo Labels for
Semi-Supervised Object Detection", 2022).

Stage one trains a teacher on the labelled images (`burn_in` steps); in stage two the student starts from it and learns
from labelled images and from the pseudo boxes of the teacher, which stays as it is. Each stage has its own schedule.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ssod.detectors import build_detector
from ssod.detectors.base import Detector
from ssod.detectors.pyramid import PyramidDetector
from ssod.errors import UserError
from ssod.nn.ema import Ema, frozen_copy
from ssod.ops.pseudo import reaches
from ssod.strategies.balance import Balance, BalanceOptions
from ssod.strategies.base import Plan, StepOutput
from ssod.strategies.ensemble import Together, fuse
from ssod.strategies.teacher_student import TeacherStudent
from ssod.strategies.verdicts import Verdict, compared, judged
from ssod.structures import Instances, SemiBatch, View

LOWEST = 0.05  # score below which no box of the teacher is looked at; thresholds are far above


class RPL(TeacherStudent):
    class Options(BalanceOptions):
        tau: float = Field(
            0.7, ge=LOWEST, le=1, description="threshold of pseudo boxes that each class's own derives from"
        )
        teacher: Literal["frozen", "ema"] = Field(
            "frozen", description="in stage two: as stage one left it, or a moving average of the student"
        )
        certainty: bool = Field(
            True, description="use the boxes' localisation quality v beside p; needs detector.codec=bucket"
        )
        threshold_on: Literal["p", "pv", "sqrt_pv"] = Field(
            "p", description="what reaches the threshold: class probability, its product with v, or their mean"
        )
        gamma1: float = Field(0.05, ge=0, description="how far thresholds follow the classes' certainty; 0 = off")
        gamma2: float = Field(0.6, ge=0, description="how far weights favour rare, uncertain classes; 0 = off")
        ensemble: Literal[1, 2] = Field(1, description="networks that are trained side by side and teach together")

    options: Options
    two_stages = True

    def __init__(self, student: Detector, options: Options, plan: Plan) -> None:
        super().__init__(student, options, plan)
        if options.certainty:
            _check_quality(student)
        elif options.threshold_on != "p":
            raise UserError(
                f"strategy.threshold_on={options.threshold_on} needs the boxes' quality; "
                "set strategy.certainty=true, or strategy.threshold_on=p."
            )
        self.balance = Balance(student.num_classes, options, with_quality=options.certainty)
        self.student2 = self.teacher2 = None
        if options.ensemble == 2:
            self.student2 = _twin(student)
            self.teacher2 = frozen_copy(self.student2)
        self._averages: list[Ema] = []

    def pairs(self) -> list[tuple[Detector, Detector]]:
        second = [] if self.student2 is None or self.teacher2 is None else [(self.student2, self.teacher2)]
        return [(self.student, self.teacher), *second]

    def forward(self, batch: SemiBatch, step: int) -> StepOutput:
        self.balance.fade(step)
        return super().forward(batch, step)

    def supervised(self, batch: SemiBatch, output: Any) -> dict[str, Tensor]:
        """Re-weighting acts in stage two, on labelled and unlabelled images alike (Eq. 2 has both terms)."""
        self.count_labels(batch.labeled)
        stage_two = batch.strong is not None
        alpha = self.balance.weights() if stage_two else None
        return self.learn(output, batch.labeled, batch.labeled.targets, alpha)

    def unsupervised(self, batch: SemiBatch, step: int, output: Any) -> StepOutput:
        assert batch.weak is not None
        assert batch.strong is not None
        seen = self.outputs(batch.weak)
        detections = self.detect(seen, LOWEST)
        tau, alpha = self.thresholds_in_force(), self.balance.weights()
        (targets,) = self.chosen_to_strong(batch, detections, [reaches(d, tau) for d in detections])
        losses = self.learn(output, batch.strong, targets, alpha) | self.across_scales(batch, *seen)
        out = self.step_output(losses, step, detections, targets, tau)
        out.stats |= self.balance.stats(tau, alpha)
        return out

    @torch.no_grad()
    def outputs(self, view: View) -> list[Any]:
        """Each teacher's raw output on a view, without gradient."""
        return [teacher.head(teacher.features(view.images, view.sizes)) for _, teacher in self.pairs()]

    @torch.no_grad()
    def detect(self, seen: list[Any], conf: float) -> list[Instances]:
        """What the teacher, or both together, make of their raw outputs; scores are what `threshold_on` says."""
        found = []
        for (_, teacher), output in zip(self.pairs(), seen, strict=True):
            detections = teacher.pseudo(output, conf=conf, iou=self.options.nms, max_det=self.options.max_boxes)
            found.append([self._confident(d) for d in detections])
        return found[0] if len(found) == 1 else fuse(found, conf, self.options.nms, self.options.max_boxes)

    def judge(self, found: list[Instances]) -> list[Verdict]:
        tau, alpha = self.thresholds_in_force(), self.balance.weights()
        name = "its class's threshold" if self.options.gamma1 else "tau"
        what = {"p": "score", "pv": "certainty p*v", "sqrt_pv": "certainty sqrt(p*v)"}[self.options.threshold_on]
        verdicts = []
        for f in found:
            kept = reaches(f, tau)
            reasons = compared(f, tau[f.labels], kept, name, what, ": background")
            verdicts.append(judged(f, kept, f[kept], reasons, tau, alpha))
        return verdicts

    def learn(self, output: Any, view: View, targets: list[Instances], alpha: Tensor | None) -> dict[str, Tensor]:
        """Losses of each student on a view, the second one's as "2/NAME", foreground weighted by alpha [K].

        output  the first student's raw one
        """
        losses = self.balance.loss(self.student, output, targets, alpha)
        if self.student2 is not None:
            second = self.student2.head(self.student2.features(view.images, view.sizes))
            own = self.balance.loss(self.student2, second, targets, alpha)
            losses |= {f"2/{name}": value for name, value in own.items()}
        return losses

    def _confident(self, detections: Instances) -> Instances:
        """The same detections, their score what is held against the threshold."""
        assert detections.scores is not None
        if not self.options.certainty:
            return detections
        assert detections.quality is not None
        v = detections.quality.clamp(min=1e-6)
        # A detector that ranks by quality gives sqrt(p * v).
        p = (detections.scores**2 / v).clamp(max=1) if self._ranks_by_quality() else detections.scores
        score = {"p": p, "pv": p * v, "sqrt_pv": (p * v).sqrt()}[self.options.threshold_on]
        return Instances(detections.boxes, detections.labels, score, detections.quality)

    def _ranks_by_quality(self) -> bool:
        return isinstance(self.student, PyramidDetector) and self.student.options.rank_by_quality

    def after_step(self, step: int) -> None:
        """The teacher becomes the student once, at the end of stage one, and its average only where that is asked."""
        if not self._averages:
            self._averages = [Ema(teacher, student) for student, teacher in self.pairs()]
        for average in self._averages:
            if step == self.plan.burn_in - 1:
                average.copy()
            elif step >= self.plan.burn_in and (decay := self.decay_at(step)) is not None:
                average.update(decay)

    def decay_at(self, step: int) -> float | None:
        """Without a warm-up: the teacher is a trained network."""
        return self.plan.ema_decay if self.options.teacher == "ema" else None

    def train(self, mode: bool = True) -> RPL:
        super().train(mode)
        for _, teacher in self.pairs():
            teacher.eval()
        return self

    def networks(self) -> dict[str, Detector]:
        """The second student is saved as `student2`; validation scores both of them as `students`, see `together`."""
        return super().networks() | ({} if self.student2 is None else {"student2": self.student2})

    def together(self) -> dict[str, Detector]:
        students = [student for student, _ in self.pairs()]
        return {"students": Together(students)} if len(students) > 1 else {}

    @torch.no_grad()
    def label(self, view: View, conf: float, by: Detector) -> list[Instances]:
        """By the teacher: what all teachers make of it together."""
        if by is self.teacher:
            return self.detect(self.outputs(view), conf)
        return [self._confident(d) for d in super().label(view, conf, by)]

    def thresholds_in_force(self) -> Tensor:
        return self.balance.thresholds(self.options.tau)

    def by_class(self) -> dict[str, Tensor]:
        return self.balance.by_class(self.options.tau)


def _twin(student: Detector) -> Detector:
    """A detector like `student` that starts elsewhere: the same backbone, all above it drawn anew."""
    twin = build_detector(**student.spec)
    twin.backbone.load_state_dict(student.backbone.state_dict())
    return twin


def _check_quality(student: Detector) -> None:
    name = student.spec["name"]
    if not isinstance(student, PyramidDetector):
        raise UserError(
            f"strategy.certainty=true needs boxes with a localisation quality, which detector={name} cannot give; "
            "set strategy.certainty=false, or take fcos, retinanet or faster_rcnn with detector.codec=bucket."
        )
    if student.options.codec != "bucket":
        raise UserError(
            f"strategy.certainty=true needs boxes with a localisation quality, and detector.codec="
            f"{student.options.codec} is not the paper's; set detector.codec=bucket, or strategy.certainty=false."
        )
