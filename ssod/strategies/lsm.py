"""LSM: low-confidence samples mining (Liu et al., "Low-Confidence Samples Mining for Semi-supervised Object Detection",
2023).

A mean teacher with hard pseudo boxes above tau, plus two parts. Pseudo information mining (PIM): the strong view at
half size goes through the same backbone and the same box regression, but an auxiliary classifier of its own, and learns
from the teacher's boxes above a lower threshold alpha. Self-distillation: where the auxiliary classifier's score lies
between alpha and tau, the main classifier at full size learns its prediction.

`L = L_s + w_u L_main(tau) + w_p L_PIM(alpha) + w_d L_SD`. Inference knows nothing of the auxiliary classifier.

Letters: M candidates of the batch, K classes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ssod import dist
from ssod.detectors.base import Detector, full_precision
from ssod.errors import UserError
from ssod.nn.held import parameters_held, statistics_held
from ssod.ops.distill import foreground_weight
from ssod.ops.half import half_size
from ssod.ops.pseudo import reaches
from ssod.ops.views import everything
from ssod.strategies.aux_head import copied_classifier, with_classifier
from ssod.strategies.base import Plan, StepOutput
from ssod.strategies.foreground import JUDGED
from ssod.strategies.pairing import Paired, pair
from ssod.strategies.teacher_student import TeacherStudent, TeacherStudentOptions
from ssod.strategies.verdicts import Verdict, compared, judged, scores
from ssod.structures import Candidates, Instances, SemiBatch, View, Weights


class LSM(TeacherStudent):
    class Options(TeacherStudentOptions):
        tau: float = Field(0.7, ge=0, le=1, description="t, score from which a box teaches the main classifier")
        alpha: float = Field(0.5, ge=0, le=1, description="score from which a box teaches the auxiliary classifier")
        pim: bool = Field(True, description="learn at half size, by an auxiliary classifier, from boxes above alpha")
        distill: bool = Field(
            True, description="the main classifier learns the auxiliary one's predictions between alpha and tau"
        )
        pim_weight: float = Field(0.5, ge=0, description="w_p, weight of the half-size images' loss")
        distill_weight: float = Field(1.0, ge=0, description="w_d, weight of the self-distillation")

    options: Options

    def __init__(self, student: Detector, options: Options, plan: Plan) -> None:
        _check(student, options)
        super().__init__(student, options, plan)
        self.aux = copied_classifier(student) if options.pim else None

    def supervised(self, batch: SemiBatch, output: Any) -> dict[str, Tensor]:
        """The labelled images teach the auxiliary classifier, too, and by this term nothing but it."""
        losses = super().supervised(batch, output)
        if self.aux is not None:
            with parameters_held(self.student):
                half = self.half_output(batch.labeled)
                own = self.twin().loss(half, batch.labeled.targets, classes_only)
            losses["pim"] = self.options.pim_weight * torch.stack(list(own.values())).sum()
        return losses

    def unsupervised(self, batch: SemiBatch, step: int, output: Any) -> StepOutput:
        assert batch.weak is not None
        assert batch.strong is not None
        options = self.options
        seen = self.teacher_output(batch.weak)
        found = self.decode(seen, self.lowest())
        tau = self.thresholds_in_force()
        sure = [reaches(f, tau) for f in found]
        main, mapped = self.chosen_to_strong(batch, found, sure, everything(found))
        targets = [as_targets(m) for m in main]
        losses = self.student.loss(output, targets) | self.across_scales(batch, seen)
        out = self.step_output(losses, step, found, targets, options.tau)
        if self.aux is None:
            return out

        ramp = self.ramp(step)
        half = self.half_output(batch.strong)
        mined = self.twin().loss(half, [as_targets(m) for m in mapped])
        out.losses |= {f"pim/{k}": ramp * options.pim_weight * v for k, v in mined.items()}
        out.stats["pseudo/pim_per_image"] = sum(map(len, mapped)) / len(mapped)
        if options.distill:
            worth = partial(unsure, low=options.alpha, high=options.tau)
            pairs = pair(self.student, output, self.twin(), half, None, worth)
            loss, chosen = self_distillation(pairs, options.alpha, options.tau)
            out.losses["distill"] = ramp * options.distill_weight * loss
            out.stats["distill/per_image"] = chosen / len(mapped)
        return out

    def thresholds_in_force(self) -> Tensor:
        """Of the main classifier; the auxiliary one learns from alpha on."""
        return torch.full_like(self.label_counts, self.options.tau)

    def lowest(self) -> float:
        return self.options.alpha if self.options.pim else self.options.tau

    def judge(self, found: list[Instances]) -> list[Verdict]:
        """Boxes from alpha to tau are kept, too: they teach the auxiliary classifier, and boxes at half size."""
        tau, alpha = self.thresholds_in_force(), torch.full_like(self.label_counts, self.lowest())
        verdicts = []
        for f in found:
            mined = scores(f) > self.lowest()
            main = mined & reaches(f, tau)
            reasons = compared(f, tau[f.labels], main, "tau")
            low = compared(f, alpha[f.labels], mined, "alpha", below=": background")
            for i in (~main).nonzero().flatten().tolist():
                if not self.options.pim:
                    reasons[i] += ": background"
                elif mined[i]:
                    reasons[i] += f" and reaches alpha {self.options.alpha:.2f}: teaches at half size only"
                else:
                    reasons[i] = low[i]
            kept = mined if self.options.pim else main
            verdicts.append(judged(f, kept, as_targets(f[kept]), reasons, tau))
        return verdicts

    def twin(self) -> Detector:
        """The student with F_aux in the place of F_main."""
        assert self.aux is not None
        return with_classifier(self.student, self.aux)

    def half_output(self, view: View) -> Any:
        """The twin's raw output on a view at half size, in the frame of the full size.

        Running statistics stay those of full-size images, which inference sees.
        """
        twin = self.twin()
        images, sizes = half_size(view)
        with statistics_held(twin):
            return twin.head(twin.features(images, sizes, shift=1))


def as_targets(pseudo: Instances) -> Instances:
    """Hard targets: a pseudo box counts like an annotation, for class and box."""
    return Instances(pseudo.boxes, pseudo.labels)


def classes_only(candidates: Candidates) -> Weights:
    """Weights that leave of all losses those of the classifier: no box loss, and none of an RPN."""
    nothing = candidates.boxes.new_zeros(len(candidates.labels))
    return Weights(cls=nothing if candidates.stage == "rpn" else None, box=nothing)


def self_distillation(pairs: list[Paired], low: float, high: float) -> tuple[Tensor, Tensor]:
    """KL(F_aux || F_main), the mean over the candidates whose auxiliary score lies in [low, high], and their number.

    The score is the highest probability of a class; a sigmoid's KL is the sum of the binary ones of each class, a
    softmax's is over the classes and the background. Without any candidate 0, in the graph.
    """
    judged = next(p for p in pairs if p.stage in JUDGED)
    with full_precision(judged.logits):
        chosen = unsure(judged.target, judged.exclusive, low, high)  # [M]
        outcomes = _exclusive if judged.exclusive else _independent
        main, aux = outcomes(judged.logits.float()), outcomes(judged.target.detach().float())
        each = F.kl_div(main, aux, reduction="none", log_target=True).sum(dim=1)
        count = chosen.sum()
        return each.where(chosen, 0.0).sum() / dist.shared(count.float()), count


def unsure(logits: Tensor, exclusive: bool, low: float, high: float) -> Tensor:
    """Which candidates score within [low, high]: logits [M, K], or [M, K + 1] where exclusive -> bool [M]."""
    score = foreground_weight(logits, exclusive)
    return (score >= low) & (score <= high)


def _exclusive(logits: Tensor) -> Tensor:
    """Log probabilities of one of the classes and the background: [M, K + 1]."""
    return logits.log_softmax(dim=1)


def _independent(logits: Tensor) -> Tensor:
    """Log probabilities of yes and of no for each class: [M, 2 K]."""
    return torch.cat([F.logsigmoid(logits), F.logsigmoid(-logits)], dim=1)


def _check(student: Detector, options: LSM.Options) -> None:
    if options.distill and not options.pim:
        raise UserError(
            "strategy.distill=true learns from the auxiliary classifier that strategy.pim=false leaves out; "
            "set strategy.pim=true, or strategy.distill=false, too."
        )
    if options.pim and options.alpha > options.tau:
        raise UserError(
            f"strategy.alpha={options.alpha} is above strategy.tau={options.tau}: the auxiliary classifier is to learn "
            "from more boxes, not from fewer; lower strategy.alpha."
        )
    if options.pim and not student.spec["options"].get("half_scale"):
        raise UserError(
            "strategy=lsm looks at half-size images, which need one pyramid level more; set detector.half_scale=true, "
            "or strategy.pim=false strategy.distill=false."
        )
