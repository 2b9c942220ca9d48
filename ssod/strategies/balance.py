"""RPL's dynamic thresholds and re-weighting by class (Li et al., "Rethinking Pseudo Labels for Semi-Supervised Object
Detection", 2022, Eq. 6) as a part of any strategy with a teacher: its options, its running sums, and a student's losses
that are weighted by these and feed them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ssod import dist
from ssod.detectors.base import Detector
from ssod.ops.certainty import TAU_RANGE, class_sums, class_thresholds, class_weights, relative_certainty
from ssod.strategies.foreground import JUDGED, foreground_certainty
from ssod.strategies.teacher_student import TeacherStudentOptions
from ssod.structures import Candidates, Instances, Weigh, Weights

MEMORY = 0.999  # highest decay of the sums a step: about the last 1000 steps
REWEIGHTED = (*JUDGED, "aux")  # an RPN's candidates and an encoder's proposals have no class to weigh them by


class BalanceOptions(TeacherStudentOptions):
    gamma1: float = Field(0.0, ge=0, description="how far thresholds follow the classes' certainty, as in RPL; 0 = off")
    gamma2: float = Field(0.0, ge=0, description="how far weights favour rare, uncertain classes, as in RPL; 0 = off")
    max_weight: float = Field(10.0, ge=1, description="bound of a class's weight, which a class never seen gets")


class Balance(nn.Module):
    """Thresholds and weights of K classes.

    sums          float32 [2, K]  decayed, over all ranks: certainty of the foreground candidates of each class, and
                                  how many there were. Saved with the strategy
    with_quality  certainty is p * v, v the localisation quality of the student's codec; otherwise p alone
    """

    sums: Tensor

    def __init__(self, num_classes: int, options: BalanceOptions, with_quality: bool) -> None:
        super().__init__()
        self.options = options
        self.with_quality = with_quality
        self.register_buffer("sums", torch.zeros(2, num_classes))

    @property
    def active(self) -> bool:
        return self.options.gamma1 > 0 or self.options.gamma2 > 0

    def fade(self, step: int) -> None:
        """To be called at the start of each step, which counts from 0."""
        # About the latter half of the steps so far: what an untrained student was certain of must not linger.
        self.sums *= min(MEMORY, step / (step + 2))

    def thresholds(self, tau: float) -> Tensor:
        """tau_m [K], Eq. 6."""
        return class_thresholds(self.sums, tau, self.options.gamma1)

    def lowest(self, tau: float) -> float:
        """What no class's threshold is ever below."""
        return TAU_RANGE[0] if self.options.gamma1 else tau

    def weights(self) -> Tensor:
        """alpha_m [K], Eq. 6."""
        return class_weights(self.sums, self.options.gamma2, self.options.max_weight)

    def loss(
        self, student: Detector, output: Any, targets: list[Instances], alpha: Tensor | None, own: Weigh | None = None
    ) -> dict[str, Tensor]:
        """The student's losses, those of foreground candidates of class m times alpha_m (Eq. 2), class and box alike;
        what the student makes of these candidates enters the sums.

        output  the student's raw output; targets: of each image
        alpha   [K], None = 1
        own     the strategy's own weights of candidates, which alpha multiplies
        """
        if not self.active:
            return student.loss(output, targets, own)
        seen = torch.zeros_like(self.sums)

        def weigh(candidates: Candidates) -> Weights:
            if candidates.stage in JUDGED:
                labels, certainty = foreground_certainty(student, output, candidates, self.with_quality)
                seen.add_(class_sums(labels, certainty, student.num_classes))
            weights = Weights() if own is None else own(candidates)
            if alpha is None or candidates.stage not in REWEIGHTED:
                return weights
            each = alpha[candidates.labels.clamp(0, len(alpha) - 1)].where(candidates.matched >= 0, 1.0)  # [M]
            cls, box = (each if w is None else each * w for w in (weights.cls, weights.box))
            return replace(weights, cls=cls, box=box)

        losses = student.loss(output, targets, weigh)
        self.sums += dist.all_reduce_sum(seen)
        return losses

    def stats(self, tau: Tensor, alpha: Tensor) -> dict[str, Tensor | float]:
        """What the log holds of thresholds and weights [K] in use."""
        return {
            "pseudo/tau_min": tau.min(),
            "pseudo/tau_max": tau.max(),
            "pseudo/alpha_min": alpha.min(),
            "pseudo/alpha_max": alpha.max(),
        }

    def by_class(self, tau: float) -> dict[str, Tensor]:
        """See `Strategy.by_class`."""
        return {"certainty": relative_certainty(self.sums), "tau": self.thresholds(tau), "alpha": self.weights()}
