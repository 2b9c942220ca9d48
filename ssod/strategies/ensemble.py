"""Several networks that detect together: RPL's Table 3, as simple as it can be. No numbers of the paper say how."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssod.detectors.base import Detector
from ssod.ops.boxes import iou_matrix, nms
from ssod.structures import Instances


def fuse(found: Sequence[list[Instances]], conf: float, iou: float, max_det: int) -> list[Instances]:
    """Detections of E networks on the same B images become one list an image, by descending score.

    A box's score becomes the mean over the networks of what each gives the object there: its own score, of another
    network the best score of a box of the same class that overlaps by at least `iou`, 0 where there is none. Then the
    usual class-wise NMS at `iou`; boxes at or below `conf` are dropped, and the best `max_det` are kept.
    """
    return [_fuse_image([of_network[b] for of_network in found], conf, iou, max_det) for b in range(len(found[0]))]


def _fuse_image(parts: list[Instances], conf: float, iou: float, max_det: int) -> Instances:
    every = Instances.cat(parts)  # N boxes of all networks
    assert every.scores is not None
    if len(every) == 0:
        return every
    agree = (iou_matrix(every.boxes, every.boxes) >= iou) & (every.labels[:, None] == every.labels)  # [N, N]
    agree |= torch.eye(len(every), dtype=torch.bool, device=agree.device)  # an empty box overlaps not even itself
    support = torch.where(agree, every.scores, 0.0)  # [N, N]
    best: list[Tensor] = [s.amax(dim=1) for s in support.split([len(p) for p in parts], dim=1) if s.shape[1]]
    every.scores = torch.stack(best).sum(dim=0) / len(parts)  # a network without any box gives 0
    sure = every[every.scores > conf]
    assert sure.scores is not None
    return sure[nms(sure.boxes, sure.scores, sure.labels, iou)[:max_det]]


class Together(Detector):
    """Networks of the same classes, called as one detector is; it has no verbs of its own to train or export it by."""

    def __init__(self, networks: Sequence[Detector]) -> None:
        super().__init__()
        self.num_classes = networks[0].num_classes
        self.members = torch.nn.ModuleList(networks)

    def forward(
        self, images: Tensor, sizes: Tensor | None = None, conf: float = 0.05, iou: float = 0.6, max_det: int = 100
    ) -> list[Instances]:
        """Each member looks below `conf`, down to where the mean of all could still exceed it."""
        found = [m(images, sizes, conf / len(self.members), iou, max_det) for m in self.members]
        return fuse(found, conf, iou, max_det)
