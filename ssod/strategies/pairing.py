"""Candidates that two networks both speak of, or one network on two views: what a learner distils from a judge.

Dense maps are paired by place. Regions need no pairing: both heads read the judge's. Queries have no place of their own
and are matched one-to-one.

Letters: B images, M candidates of the batch, F rows of them, P dense candidates of one image, R regions of one image,
Q queries, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssod.detectors.base import Detector, HasDense, HasRegions, HasSlots, full_precision
from ssod.detectors.set_loss import valid_extent
from ssod.ops.boxes import centers, clip
from ssod.ops.host import owners
from ssod.ops.hungarian import match_hungarian
from ssod.ops.places import same_grid, same_place, within
from ssod.ops.set_matching import pair_costs, to_centers, to_corners
from ssod.ops.views import between, everything, into_views, map_boxes, of_images
from ssod.structures import DenseOutput, Instances, SlotOutput

Worth = Callable[[Tensor, bool], Tensor]
REGIONS = 512  # of an image, the judge's best: as many as a region head sees in its own loss


@dataclass(frozen=True)
class Paired:
    """M candidates of the batch. The learner's numbers have a gradient, the judge's have none.

    stage           "dense"; "rpn", "roi"; "query", "encoder"
    image           int64 [M]   which image of the batch
    logits          [M, K]      the learner's; "rpn" and "encoder": K = 1; exclusive: [M, K + 1]
    target          as logits   the judge's
    exclusive       softmax over the classes, background last; otherwise a sigmoid for each class
    boxes           int64 [F] rows of the M -> the learner's boxes [F, 4] and the judge's, xyxy pixels of the learner's
                    view; asked for by rows, as few candidates are worth decoding
    quality         [M]         the learner's logits of the localisation quality (FCOS: centerness), None without any
    target_quality  [M]         the judge's
    """

    stage: str
    image: Tensor
    logits: Tensor
    target: Tensor
    exclusive: bool
    boxes: Callable[[Tensor], tuple[Tensor, Tensor]]
    quality: Tensor | None = None
    target_quality: Tensor | None = None


def pair(
    learner: Detector, output: Any, judge: Detector, seen: Any, matrices: Tensor | None, worth: Worth | None = None
) -> list[Paired]:
    """The candidates of each stage of a detector: "dense"; "rpn" and "roi"; or "query" and, with two stages, "encoder".

    output    raw output of the learner
    seen      raw output of the judge, a detector of the same kind, on the same images in another view
    matrices  float64 [B, 3, 3], pixels of the learner's view -> pixels of the judge's; None: one geometry, though one
              of them may have seen images of half the size
    worth     the judge's logits of the last stage's candidates, and whether their classes are exclusive, as in `Paired`
              -> bool [M], those that are paired; None: all. Of regions the learner reads no others: its head is the
              expensive one, as it has a gradient
    Where the views differ, only what both show is paired, and the judge's boxes are clipped to the learner's view.
    """
    if isinstance(learner, HasRegions):
        assert isinstance(learner, HasDense)
        assert isinstance(judge, HasDense)
        assert isinstance(judge, HasRegions)
        return [
            _dense("rpn", learner, output, judge, seen, matrices),
            _roi(learner, output, judge, seen, matrices, worth),
        ]
    if isinstance(learner, HasSlots):
        assert isinstance(judge, HasSlots)
        found = [_queries(learner, output, judge, seen, matrices, worth)]
        if learner.slots(output).dense is None:
            return found
        assert isinstance(learner, HasDense)
        assert isinstance(judge, HasDense)
        return [*found, _dense("encoder", learner, output, judge, seen, matrices)]
    assert isinstance(learner, HasDense)
    assert isinstance(judge, HasDense)
    return [_dense("dense", learner, output, judge, seen, matrices, worth)]


def _dense(
    stage: str,
    learner: HasDense,
    output: Any,
    judge: HasDense,
    seen: Any,
    matrices: Tensor | None,
    worth: Worth | None = None,
) -> Paired:
    """By place; one geometry and one grid need no search."""
    own = learner.dense(output)
    with torch.no_grad():
        other = judge.dense(seen)
        batch, count = own.logits.shape[:2]
        if matrices is None and same_grid(own, other):
            rows = there = None
            image = torch.arange(batch, device=own.logits.device).repeat_interleave(count)
        else:
            rows, there = _same_places(own, other, matrices)
            image = rows // count
        if worth is not None:
            kept = worth(_rows(other.logits, there), False).nonzero().squeeze(1)
            rows, there = (kept if r is None else r[kept] for r in (rows, there))
            image = image[kept]

    def boxes(chosen: Tensor) -> tuple[Tensor, Tensor]:
        mine = chosen if rows is None else rows[chosen]  # rows of the learner's B * P
        theirs = chosen if there is None else there[chosen]
        with full_precision(own.logits):
            found, _ = learner.codec.decode(_rows(own.codes, mine).float(), own.anchors[mine % own.logits.shape[1]])
            with torch.no_grad():
                anchors = other.anchors[theirs % other.logits.shape[1]]
                target, _ = judge.codec.decode(_rows(other.codes, theirs).float(), anchors)
            return found, _to_learner(target, image[chosen], own.pyramid.sizes, matrices)

    return Paired(
        stage,
        image,
        _rows(own.logits, rows),
        _rows(other.logits, there).detach(),
        False,
        boxes,
        None if own.quality is None else _rows(own.quality, rows),
        None if other.quality is None else _rows(other.quality, there).detach(),
    )


def _same_places(own: DenseOutput, other: DenseOutput, matrices: Tensor | None) -> tuple[Tensor, Tensor]:
    """The learner's candidates whose centre the judge sees, and the judge's there: int64 [M] rows of B * P each."""
    with full_precision(own.logits):
        batch = len(own.logits)
        if matrices is None:
            matrices = torch.eye(3, dtype=torch.float64, device=own.logits.device).expand(batch, 3, 3)
            shown = torch.ones(own.logits.shape[:2], dtype=torch.bool, device=own.logits.device)
        else:
            shown = within(own, other.pyramid.sizes, matrices)
        first = torch.arange(batch, device=own.logits.device)[:, None] * other.logits.shape[1]
        place = same_place(own, other, matrices) + first  # [B, P]
        return shown.flatten().nonzero().squeeze(1), place[shown]


def _rows(values: Tensor, rows: Tensor | None) -> Tensor:
    """Rows of the first two axes taken together, None = all: [B, P, ...] -> [M, ...]."""
    flat = values.flatten(0, 1)
    return flat if rows is None else flat.index_select(0, rows)  # whose gradient is cheaper than that of [rows]


def _roi(
    learner: HasRegions, output: Any, judge: HasRegions, seen: Any, matrices: Tensor | None, worth: Worth | None
) -> Paired:
    """The judge's proposals, read by both heads; boxes are those of the judge's best class."""
    sizes = output.pyramid.sizes
    with torch.no_grad():
        there = [regions[:REGIONS] for regions in judge.proposals(seen)]  # B tensors [R, 4]
        here = there
        if matrices is not None:
            unnamed = [Instances(r, torch.zeros(len(r), dtype=torch.int64, device=r.device)) for r in there]
            back = between(matrices, torch.eye(3).to(matrices))
            ((moved, shown),) = into_views(unnamed, [everything(unnamed)], back, sizes)
            here = [m.boxes for m in moved]
            there = [regions[index] for regions, index in zip(there, shown, strict=True)]
        counts = [len(regions) for regions in there]
        judged = judge.read(seen, there)
        image = owners(counts, judged.labels.device)
        target, logits = _to_learner(judged.boxes, image, sizes, matrices), judged.logits
        wanted = None if worth is None else worth(logits, True)
    said = learner.read(output, here, list(judged.labels.split(counts)), wanted)
    if said.rows is not None:
        image, target, logits = image[said.rows], target[said.rows], logits[said.rows]
    return Paired("roi", image, said.logits, logits, True, lambda rows: (said.boxes[rows], target[rows]))


def _queries(
    learner: HasSlots, output: Any, judge: HasSlots, seen: Any, matrices: Tensor | None, worth: Worth | None
) -> Paired:
    """Queries of the last layer, matched by the detector's own costs, with the judge's probabilities as labels."""
    own, other = learner.slots(output), judge.slots(seen)
    with full_precision(own.logits):
        extent, sizes = valid_extent(own.pyramid), own.pyramid.sizes
        corners = to_corners(own.boxes[-1].float()) * extent[:, None]  # [B, Q, 4] pixels
        with torch.no_grad():
            target, shown = _judged_queries(other, sizes, matrices)  # [B, Q', 4], [B, Q']
            probability = other.logits[-1].float().sigmoid()  # [B, Q', K]
            wanted = to_centers(target / extent[:, None])
            cost = pair_costs(own.logits[-1], own.boxes[-1], probability, wanted, learner.cost)  # [B, Q, Q']
            matched = match_hungarian(cost, shown)  # [B, Q]
            paired = matched >= 0
            if worth is not None:
                each = other.logits[-1].gather(1, matched.clamp(min=0).unsqueeze(-1).expand_as(own.logits[-1]))
                paired &= worth(each.flatten(0, 1), False).view_as(paired)
            image, query = paired.nonzero(as_tuple=True)  # [M]
            theirs = matched[image, query]
            target = target[image, theirs]
    boxes = corners[image, query]
    logits, judged = own.logits[-1][image, query], other.logits[-1][image, theirs].detach()
    return Paired("query", image, logits, judged, False, lambda rows: (boxes[rows], target[rows]))


def _judged_queries(other: SlotOutput, sizes: Tensor, matrices: Tensor | None) -> tuple[Tensor, Tensor]:
    """The judge's boxes in the learner's view [B, Q, 4], and whether their centres lie in it [B, Q]."""
    boxes = to_corners(other.boxes[-1].float()) * valid_extent(other.pyramid)[:, None]
    if matrices is None:
        return boxes, torch.ones(boxes.shape[:2], dtype=torch.bool, device=boxes.device)
    back = between(matrices, torch.eye(3).to(matrices))
    moved = map_boxes(boxes, back[:, None])
    center = centers(moved)
    shown = ((center >= 0) & (center <= sizes.flip(-1)[:, None])).all(dim=-1)
    return clip(moved, sizes[:, None]), shown


def _to_learner(boxes: Tensor, image: Tensor, sizes: Tensor, matrices: Tensor | None) -> Tensor:
    """Boxes [F, 4] of the judge's view, image int64 [F] -> in the learner's view, clipped to its sizes [B, 2]."""
    if matrices is None:
        return boxes
    back = of_images(between(matrices, torch.eye(3).to(matrices)), image)
    return clip(map_boxes(boxes, back), sizes[image])
