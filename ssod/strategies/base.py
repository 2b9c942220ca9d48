"""The strategy: the training method as an `nn.Module` that owns student, teacher and extra heads.

The trainer calls the module itself (so that gradients synchronise across ranks) and, after the optimizer's
step, `after_step`. This base is the supervised control; its hooks are what other strategies override.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from ssod.detectors.base import Detector
from ssod.nn.ema import Ema, ema_decay_at, frozen_copy
from ssod.nn.held import normalises_by_batch
from ssod.strategies.verdicts import FLOOR, Verdict, looking, unjudged
from ssod.structures import Instances, SemiBatch, View


class StrategyOptions(BaseModel):
    """Options of one strategy (`strategy.NAME=VALUE`); each strategy file owns a subclass."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


@dataclass(frozen=True)
class Plan:
    """Length of the run in steps, of its supervised start, and the teacher's decay per step.

    two_stages: the supervised start is a training of its own, with its own warm-up and learning rate schedule
    """

    iters: int
    burn_in: int
    ema_decay: float
    two_stages: bool = False

    def stage(self, step: int) -> tuple[int, int]:
        """First step of the stage that `step` belongs to, and the first one after it."""
        if not self.two_stages:
            return 0, self.iters
        return (0, self.burn_in) if step < self.burn_in else (self.burn_in, self.iters)


@dataclass
class StepOutput:
    """losses: named scalars whose sum is minimised; stats: numbers worth a column in the log.

    found, used: of each unlabelled image, what the teacher detected, in pixels of the weak view, and what the student
    learns from, in pixels of the strong one; both empty for strategies without such boxes. Nothing is computed on them.
    """

    losses: dict[str, Tensor] = field(default_factory=dict)
    stats: dict[str, Tensor | float] = field(default_factory=dict)
    found: list[Instances] = field(default_factory=list)
    used: list[Instances] = field(default_factory=list)


