"""How certain a network is of its own foreground candidates: p of the assigned class and v of the box, of any detector.

Letters: M candidates of the batch, F of them foreground.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ssod.detectors.base import Detector, HasRegions
from ssod.ops.codecs import Codec
from ssod.ops.host import true_rows
from ssod.structures import Candidates, DenseOutput, SlotOutput

# Stages whose candidates have a class of their own: not an RPN's; of a DETR one layer.
JUDGED = ("dense", "roi", "query")


@runtime_checkable
class _HasCodec(Protocol):
    codec: Codec


@torch.no_grad()
def foreground_certainty(
    detector: Detector, output: Any, candidates: Candidates, with_quality: bool
) -> tuple[Tensor, Tensor]:
    """Labels int64 [F] of the foreground candidates of a stage in JUDGED, and their p * v [F] in 0 .. 1.

    output        raw output that the candidates were assigned on
    with_quality  multiply by the codec's localisation quality v; otherwise p alone
    """
    foreground = candidates.matched >= 0
    if candidates.stage == "roi":
        return _of_regions(detector, output, candidates, foreground, with_quality)
    (fg,) = true_rows([foreground])  # [F]
    labels = candidates.labels[fg]
    if len(fg) == 0:
        return labels, candidates.boxes.new_zeros(0)
    if candidates.stage == "query":
        assert isinstance(output, SlotOutput)
        return labels, output.logits[-1].flatten(0, 1)[fg, labels].float().sigmoid()
    assert isinstance(output, DenseOutput)
    certainty = output.logits.flatten(0, 1)[fg, labels].float().sigmoid()
    if with_quality:
        assert isinstance(detector, _HasCodec)
        _, quality = detector.codec.decode(output.codes.flatten(0, 1)[fg].float(), candidates.boxes[fg])
        assert quality is not None
        certainty = certainty * quality
    return labels, certainty


def _of_regions(
    detector: Detector, output: Any, candidates: Candidates, foreground: Tensor, with_quality: bool
) -> tuple[Tensor, Tensor]:
    assert isinstance(detector, HasRegions)
    of_image = true_rows([foreground & (candidates.image == b) for b in range(len(output.logits))])
    fg = torch.cat(of_image)  # [F], image by image
    labels = candidates.labels[fg]
    if len(fg) == 0:
        return labels, candidates.boxes.new_zeros(0)
    boxes = [candidates.boxes[rows] for rows in of_image]
    certainty = torch.cat(detector.classify(output, boxes)).gather(1, labels[:, None]).squeeze(1)  # of [F, K + 1]
    if with_quality:
        for refined, part in zip(detector.refine(output, boxes), certainty.split([len(b) for b in boxes]), strict=True):
            assert refined.quality is not None
            part *= refined.quality
    order = fg.argsort()
    return labels[order], certainty[order]
