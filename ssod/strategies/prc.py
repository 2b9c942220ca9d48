"""LER/PRC: unlabelled losses re-weighted by the localisation error of pseudo boxes and the reliability of proposals
(Xu & Nong, "Semi-Supervised Object Detection via Dynamic Reweighting of Localization Error").

A variance branch (`detector.codec=gaussian`) says how certain every box is. LER: pseudo boxes teach boxes as much as
the teacher is certain of them. PRC: the student's candidates teach classes as much as the teacher finds them reliable.
RPL's thresholds and weights by class go with both (`balance.py`); they are off unless asked for.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import Tensor

from ssod import dist
from ssod.detectors.base import Detector
from ssod.detectors.pyramid import PyramidDetector
from ssod.errors import UserError
from ssod.ops.pseudo import above, reaches
from ssod.strategies.balance import Balance, BalanceOptions
from ssod.strategies.base import Plan, StepOutput
from ssod.strategies.reliability import Reliability, WeakView, judge
from ssod.strategies.teacher_student import TeacherStudent
from ssod.strategies.verdicts import Verdict, compared, judged, scores
from ssod.structures import Candidates, Instances, SemiBatch, Weigh, Weights

CLASSLESS = ("rpn", "encoder")  # stages that tell objects from background only: neither LER nor PRC speaks of them


class PRC(TeacherStudent):
    class Options(BalanceOptions):
        tau: float = Field(0.8, ge=0, le=1, description="lowest foreground score of a pseudo box")
        weight: float = Field(4.0, ge=0, description="beta, weight of the unlabelled images' loss")
        nms: float = Field(0.5, gt=0, le=1, description="NMS threshold of the teacher's boxes")
        ler: bool = Field(
            True, description="mean over foreground, pseudo boxes weighted by their localisation quality s_loc"
        )
        prc: bool = Field(True, description="class loss weighted by what the teacher thinks of each candidate")

    options: Options

    def __init__(self, student: Detector, options: Options, plan: Plan) -> None:
        super().__init__(student, options, plan)
        _check_codec(student, options)
        # s_loc is at most 0.5: as Eq. 6's v it would lower every threshold and raise every weight, of all classes.
        self.balance = Balance(student.num_classes, options, with_quality=False)

    def forward(self, batch: SemiBatch, step: int) -> StepOutput:
        self.balance.fade(step)
        return super().forward(batch, step)

    def supervised(self, batch: SemiBatch, output: Any) -> dict[str, Tensor]:
        self.count_labels(batch.labeled)
        alpha = self.balance.weights() if batch.strong is not None else None  # as in RPL: once pseudo boxes teach
        own = mean_over_foreground if self.options.ler else None
        return self.balance.loss(self.student, output, batch.labeled.targets, alpha, own)

    def unsupervised(self, batch: SemiBatch, step: int, output: Any) -> StepOutput:
        assert batch.weak is not None
        assert batch.strong is not None
        tau, alpha = self.thresholds_in_force(), self.balance.weights()
        seen = self.teacher_output(batch.weak)
        found = self.decode(seen, self.lowest())
        pseudo = above(found, tau)
        targets = [self.as_targets(d) for d in self.to_strong(batch, pseudo)]
        reliability = judge(self.teacher, WeakView.of(batch, seen), output, pseudo, self.student)
        weighed: dict[str, Tensor | float] = {}
        own = self.weigher(reliability, weighed)
        losses = self.balance.loss(self.student, output, targets, alpha, own)
        losses |= self.across_scales(batch, seen)
        out = self.step_output(losses, step, found, targets, tau)
        out.stats.update(weighed)
        if self.balance.active:
            out.stats |= self.balance.stats(tau, alpha)
        return out

    def lowest(self) -> float:
        return self.balance.lowest(self.options.tau)

    def judge(self, found: list[Instances]) -> list[Verdict]:
        """Weights by class go into those of the boxes; what PRC thinks of each candidate of the student does not."""
        tau, alpha = self.thresholds_in_force(), self.balance.weights()
        name = "its class's threshold" if self.options.gamma1 else "tau"
        verdicts = []
        for f in found:
            kept = reaches(f, tau) & (scores(f) > self.lowest())
            reasons = compared(f, tau[f.labels], kept, name, below=": background")
            verdicts.append(judged(f, kept, self.as_targets(f[kept]), reasons, tau, alpha))
        return verdicts

    def as_targets(self, pseudo: Instances) -> Instances:
        """Hard targets, in the box loss as heavy as their s_loc (Eq. 11)."""
        return Instances(pseudo.boxes, pseudo.labels, box_weight=pseudo.quality if self.options.ler else None)

    def weigher(self, reliability: Reliability, stats: dict[str, Tensor | float]) -> Weigh:
        """Eq. 11 and 14 as weights of candidates; variances learn nothing from pseudo boxes.

        stats  gets the mean reliability of both groups, 0 where there is none
        """

        def weigh(candidates: Candidates) -> Weights:
            box = mean_over_foreground(candidates).box if self.options.ler else None
            cls = None
            if self.options.prc and candidates.stage not in CLASSLESS:
                cls = reliability(candidates)
                if candidates.stage != "aux":  # the queries that count are those of the last layer
                    stats.update(_means(cls, candidates))
                if candidates.stage == "roi":
                    cls = cls * own_means(candidates)
            return Weights(cls, box, learn_quality=False)

        return weigh

    def thresholds_in_force(self) -> Tensor:
        return self.balance.thresholds(self.options.tau)

    def by_class(self) -> dict[str, Tensor]:
        return self.balance.by_class(self.options.tau) if self.balance.active else {}


def mean_over_foreground(candidates: Candidates) -> Weights:
    """Weights that make the box loss a mean over foreground candidates (Eq. 10 and 11), but for an RPN's."""
    if candidates.stage in CLASSLESS:
        return Weights()
    foreground = dist.shared((candidates.matched >= 0).sum())
    ones = candidates.boxes.new_ones(len(candidates.labels))
    return Weights(box=ones * candidates.divisor / foreground)


def own_means(candidates: Candidates) -> Tensor:
    """Factors [M] that make a sum over candidates the mean over foreground plus the mean over background (Eq. 14)."""
    foreground = candidates.matched >= 0
    counts = dist.shared(foreground.sum()).where(foreground, dist.shared((~foreground).sum()))
    return candidates.divisor / counts


def _means(reliability: Tensor, candidates: Candidates) -> dict[str, Tensor | float]:
    foreground = candidates.matched >= 0
    groups = {"foreground": foreground, "background": (candidates.labels >= 0) & ~foreground}
    return {f"reliability/{n}": (reliability * own).sum() / own.sum().clamp(min=1) for n, own in groups.items()}


def _check_codec(student: Detector, options: PRC.Options) -> None:
    """LER and PRC need boxes that come with their variance; PRC on queries takes the overlap in its place."""
    if isinstance(student, PyramidDetector):
        used = student.options.codec
        if (options.ler or options.prc) and used != "gaussian":
            raise UserError(
                f"strategy=prc needs boxes that come with a variance, and detector.codec={used} gives none; "
                "set detector.codec=gaussian."
            )
    elif options.ler:
        raise UserError(
            f"strategy.ler=true needs boxes that come with a variance, which {type(student).__name__} does not have; "
            "set strategy.ler=false, or choose fcos, retinanet or faster_rcnn with detector.codec=gaussian."
        )
