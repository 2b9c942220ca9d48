"""The pseudo boxes by class: those that never come, and a mixture that is not the labels'.

Counted on the device where the boxes are, and read once a validation: a step waits for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ssod.engine.watch.diagnosis.alarm import Alarm
from ssod.nn.backbone_weights import shortened
from ssod.structures import Instances

DRY = 50.0  # boxes of a class that the images seen should have had, without one pseudo box of it
LEAST = 100  # pseudo boxes of an interval from which its mixture means something
DIVERGENCE = 0.5  # nats, KL(pseudo boxes || labels)
TIMES = 4.0  # a class's share of the pseudo boxes, in shares of the labels ...
LEAST_OF_CLASS = 30  # ... and boxes of it at least
INTERVALS = 2  # between validations, in a row


class ClassSupply:
    """Pseudo boxes of each of K classes.

    dry   [K]  boxes of the class that should have been in the images since its last pseudo box, going by the labels
    seen  [K]  pseudo boxes since the last validation
    """

    def __init__(self, rate: Tensor, names: Sequence[str]) -> None:
        """rate: float32 [K], labelled boxes of an image."""
        self.rate, self.names = rate, names
        self.dry, self.seen = torch.zeros_like(rate), torch.zeros_like(rate)
        self.drifting = 0  # intervals in a row

    def note(self, used: list[Instances]) -> None:
        """Count what the student learns from in some images."""
        if not used:
            return
        labels = torch.cat([one.labels for one in used])
        if self.rate.device != labels.device:
            self.rate, self.dry, self.seen = (t.to(labels.device) for t in (self.rate, self.dry, self.seen))
        # Not bincount, which would make a GPU wait for the host.
        counts = torch.zeros_like(self.seen).index_add_(0, labels, torch.ones_like(labels, dtype=self.seen.dtype))
        self.dry = (self.dry + self.rate * len(used)).where(counts == 0, 0.0)
        self.seen += counts

    def look(self) -> Iterator[Alarm]:
        """Alarms at a validation; begins the next interval."""
        dry, seen, rate = torch.stack([self.dry, self.seen, self.rate]).tolist()
        if sum(seen) > 0:  # without any there is another alarm
            yield from self._starving(dry)
        if sum(seen) >= LEAST and sum(rate) > 0:
            yield from self._mixture(seen, rate)
            self.seen = torch.zeros_like(self.seen)

    def _starving(self, dry: list[float]) -> Iterator[Alarm]:
        hungry = {n: d for n, d in zip(self.names, dry, strict=True) if d >= DRY}
        if hungry:
            most = max(hungry.values())
            yield Alarm(
                "class_starving",
                "warning",
                f"the teacher gives other classes pseudo boxes, and none of {shortened(list(hungry))}: going by the "
                f"labels there were {most:.0f} in the images since. Lower the threshold (thresholds of their own: "
                "strategy=mean_teacher with strategy.tau=auto and a lower strategy.tau_low, or strategy=rpl), label "
                "more images of them, or raise burn_in.",
                {"expected boxes": hungry},
            )

    def _mixture(self, seen: list[float], rate: list[float]) -> Iterator[Alarm]:
        boxes, labels = sum(seen), sum(rate)
        shares = [(s / boxes, r / labels) for s, r in zip(seen, rate, strict=True)]
        parts = [p * math.log(p / q) if p > 0 and q > 0 else 0.0 for p, q in shares]
        many = [s >= LEAST_OF_CLASS and p > TIMES * q > 0 for s, (p, q) in zip(seen, shares, strict=True)]
        self.drifting = self.drifting + 1 if sum(parts) > DIVERGENCE or any(many) else 0
        if self.drifting < INTERVALS:
            return
        worst = max(range(len(parts)), key=lambda k: parts[k])
        p, q = shares[worst]
        yield Alarm(
            "class_drift",
            "warning",
            f"the student learns other class frequencies than the labels': {self.names[worst]} is {p:.0%} of the "
            f"pseudo boxes and {q:.0%} of the labelled ones (divergence {sum(parts):.2f}). Give each class its own "
            "threshold (strategy=mean_teacher with strategy.tau=auto), raise strategy.tau, or lower strategy.weight; "
            "where the unlabelled images do differ so much, nothing is wrong.",
            {
                "divergence": sum(parts),
                "share of pseudo boxes": {n: a for n, (a, _) in zip(self.names, shares, strict=True)},
                "share of labels": {n: b for n, (_, b) in zip(self.names, shares, strict=True)},
            },
        )

    def state_dict(self) -> dict[str, Any]:
        return {"dry": self.dry.cpu(), "seen": self.seen.cpu(), "drifting": self.drifting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.dry, self.seen = (state[k].to(self.rate.device) for k in ("dry", "seen"))
        self.drifting = state["drifting"]
