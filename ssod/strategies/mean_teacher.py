"""Mean teacher: the moving average of the student labels the unlabelled images.

`L = L_s + w_u * L_u`. Weak view -> teacher -> boxes above the threshold -> mapped by the two views' matrices
into the strong view -> student. Mean teacher: Tarvainen & Valpola, 2017; for detection with burn-in and
hard pseudo boxes: Unbiased Teacher, Liu et al., 2021.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ssod import dist
from ssod.detectors.base import Detector
from ssod.ops.pseudo import BINS, above, below, class_counts, ignore_within, matching_thresholds, score_histogram
from ssod.ops.views import between, map_instances
from ssod.strategies.base import Plan, StepOutput, Strategy, StrategyOptions
from ssod.structures import Instances, SemiBatch

MOMENTUM = 0.99  # of the running statistics behind tau=auto: about the last 100 steps


class MeanTeacher(Strategy):
    class Options(StrategyOptions):
        tau: float | Literal["auto"] = Field(
            "auto",
            description="lowest score of a pseudo box; auto: per class, so that the teacher "
            "draws as many boxes an image as the labelled images have",
        )
        tau_low: float = Field(
            0.3, ge=0, le=1, description="no box below this score is looked at; tau=auto stays above it"
        )
        tau_high: float = Field(0.9, ge=0, le=1, description="tau=auto never goes above this")
        weight: float = Field(1.0, ge=0, description="w_u, weight of the unlabelled images' loss")
        ramp: int = Field(0, ge=0, description="steps after burn-in over which w_u grows from 0")
        nms: float = Field(0.6, gt=0, le=1, description="NMS threshold of the teacher's boxes")
        max_boxes: int = Field(100, ge=1, description="most pseudo boxes of one image before the threshold")
        ignore: bool = Field(
            True,
            description="boxes between tau_low and tau are neither object nor background: nothing learns from them",
        )
        box_loss: bool = Field(False, description="learn boxes from pseudo boxes too, not only classes")

    options: Options
    teacher: Detector
    label_counts: Tensor
    label_images: Tensor
    score_counts: Tensor
    score_images: Tensor

    def __init__(self, student: Detector, options: Options, plan: Plan) -> None:
        super().__init__(student, options, plan, with_teacher=True)
        k = student.num_classes
        self.register_buffer("label_counts", torch.zeros(k))  # annotated boxes of each class ...
        self.register_buffer("label_images", torch.zeros(()))  # ... in so many labelled images
        self.register_buffer("score_counts", torch.zeros(k, BINS))  # teacher's boxes by class and score, decayed ...
        self.register_buffer("score_images", torch.zeros(()))  # ... in so many unlabelled images, decayed

    def supervised(self, batch: SemiBatch) -> dict[str, Tensor]:
        boxes = class_counts(batch.labeled.targets, self.student.num_classes)
        counts = dist.all_reduce_sum(torch.cat([boxes, boxes.new_tensor([len(batch.labeled)])]))
        self.label_counts += counts[:-1]
        self.label_images += counts[-1]
        return super().supervised(batch)

    def unsupervised(self, batch: SemiBatch, step: int) -> StepOutput:
        assert batch.weak is not None
        assert batch.strong is not None
        detections = self.detect(batch)
        tau = self.thresholds(detections)
        to_strong = between(batch.weak.matrices, batch.strong.matrices)  # [B, 3, 3]
        mapped = [map_instances(d, to_strong[i], batch.strong.sizes[i])[0] for i, d in enumerate(detections)]
        targets = [self.as_targets(above(m, tau)) for m in mapped]
        weigh = ignore_within([below(m, tau) for m in mapped]) if self.options.ignore else None
        student, view = self.student, batch.strong
        losses = student.loss(student.head(student.features(view.images, view.sizes)), targets, weigh)
        weight = self.options.weight * self.ramp(step)
        found, used = sum(map(len, detections)), sum(map(len, targets))
        stats: dict[str, Tensor | float] = {
            "pseudo/per_image": used / len(targets),
            "pseudo/kept": used / max(found, 1),
            "pseudo/labeled_per_image": (self.label_counts.sum() / self.label_images.clamp(min=1)),
            "pseudo/tau": tau.mean(),
            "pseudo/weight": weight,
        }
        return StepOutput({k: weight * v for k, v in losses.items()}, stats)

    @torch.no_grad()
    def detect(self, batch: SemiBatch) -> list[Instances]:
        """The teacher's detections in the weak view."""
        assert batch.weak is not None
        tau, low = self.options.tau, self.options.tau_low
        view = batch.weak
        conf = low if tau == "auto" else min(tau, low) if self.options.ignore else tau
        return self.teacher(view.images, view.sizes, conf=conf, iou=self.options.nms, max_det=self.options.max_boxes)

    @torch.no_grad()
    def thresholds(self, detections: list[Instances]) -> Tensor:
        """tau [K] of this step; updates the running statistics when it is automatic."""
        options = self.options
        if options.tau != "auto":
            return torch.full_like(self.label_counts, options.tau)
        k = self.student.num_classes
        seen = torch.cat([score_histogram(detections, k).flatten(), self.label_counts.new_tensor([len(detections)])])
        dist.all_reduce_sum(seen)
        self.score_counts.mul_(MOMENTUM).add_(seen[:-1].view(k, BINS))
        self.score_images.mul_(MOMENTUM).add_(seen[-1])
        wanted = self.label_counts / self.label_images.clamp(min=1)
        return matching_thresholds(self.score_counts / self.score_images, wanted, options.tau_low, options.tau_high)

    def as_targets(self, pseudo: Instances) -> Instances:
        """Hard targets: a pseudo box counts like an annotation; without `box_loss` only for the class."""
        box_weight = None if self.options.box_loss else pseudo.boxes.new_zeros(len(pseudo))
        return Instances(pseudo.boxes, pseudo.labels, box_weight=box_weight)

    def ramp(self, step: int) -> float:
        """0..1, linear over `ramp` steps after burn-in."""
        return min(1.0, (step - self.plan.burn_in + 1) / self.options.ramp) if self.options.ramp else 1.0
