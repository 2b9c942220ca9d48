"""Tiny detectors, views of noise, and strategies around them: what the strategies' tests share."""

from __future__ import annotations

import torch

from ssod.detectors import build_detector
from ssod.detectors.base import Detector
from ssod.strategies import build_strategy
from ssod.strategies.base import Plan, StepOutput, Strategy
from ssod.structures import Candidates, Instances, SemiBatch, View

SIZE, K = 64, 3
OPTIONS: dict[str, dict[str, object]] = {
    "fcos": {"fpn_channels": 32, "head_convs": 1},
    "retinanet": {"fpn_channels": 32, "head_convs": 1},
    "faster_rcnn": {"fpn_channels": 32, "box_head_width": 64, "test_proposals": 100, "roi_samples": 64},
    "deformable_detr": {"width": 32, "queries": 20, "encoder_layers": 1, "decoder_layers": 2, "feed_forward": 32},
}


def detector(name: str, **options: object) -> Detector:
    torch.manual_seed(0)
    return build_detector(name, K, "test_resnet", OPTIONS[name] | options)


def strategy(kind: str, name: str, detector_options: dict[str, object] | None = None, **options: object) -> Strategy:
    """A strategy of this kind on this detector; burn-in 0, tau as low as untrained scores are unless given."""
    built = build_strategy(kind, detector(name, **(detector_options or {})), options, Plan(10, 0, 0.9))
    return built.train()


def view(seed: int, boxes: list[list[float]] | None = None, flip: bool = False) -> View:
    """Two images of noise; `boxes` are annotations of the first. Flipped: the same pixels mirrored, and the matrix."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 255, (2, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    matrix = torch.eye(3, dtype=torch.float64)
    if flip:
        images = images.flip(-1)
        matrix = torch.tensor([[-1.0, 0, SIZE], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)
    first = Instances(torch.tensor(boxes), torch.arange(len(boxes)) % K) if boxes else Instances.empty()
    return View(images, torch.full((2, 2), SIZE), matrix.repeat(2, 1, 1), [first, Instances.empty()], [0, 1])


def batch() -> SemiBatch:
    """Labelled images, and unlabelled ones whose strong view is the weak one mirrored."""
    return SemiBatch(view(1, [[4.0, 4, 30, 40], [30, 20, 60, 60]]), view(2), view(2, flip=True))


def candidates(foreground: int, background: int, stage: str, divisor: float | None = None) -> Candidates:
    """Candidates of one image, foreground first; divided by their number unless given."""
    count = foreground + background
    matched = torch.tensor([0] * foreground + [-1] * background)
    labels = torch.tensor([1] * foreground + [K] * background)
    boxes = torch.tensor([[4.0 + i, 8, 30 + i, 40] for i in range(count)]).view(-1, 4)
    return Candidates(boxes, torch.zeros(count, dtype=torch.int64), labels, matched, stage, divisor or float(count))


def on_labeled(s: Strategy, batch: SemiBatch) -> dict[str, torch.Tensor]:
    """The losses of the labelled images alone."""
    return s.supervised(batch, s.student_output(batch.labeled))


def on_unlabeled(s: Strategy, batch: SemiBatch, step: int = 0) -> StepOutput:
    """What a step makes of the unlabelled images alone."""
    assert batch.strong is not None
    return s.unsupervised(batch, step, s.student_output(batch.strong))


def unsupervised(losses: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([v for k, v in losses.items() if k.startswith("unsup/")]).sum()
