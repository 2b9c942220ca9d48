"""Mean teacher: the moving average of the student labels the unlabelled images.

`L = L_s + w_u * L_u`. Weak view -> teacher -> boxes above the threshold -> mapped by the two views' matrices
into the strong view -> student. Mean teacher: Tarvainen & Valpola, 2017; for detection with burn-in and
hard pseudo boxes: Unbiased Teacher, Liu et al., 2021.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ssod import dist
from ssod.detectors.base import Detector
from ssod.ops.pseudo import BINS, ignore_within, matching_thresholds, reaches, score_histogram
from ssod.strategies.base import Plan, StepOutput
from ssod.strategies.teacher_student import TeacherStudent, TeacherStudentOptions
from ssod.strategies.verdicts import Verdict, compared, judged, scores
from ssod.structures import Instances, SemiBatch

MOMENTUM = 0.99  # of the running statistics behind tau=auto: about the last 100 steps


class MeanTeacher(TeacherStudent):
    class Options(TeacherStudentOptions):
        tau: float | Literal["auto"] = Field(
            "auto",
            description="lowest score of a pseudo box; auto: per class, so that the teacher "
            "draws as many boxes an image as the labelled images have",
        )
        tau_low: float = Field(
            0.3, ge=0, le=1, description="no box below this score is looked at; tau=auto stays above it"
        )
        tau_high: float = Field(0.9, ge=0, le=1, description="tau=auto never goes above this")
        ignore: bool = Field(
            True,
            description="boxes between tau_low and tau are neither object nor background: nothing learns from them",
        )
        box_loss: bool = Field(False, description="learn boxes from pseudo boxes too, not only classes")

    options: Options
    score_counts: Tensor
    score_images: Tensor

    def __init__(self, student: Detector, options: Options, plan: Plan) -> None:
        super().__init__(student, options, plan)
        k = student.num_classes
        self.register_buffer("score_counts", torch.zeros(k, BINS))  # teacher's boxes by class and score, decayed ...
        self.register_buffer("score_images", torch.zeros(()))  # ... in so many unlabelled images, decayed

    def unsupervised(self, batch: SemiBatch, step: int, output: Any) -> StepOutput:
        assert batch.weak is not None
        assert batch.strong is not None
        seen = self.teacher_output(batch.weak)
        detections = self.decode(seen, self.lowest())
        tau = self.thresholds(detections)
        high = [reaches(d, tau) for d in detections]
        sure, unsure = self.chosen_to_strong(batch, detections, high, [~h for h in high])
        targets = [self.as_targets(s) for s in sure]
        weigh = ignore_within(unsure) if self.options.ignore else None
        losses = self.student.loss(output, targets, weigh)
        losses |= self.across_scales(batch, seen)
        return self.step_output(losses, step, detections, targets, tau)

    def lowest(self) -> float:
        tau, low = self.options.tau, self.options.tau_low
        if tau == "auto":
            return low
        return min(tau, low) if self.options.ignore else tau

    @torch.no_grad()
    def thresholds(self, detections: list[Instances]) -> Tensor:
        """tau [K] of this step; updates the running statistics when it is automatic."""
        options = self.options
        if options.tau != "auto":
            return torch.full_like(self.label_counts, options.tau)
        k = self.student.num_classes
        seen = torch.cat([score_histogram(detections, k).flatten(), self.label_counts.new_full((1,), len(detections))])
        dist.all_reduce_sum(seen)
        self.score_counts.mul_(MOMENTUM).add_(seen[:-1].view(k, BINS))
        self.score_images.mul_(MOMENTUM).add_(seen[-1])
        return self._matching(self.score_counts / self.score_images)

    def _matching(self, per_image: Tensor) -> Tensor:
        """tau [K] for so many detections an image by class and score, [K, BINS]."""
        wanted = self.label_counts / self.label_images.clamp(min=1)
        return matching_thresholds(per_image, wanted, self.options.tau_low, self.options.tau_high)

    def thresholds_in_force(self) -> Tensor | None:
        if self.options.tau != "auto":
            return torch.full_like(self.label_counts, self.options.tau)
        return self._matching(self.score_counts / self.score_images) if self.score_images > 0 else None

    def judge(self, found: list[Instances]) -> list[Verdict]:
        tau, lowest = self.thresholds_in_force(), self.lowest()
        automatic = self.options.tau == "auto"
        if tau is None:  # before the first step that a teacher takes part in
            seen = [f[scores(f) > lowest] for f in found]
            tau = self._matching(score_histogram(seen, self.student.num_classes) / len(found))
        after = ": neither object nor background" if self.options.ignore else ": background"
        verdicts = []
        for f in found:
            kept = reaches(f, tau) & (scores(f) > lowest)
            reasons = compared(f, tau[f.labels], kept, "its class's threshold" if automatic else "tau", below=after)
            for i in (scores(f) <= lowest).nonzero().flatten().tolist():
                reasons[i] = f"score {scores(f)[i]:.2f} is below {lowest:.2f}, where nothing is looked at: background"
            verdicts.append(judged(f, kept, self.as_targets(f[kept]), reasons, tau))
        return verdicts

    def as_targets(self, pseudo: Instances) -> Instances:
        """Hard targets: a pseudo box counts like an annotation; without `box_loss` only for the class."""
        box_weight = None if self.options.box_loss else pseudo.boxes.new_zeros(len(pseudo))
        return Instances(pseudo.boxes, pseudo.labels, box_weight=box_weight)
