"""The run's course: losses and weights that explode, labels lost on the way, a loader that is waited for, a teacher
behind its student, batch norms that do not fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from ssod.engine.watch.diagnosis.alarm import PATIENCE, Alarm
from ssod.engine.watch.diagnosis.probe import NormGap
from ssod.engine.watch.diagnosis.start import decay_for
from ssod.nn.backbone_weights import shortened
from ssod.strategies.base import Plan

WINDOW = 10  # log lines that a line is held against
LOSS = 10.0  # times the median loss of these
WEIGHTS = 5.0  # times the smallest norm of these
LOST = 0.1  # share of the labelled boxes that is left in the views
WAITING = 0.5  # share of the time
LEAST_WAIT = 2.0  # seconds in all, below which it does not matter
BEHIND = 0.05  # of the student's AP
LEAST_AP = 0.02  # below it AP is noise
NORM = (
    1.2  # mean gap of the batch norms, see `NormGap`: 0.3 to 0.5 on images like those it learnt from, 1.5 on dark ones
)
YOUNG = 30  # batches; a running mean of momentum 0.1 still holds 4 % of its start


@dataclass
class Explosion:
    """losses, norms: of the last lines, the supervised loss and the norm of the student's weights."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)

    def look(self, values: dict[str, float], norm: float, lr0: float, clip: float) -> Alarm | None:
        """One log line, and the norm of the student's weights now."""
        broken = [k for k, v in values.items() if k.startswith(("sup/", "unsup/")) and not math.isfinite(v)]
        loss = sum(v for k, v in values.items() if k.startswith("sup/"))
        limit = "clip_grad=10" if clip == 0 else f"a smaller clip_grad than {clip:g}"
        way = f"Set lr0={lr0 / 10:g} instead of {lr0:g}, a longer warmup_iters, or {limit}."
        if broken or not math.isfinite(norm):
            what = shortened(broken) if broken else "the norm of the weights"
            way += " If the run is in fp16, amp=bf16 or amp=false."
            return Alarm("not_finite", "error", f"{what} is no finite number any more. {way}", {"weights": norm})
        alarm = None
        if len(self.losses) >= WINDOW // 2 and loss > LOSS * median(self.losses):
            before = median(self.losses)
            text = f"the supervised loss is {loss:.3g} after {before:.3g} in the lines before: training diverges. {way}"
            alarm = Alarm("exploding", "error", text, {"loss": loss, "before": before, "lr0": lr0})
        elif self.norms and norm > WEIGHTS * min(self.norms):
            before = min(self.norms)
            text = f"the norm of the student's weights grew from {before:.3g} to {norm:.3g}: training diverges. {way}"
            alarm = Alarm("exploding", "error", text, {"weights": norm, "before": before, "lr0": lr0})
        self.losses, self.norms = [*self.losses, loss][-WINDOW:], [*self.norms, norm][-WINDOW:]
        return alarm


@dataclass
class LostLabels:
    """Labelled boxes before and after the view, since the last log line; lines: those in a row that lost nearly all."""

    before: int = 0
    after: int = 0
    lines: int = 0

    def note(self, before: int, after: int) -> None:
        self.before += before
        self.after += after

    def look(self) -> Alarm | None:
        before, after = self.before, self.after
        self.lines = self.lines + 1 if after < LOST * before else 0
        self.before = self.after = 0
        if self.lines < PATIENCE:
            return None
        return Alarm(
            "labels_clipped",
            "error",
            f"of {before} labelled boxes since the last log line {after} are left in the views of the labelled images; "
            "the others lie outside of them, and their objects are learnt as background. Weaken the crop, window, "
            "affine or resize in augment.labeled; `ssod check augment=...` draws the views.",
            {"annotated": before, "left": after},
        )


@dataclass
class Waiting:
    """Lines in a row in which the device waited; not kept, as a resumed run starts its loader anew."""

    lines: list[float] = field(default_factory=list)
    last: float = 0.0  # seconds of the last line

    def look(self, values: dict[str, float], workers: int, cache: bool) -> Alarm | None:
        share = values["time/data"]
        seconds = max(0.0, values["seconds"] - self.last)  # a run that goes back starts at 0
        self.last = values["seconds"]
        self.lines = [*self.lines, share * seconds] if share > WAITING else []
        # The first of them may be the start of the loader.
        if len(self.lines) <= PATIENCE or sum(self.lines[1:]) < LEAST_WAIT:
            return None
        more = f"workers={max(4, 2 * workers)}" if not cache else f"workers={max(4, 2 * workers)} or smaller images"
        text = (
            f"{share:.0%} of the time the device waits for images ({workers} workers). Give {more}"
            f"{'' if cache else ', cache=ram or cache=disk'}, or augment_on=device where augmentation takes long."
        )
        return Alarm("waiting_for_data", "warning", text, {"share": share, "workers": workers})


def teacher_behind(history: Sequence[dict[str, Any]], plan: Plan, decay: float | None) -> Alarm | None:
    """The last validations, in all of which the teacher was worse than the student that it teaches.

    decay  of the teacher now; None where it does not move, and its student is to be better
    """
    scored = [h for h in history if h["step"] > plan.burn_in and "teacher" in h and "student" in h][-PATIENCE:]
    pairs = [(h["student"]["AP"], h["teacher"]["AP"]) for h in scored]
    if decay is None or len(pairs) < PATIENCE or not all(s > LEAST_AP and s - t > BEHIND * s for s, t in pairs):
        return None
    student, teacher = pairs[-1]
    better = decay_for(plan.iters - plan.burn_in)
    way = f"ema_decay={better:g} lets it follow faster" if better < decay else "A longer burn_in makes it better"
    text = (
        f"in the last {PATIENCE} validations the teacher was worse than its student (AP {teacher:.3f} against "
        f"{student:.3f}), so its boxes hold the student back. {way}; lower strategy.weight until then."
    )
    return Alarm("teacher_behind", "warning", text, {"student AP": student, "teacher AP": teacher, "ema_decay": decay})


def wrong_norms(gaps: Sequence[NormGap]) -> Alarm | None:
    """Batch norms of the teacher whose statistics are not those of the images that it labels."""
    broken = [g.name for g in gaps if not math.isfinite(g.gap)]
    if broken:
        return Alarm(
            "teacher_norm",
            "error",
            f"{len(broken)} of the teacher's {len(gaps)} batch norms ({shortened(broken)}) have statistics that are no "
            "finite numbers, so its scores are none either. Start anew with a lower lr0, or with frozen_norm=true.",
            {"broken": len(broken), "norms": len(gaps)},
        )
    mean = sum(g.gap for g in gaps) / max(len(gaps), 1)
    if mean <= NORM:
        return None
    worst = max(gaps, key=lambda g: g.gap)
    if worst.batches < YOUNG:
        cause = f"They were made from {worst.batches} batches only: raise burn_in to {YOUNG} steps at least."
    else:
        cause = (
            "Either the unlabelled images look other than the labelled ones, or the teacher's average is too slow for "
            "the student: a lower ema_decay or a larger batch makes the statistics fit, frozen_norm=true with weights= "
            "fixes them."
        )
    return Alarm(
        "teacher_norm",
        "warning",
        f"the teacher's batch norms do not fit the unlabelled images: means and deviations of its features are "
        f"{mean:.1f} away from the running ones (0: the same; above {NORM:g}: wrong), most in {worst.name} "
        f"({worst.gap:.1f}), so its scores mean little. {cause}",
        {"gap": mean, "worst": worst.gap, "batches": worst.batches},
    )