class Strategy(nn.Module):
    """Base of all strategies. `needs` lists the capabilities (protocols) a detector must have."""

    Options: type[StrategyOptions] = StrategyOptions
    needs: tuple[type[Any], ...] = ()
    uses_unlabeled = True
    needs_unlabeled = True  # a run without any unlabelled image is refused, where they are used at all
    mines = False  # whether objects without annotation are looked for in partly labelled images
    two_stages = False  # burn-in is stage one: a training of its own, which `teacher_weights` may replace
    unjudged = "the strategy does not say which boxes it learns from"  # the verdict on every box, without `judge`
    teacher: Detector | None

    def __init__(self, student: Detector, options: StrategyOptions, plan: Plan, with_teacher: bool) -> None:
        super().__init__()
        self.student = student
        self.teacher = frozen_copy(student) if with_teacher else None
        self.options = options
        self.plan = plan
        self._ema: Ema | None = None

    def forward(self, batch: SemiBatch, step: int) -> StepOutput:
        views = [batch.labeled] if batch.strong is None else [batch.labeled, batch.strong]
        output, *strong = self.student_outputs(views)
        out = StepOutput({f"sup/{k}": v for k, v in self.supervised(batch, output).items()})
        if strong:
            extra = self.unsupervised(batch, step, strong[0])
            out.losses.update({f"unsup/{k}": v for k, v in extra.losses.items()})
            out.stats.update(extra.stats)
            out.found, out.used = extra.found, extra.used
        return out

    def supervised(self, batch: SemiBatch, output: Any) -> dict[str, Tensor]:
        """Losses of the labelled images, of which `output` is the student's raw output."""
        return self.student.loss(output, batch.labeled.targets)

    def unsupervised(self, batch: SemiBatch, step: int, output: Any) -> StepOutput:
        """Losses of the unlabelled images, already weighted. output: the student's raw one on the strong view."""
        return StepOutput()

    def student_output(self, view: View) -> Any:
        """The student's raw output on a view: what its `loss` takes."""
        return self.student.head(self.student.features(view.images, view.sizes))

    def student_outputs(self, views: list[View]) -> list[Any]:
        """The student's raw output on each view. On a GPU views of one shape go through it as one batch: half as many
        kernels, each of more work. Not where a batch norm would then normalise one view by the other, and not on a CPU,
        whose caches the smaller batches fit better."""
        alike = len({view.images.shape[1:] for view in views}) == 1 < len(views)
        if alike and views[0].images.device.type != "cpu" and not normalises_by_batch(self.student):
            return self.joint_outputs(views)
        return [self.student_output(view) for view in views]

    def joint_outputs(self, views: list[View]) -> list[Any]:
        """As `student_outputs`, of views of one shape, in one batch."""
        images, sizes = torch.cat([v.images for v in views]), torch.cat([v.sizes for v in views])
        whole = self.student.head(self.student.features(images, sizes))
        return whole.split([len(view) for view in views])

    def after_step(self, step: int) -> None:
        """Called after each optimizer step, `step` counting from 0."""
        if self.teacher is None:
            return
        if self._ema is None:
            self._ema = Ema(self.teacher, self.student)
        if step < self.plan.burn_in:
            if step == self.plan.burn_in - 1:
                self._ema.copy()
        else:
            decay = self.decay_at(step)
            assert decay is not None
            self._ema.update(decay)

    def decay_at(self, step: int) -> float | None:
        """Of the teacher's moving average at a step after burn-in; None where the teacher stays as it is."""
        return ema_decay_at(step, self.plan.ema_decay)

    def train(self, mode: bool = True) -> Strategy:
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()  # its batch norm follows the student's statistics, never its own batches
        return self

    def networks(self) -> dict[str, Detector]:
        """What can be evaluated and deployed, by name. Other modules of a strategy are saved to resume training."""
        return {"student": self.student} | ({"teacher": self.teacher} if self.teacher is not None else {})

    def pairs(self) -> list[tuple[Detector, Detector]]:
        """Each student with the teacher it starts from."""
        assert self.teacher is not None
        return [(self.student, self.teacher)]

    def together(self) -> dict[str, Detector]:
        """What validation scores besides, by name: called as a detector is, but not deployable as one network."""
        return {}

    def by_class(self) -> dict[str, Tensor]:
        """Numbers of each class [K] worth a curve each, by name: drawn and kept at every validation."""
        return {}

    def verdicts(self, views: Iterable[View], step: int) -> list[Verdict]:
        """What is found in weak views after `step` steps, and what the student would learn from it: one an image.
        During burn-in it is the student that finds.

        views  of unlabelled images; where the strategy mines, of partly labelled ones, too
        The strategy decides by its state as it is, and nothing of this changes, nor do the global random numbers.
        """
        by = self.student if self.teacher is None or step < self.plan.burn_in else self.teacher
        with looking([self.student]):
            return self.judge([found for view in views for found in self.detections(view, by)])

    def lowest(self) -> float:
        """The score up to which no detection is looked at."""
        return FLOOR

    def detections(self, view: View, by: Detector) -> list[Instances]:
        """What `judge` judges: the detections of one of the networks, also such as are too unsure to be looked at."""
        return self.label(view, min(FLOOR, self.lowest()), by)

    def judge(self, found: list[Instances]) -> list[Verdict]:
        """The verdict on what `detections` gave, of all images."""
        return [unjudged(f, self.unjudged) for f in found]

    @torch.no_grad()
    def label(self, view: View, conf: float, by: Detector) -> list[Instances]:
        """What one of the networks detects in a view above conf, in its pixels, as this strategy makes pseudo boxes of
        it: with its NMS, and the scores that its thresholds are held against. For those who watch: changes nothing,
        where `by` is in eval mode."""
        return by.pseudo(by.head(by.features(view.images, view.sizes)), conf=conf, iou=0.6, max_det=100)

    def thresholds_in_force(self) -> Tensor | None:
        """The score [K] from which a box of each class is a pseudo box as things stand; None where there is no such
        threshold, or not yet. For those who watch: changes nothing."""
        return None
