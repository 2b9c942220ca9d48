"""Co-mining (Wang et al., "Co-mining: Self-Supervised Learning for Sparsely Annotated Object Detection", AAAI 2021).

One network looks at two views of every image, the original o and the augmented a. What each view shows with confidence
and nobody has annotated becomes a target of the other view: `C_o = Y + P_a`, `C_a = Y + P_o` (Eq. 1), and
`L = L(P_o, C_o) + L(P_a, C_a)` (Eq. 2). No teacher, no moving average.

Only partly labelled images are mined; unlabelled ones, where a run has them, are partly labelled with nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ssod.detectors.base import Detector, HasRegions, HasSlots
from ssod.errors import UserError
from ssod.ops.boxes import iou_matrix
from ssod.ops.host import true_rows
from ssod.ops.suppression import nms_batch
from ssod.ops.views import between, everything, into_views
from ssod.strategies.base import Plan, StepOutput, Strategy, StrategyOptions
from ssod.strategies.verdicts import FLOOR, Verdict, judged, looking, scores
from ssod.structures import DenseOutput, Instances, SemiBatch, View

# Of a detection, by whether its object is annotated; None: it is not sure enough to ask.
_REASONS = {
    False: "its class score is above tau {tau:.2f}, and nobody has annotated it: teaches the other view",
    True: "an annotated box of its class overlaps it by more than theta2 {theta2:.2f}: no new object",
    None: "its class score does not reach tau {tau:.2f}: background where nothing is annotated",
}


class CoMining(Strategy):
    class Options(StrategyOptions):
        tau: float = Field(0.6, ge=0, le=1, description="class score above which a box is mined")
        theta1: float = Field(0.5, gt=0, le=1, description="class-wise NMS threshold of the mined boxes")
        theta2: float = Field(
            0.4, ge=0, le=1, description="a box that overlaps an annotated one of its class by more is no new object"
        )
        mine: bool = Field(True, description="false: both views learn from the annotations alone (baseline `joint`)")
        mine_from: int = Field(
            0, ge=0, description="first step at which partly labelled images are mined; before it as `joint`"
        )
        max_boxes: int = Field(100, ge=1, description="most boxes of one image after the NMS")
        weight: float = Field(1.0, ge=0, description="w_u, weight of the unlabelled images' loss")

    options: Options
    needs_unlabeled = False
    mines = True

    def __init__(self, student: Detector, options: Options, plan: Plan) -> None:
        super().__init__(student, options, plan, with_teacher=False)

    def forward(self, batch: SemiBatch, step: int) -> StepOutput:
        """Losses of the labelled images under sup/, of the unlabelled ones under unsup/: sums over both views.

        Raises UserError unless the labelled images come in two views.
        """
        check_two_views(batch.labeled)
        views = [batch.labeled]
        if batch.weak is not None and batch.strong is not None:
            views.append(View.cat([batch.weak, batch.strong]))
        output, *unlabeled = self.student_outputs(views)
        wanted = [partly and step >= self.options.mine_from for partly in partly_labeled(batch.labeled)]
        losses, mined = self.learn(output, batch.labeled, wanted)
        out = StepOutput({f"sup/{k}": v for k, v in losses.items()}, statistics(mined, "mined"))
        if unlabeled:
            losses, mined = self.learn(unlabeled[0], views[1], [True] * len(views[1]))
            out.losses.update({f"unsup/{k}": self.options.weight * v for k, v in losses.items()})
            out.stats.update(statistics(mined, "mined/unlabeled"))
        return out

    def learn(self, output: Any, views: View, wanted: list[bool]) -> tuple[dict[str, Tensor], list[Instances]]:
        """L_o + L_a by name, each divided by what it counts itself, and what was mined.

        output  raw output of both views
        views   B images in view o, then the same in view a
        wanted  2 B flags: whether an image may be mined
        The second result has an entry for each mined image and view: the boxes that this view learns from.
        """
        wanted = [w and self.options.mine for w in wanted]
        mined = [t[:0] for t in views.targets]
        if any(wanted):
            mined = exchanged(self.mine(output, views, wanted), views)
        targets = [joined(y, p) for y, p in zip(views.targets, mined, strict=True)]
        half = len(views) // 2
        losses: dict[str, Tensor] = {}
        for own, learned in zip(output.split([half, half]), (targets[:half], targets[half:]), strict=True):
            for name, value in self.student.loss(own, learned).items():
                losses[name] = losses[name] + value if name in losses else value
        return losses, [p for p, w in zip(mined, wanted, strict=True) if w]

    @torch.no_grad()
    def label(self, view: View, conf: float, by: Detector) -> list[Instances]:
        output = by.head(by.features(view.images, view.sizes))
        return confident(by, output, conf, self.options.theta1, self.options.max_boxes)

    def thresholds_in_force(self) -> Tensor | None:
        return torch.full((self.student.num_classes,), self.options.tau) if self.options.mine else None

    def verdicts(self, views: Iterable[View], step: int) -> list[Verdict]:
        """What each view gives to the other one: the boxes that are kept are those of `mine`.

        views  of partly labelled images with their annotations, `complete` telling them from others; without
               `complete`, of unlabelled images
        """
        out: list[Verdict] = []
        o = self.options
        with looking([self.student]):
            for view in views:
                output = self.student_output(view)
                sure = confident(self.student, output, o.tau, o.theta1, o.max_boxes)
                every = self.student.pseudo(output, FLOOR, o.theta1, o.max_boxes)
                out += map(self._verdict, sure, every, view.targets, self._unmined(view, step))
        return out

    def _unmined(self, view: View, step: int) -> list[str]:
        """Why nothing is mined in each image; empty where something may be."""
        if not self.options.mine:
            return ["strategy.mine=false: annotations alone teach"] * len(view)
        if view.complete is None:
            return [""] * len(view)
        if step < self.options.mine_from:
            return [f"partly labelled images are mined from step {self.options.mine_from}"] * len(view)
        return ["" if partly else "every object counts as annotated" for partly in partly_labeled(view)]

    def _verdict(self, sure: Instances, every: Instances, annotated: Instances, unmined: str) -> Verdict:
        """sure: what `mine` looks at; every: all detections, of which those with a class score below tau are added."""
        o = self.options
        doubtful = every[~overlapping(every, sure, o.theta1)]
        known = overlapping(sure, annotated, o.theta2)
        kept = torch.cat([~known, known.new_zeros(len(doubtful))])
        reasons = [_REASONS[k].format(**o.model_dump()) for k in known.tolist()]
        reasons += [_REASONS[None].format(**o.model_dump())] * len(doubtful)
        if unmined:
            kept, reasons = torch.zeros_like(kept), [unmined] * len(kept)
        found = Instances.cat([sure, doubtful])
        order = scores(found).argsort(descending=True, stable=True)
        found, kept, reasons = found[order], kept[order], [reasons[i] for i in order.tolist()]
        return judged(
            found, kept, Instances(found.boxes[kept], found.labels[kept]), reasons, self.thresholds_in_force()
        )

    @torch.no_grad()
    def mine(self, output: Any, view: View, wanted: list[bool]) -> list[Instances]:
        """Confident boxes of each image that nobody has annotated, in pixels of the view; none in unwanted images."""
        o = self.options
        found = confident(self.student, output, o.tau, o.theta1, o.max_boxes)
        asked = [f if w else f[:0] for f, w in zip(found, wanted, strict=True)]
        return unannotated(asked, view.targets, o.theta2)


def check_two_views(view: View) -> None:
    """Raises UserError unless the halves of a labelled batch are views of the same images in the same order."""
    half = len(view) // 2
    if not half or view.indices[:half] != view.indices[half:]:
        raise UserError(
            "strategy=comining learns from two views of each labelled image and augment.labeled gives one; set "
            "augment=comining, or augment.labeled to a list of two views such as [weak, comining]."
        )


def exchanged(found: list[Instances], views: View) -> list[Instances]:
    """What was found in each of two views, B images in one and then the same in the other: in the pixels, and at the
    places, of the other one. What is clipped away there is dropped."""
    half = len(views) // 2
    into = between(views.matrices, views.matrices.roll(half, 0))
    ((moved, _),) = into_views(found, [everything(found)], into, views.sizes.roll(half, 0))
    return moved[half:] + moved[:half]


def partly_labeled(view: View) -> list[bool]:
    """Whether objects of each image may be without annotation."""
    return [False] * len(view) if view.complete is None else [not each for each in view.complete]


def confident(detector: Detector, output: Any, tau: float, theta1: float, most: int) -> list[Instances]:
    """Detections of each image whose class score is above tau, after class-wise NMS, at most `most` of them.

    In the NMS boxes stand in the order of the detector's own score: FCOS ranks by sqrt(class score * centerness), but
    tau is held against the class score alone (section "Co-Generation" and the authors' code). Two-stage detectors
    know class scores of regions only, so theirs are those that they report.
    """
    if isinstance(detector, HasRegions):
        return detector.pseudo(output, tau, theta1, most)
    if isinstance(detector, HasSlots):
        every = detector.slots(output).logits[-1, 0].numel()  # not cut off before the NMS
        found = detector.pseudo(output, tau, theta1, every)
        valid = pad_sequence([f.labels >= 0 for f in found], batch_first=True)
        boxes, score, labels = (
            pad_sequence(each, batch_first=True)
            for each in ([f.boxes for f in found], [scores(f) for f in found], [f.labels for f in found])
        )
        return [f[k] for f, k in zip(found, nms_batch(boxes, score, labels, valid, theta1, most), strict=True)]
    assert isinstance(output, DenseOutput)
    bound = torch.tensor(tau).logit().item()
    sure = output.logits.masked_fill(output.logits <= bound, -torch.inf)
    return detector.pseudo(replace(output, logits=sure), 0.0, theta1, most)


def unannotated(found: list[Instances], annotated: list[Instances], theta2: float) -> list[Instances]:
    """Boxes of each image that overlap no annotated box of the same class by more than theta2."""
    rows = true_rows([~overlapping(f, y, theta2) for f, y in zip(found, annotated, strict=True)])
    return [f[own] for f, own in zip(found, rows, strict=True)]


def overlapping(found: Instances, others: Instances, bound: float) -> Tensor:
    """bool [N]: which boxes of one image overlap another box of the same class by more than `bound`."""
    overlap = iou_matrix(found.boxes, others.boxes.float())  # [N, M]
    return ((overlap > bound) & (found.labels[:, None] == others.labels)).any(dim=1)


def joined(annotated: Instances, mined: Instances) -> Instances:
    """Y + P: a mined box counts like an annotation."""
    return Instances.cat([annotated, Instances(mined.boxes, mined.labels)])


def statistics(mined: list[Instances], name: str) -> dict[str, Tensor | float]:
    """Of the images and views that were mined: boxes of each, share of those with any, mean score of the boxes.

    Empty where nothing was looked at; without a score where nothing was found.
    """
    if not mined:
        return {}
    counts = [len(m) for m in mined]
    stats: dict[str, Tensor | float] = {
        f"{name}/per_image": sum(counts) / len(counts),
        f"{name}/share": sum(c > 0 for c in counts) / len(counts),
    }
    if any(counts):
        stats[f"{name}/score"] = torch.cat([scores(m) for m in mined]).mean()
    return stats
