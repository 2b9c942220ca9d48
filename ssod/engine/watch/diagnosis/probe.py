"""A look at the teacher outside of the training step: its scores below any threshold, its batch norms.

Both run it once without gradient. They draw nothing and change no buffer, so a run with them is the same run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssod.detectors.base import Detector
from ssod.strategies.base import Strategy
from ssod.structures import View

LOWEST = 0.001  # score below which nothing is looked at


@dataclass(frozen=True)
class Scores:
    """scores: of all detections of some images, descending; best: the highest of each image, 0 without any."""

    scores: list[float]
    best: list[float]

    @property
    def median_best(self) -> float:
        return sorted(self.best)[len(self.best) // 2]

    def threshold(self, per_image: float) -> float | None:
        """The score that `per_image` boxes an image reach, rounded down to two digits; None where there are fewer."""
        wanted = max(1, round(per_image * len(self.best)))
        if len(self.scores) < wanted:
            return None
        return max(0.01, int(self.scores[wanted - 1] * 100) / 100)


@torch.no_grad()
def teacher_scores(strategy: Strategy, views: Sequence[View]) -> Scores:
    """What the teacher scores on weak views, as its strategy holds it against the threshold."""
    teacher = strategy.teacher
    assert teacher is not None
    found = [d.scores for view in views for d in strategy.label(view, LOWEST, by=teacher)]
    scores = [s.tolist() for s in found if s is not None]
    return Scores(sorted((s for one in scores for s in one), reverse=True), [max(s, default=0.0) for s in scores])


@dataclass(frozen=True)
class NormGap:
    """How far a batch norm's running statistics are from those of the images it is used on.

    name     its path in the network
    gap      mean over the channels of |log(standard deviation here / running one)| + |difference of means| / running
             standard deviation; not finite where the statistics are not
    batches  that its statistics were made from
    """

    name: str
    gap: float
    batches: int


@torch.no_grad()
def norm_gaps(network: Detector, view: View) -> list[NormGap]:
    """Of each batch norm with running statistics, in the order of the network; [] where all of them are fixed.

    network  in eval mode: it uses its running statistics and keeps them
    """
    norms = {m: n for n, m in network.named_modules() if isinstance(m, _BatchNorm) and m.running_var is not None}
    gaps: dict[_BatchNorm, Tensor] = {}

    def measure(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, _BatchNorm)
        gaps.setdefault(module, _gap(inputs[0].float(), module))

    hooks = [norm.register_forward_pre_hook(measure) for norm in norms]
    try:
        if norms:
            network.features(view.images, view.sizes)
    finally:
        for hook in hooks:
            hook.remove()
    return [NormGap(norms[m], gap, int(_tracked(m))) for m, gap in zip(gaps, _together(gaps), strict=True)]


def _gap(x: Tensor, norm: _BatchNorm) -> Tensor:
    """x [B, C, ...] -> []."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    x = x.transpose(0, 1).flatten(1)  # [C, N]
    running = (norm.running_var + norm.eps).sqrt()
    here = (x.var(1, unbiased=False) + norm.eps).sqrt()
    return ((here / running).log().abs() + (x.mean(1) - norm.running_mean).abs() / running).mean()


def _together(gaps: dict[_BatchNorm, Tensor]) -> list[float]:
    """In one transfer."""
    return torch.stack(list(gaps.values())).tolist() if gaps else []


def _tracked(norm: _BatchNorm) -> Tensor | int:
    return 0 if norm.num_batches_tracked is None else norm.num_batches_tracked
