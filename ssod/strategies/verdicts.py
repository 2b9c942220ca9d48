"""What becomes of each box that a teacher draws: as numbers, and in words.

Letters: N detections of one image, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssod.structures import Instances

FLOOR = 0.05  # score up to which no box is spoken of, unless the strategy looks lower


@dataclass(frozen=True)
class Verdict:
    """The detections of one image, and whether the student learns from them.

    found       in pixels of the view
    kept        bool [N]     a loss of the student has it as an object
    cls_weight  float32 [N]  its weight in the class loss, 0 where dropped; None: the strategy judges no single boxes
    box_weight  float32 [N]  the same of the box loss
    reasons     N short sentences, why it is kept or dropped
    tau         float32 [K]  thresholds in force, by class; None without any
    """

    found: Instances
    kept: Tensor
    cls_weight: Tensor | None
    box_weight: Tensor | None
    reasons: list[str]
    tau: Tensor | None = None

    def to(self, device: torch.device | str) -> Verdict:
        values = [None if t is None else t.to(device) for t in (self.cls_weight, self.box_weight, self.tau)]
        return Verdict(self.found.to(device), self.kept.to(device), values[0], values[1], self.reasons, values[2])


def judged(
    found: Instances,
    kept: Tensor,
    targets: Instances,
    reasons: list[str],
    tau: Tensor | None,
    alpha: Tensor | None = None,
) -> Verdict:
    """The verdict on detections of which those that are `kept`, bool [N], become `targets`.

    alpha  [K], what the losses of a class are multiplied by
    """
    each = 1.0 if alpha is None else alpha[targets.labels]
    weights = []
    for own in (targets.cls_weight, targets.box_weight):
        weight = found.boxes.new_zeros(len(found))
        weight[kept] = each if own is None else each * own
        weights.append(weight)
    return Verdict(found, kept, weights[0], weights[1], reasons, tau)


def unjudged(found: Instances, reason: str) -> Verdict:
    """The verdict of a strategy that neither keeps nor drops boxes."""
    none = torch.zeros(len(found), dtype=torch.bool, device=found.boxes.device)
    return Verdict(found, none, None, None, [reason] * len(found))


def compared(
    found: Instances, limits: Tensor, kept: Tensor, name: str, what: str = "score", below: str = ""
) -> list[str]:
    """A sentence for each detection: "score 0.43 is below its class's threshold 0.61".

    limits  [N], what the scores are held against, called `name`
    below   what is said besides of those that are not kept
    """
    rows = zip(scores(found).tolist(), limits.tolist(), kept.tolist(), strict=True)
    return [_sentence(score, limit, own, name, what, below) for score, limit, own in rows]


def _sentence(score: float, limit: float, kept: bool, name: str, what: str, below: str) -> str:
    digits = next((d for d in (2, 3, 4) if f"{score:.{d}f}" != f"{limit:.{d}f}"), 2)  # as many as tell them apart
    verb = "reaches" if kept else "is below"
    return f"{what} {score:.{digits}f} {verb} {name} {limit:.{digits}f}" + ("" if kept else below)


def scores(found: Instances) -> Tensor:
    assert found.scores is not None
    return found.scores


@contextmanager
def looking(networks: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, the networks are as at inference and nothing has a gradient; afterwards they are as before."""
    modes = [network.training for network in networks]
    try:
        for network in networks:
            network.eval()
        with torch.no_grad():
            yield
    finally:
        for network, mode in zip(networks, modes, strict=True):
            network.train(mode)
