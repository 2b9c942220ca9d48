"""What can be seen before the first step: classes, labels, the teacher's pace.

K classes everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ssod.detectors.class_rows import ClassMatch
from ssod.engine.watch.diagnosis.alarm import Alarm
from ssod.nn.backbone_weights import shortened
from ssod.strategies.base import Strategy

SLOW = 0.5  # half-life of the teacher, as a share of the steps in which it moves


def classes_differ(match: ClassMatch, strategy: Strategy) -> Alarm | None:
    """Weights of a whole detector that do not know all classes of the data."""
    known = {k for k, _ in match.pairs}
    new = [n for k, n in enumerate(match.names) if k not in known]
    if not new:
        return None
    # Rows that start anew say nothing yet. Without a supervised start the teacher labels with them from step one.
    untaught = not known and strategy.uses_unlabeled and strategy.plan.burn_in == 0
    way = (
        "give them a supervised start with burn_in=0.25"
        if untaught
        else "leave the supervised start (burn_in) long enough for them"
    )
    return Alarm(
        "classes_differ",
        "error" if untaught else "warning",
        f"the weights know {len(known)} of the {len(match.names)} classes; {shortened(new)}: not found {match.how}, "
        f"learnt anew. If they are classes of the weights under other names, take those names in `names:` of the "
        f"data YAML; otherwise {way}.",
        {"classes": len(match.names), "known": len(known)},
    )


def missing_labels(labeled: np.ndarray, val: np.ndarray, names: Sequence[str], images: int) -> list[Alarm]:
    """Classes without any labelled box: errors where validation has them, warnings where nothing has.

    labeled, val  int64 [K], boxes of each class in the `images` labelled images and in those for validation
    """
    scored = [n for n, a, b in zip(names, labeled, val, strict=True) if a == 0 and b > 0]
    unused = [n for n, a, b in zip(names, labeled, val, strict=True) if a == 0 and b == 0]
    found = []
    if scored:
        measured = int((val > 0).sum())
        found.append(
            Alarm(
                "no_labels",
                "error",
                f"none of the {images} labelled images has a box of {shortened(scored)}, so nothing can learn "
                f"{'it' if len(scored) == 1 else 'them'}, and the AP over the {measured} classes of val cannot exceed "
                f"{1 - len(scored) / measured:.2f}. Label an image of each, raise `labeled`, draw other images with "
                "another seed=, or take the names out of the data YAML.",
                {"labelled images": images, "boxes in val": _by_name(scored, names, val)},
            )
        )
    if unused:
        found.append(
            Alarm(
                "unused_class",
                "warning",
                f"neither the {images} labelled images nor val have a box of {shortened(unused)}. Label an image of "
                "each, or take the names out of the data YAML.",
                {"labelled images": images, "classes": len(unused)},
            )
        )
    return found


def slow_teacher(strategy: Strategy) -> Alarm | None:
    """A moving average so long that the teacher cannot follow the student within the run."""
    plan = strategy.plan
    decay, moving = strategy.decay_at(plan.iters - 1), plan.iters - plan.burn_in
    if strategy.teacher is None or decay is None or decay <= 0 or moving <= 0:
        return None
    half_life = math.log(0.5) / math.log(decay)
    if half_life <= SLOW * moving:
        return None
    better = decay_for(moving)
    return Alarm(
        "slow_teacher",
        "warning",
        f"the teacher's half-life of {half_life:.0f} steps is long against the {moving} steps in which it moves, so it "
        f"stays near what the student was long ago. Set ema_decay={better:g} (half-life: a tenth of these steps), or "
        "train longer.",
        {"half-life": half_life, "steps": moving, "ema_decay": plan.ema_decay, "suggested": better},
    )


def decay_for(steps: int) -> float:
    """The decay whose half-life is a tenth of `steps`, with two digits of its distance from 1."""
    rest = 1 - 0.5 ** (10 / max(steps, 10))
    return 1 - float(f"{rest:.2g}")


def _by_name(chosen: Sequence[str], names: Sequence[str], counts: np.ndarray) -> dict[str, float]:
    return {n: float(c) for n, c in zip(names, counts, strict=True) if n in chosen}
