"""Time of one supervised training step (forward, loss, backward) against torchvision's detectors.

    python tests/bench/bench_step.py --size 320 --batch 2 --rounds 5

Ours and theirs alternate in one process at one thread; the figure is process CPU time, the median over the rounds, and
the ratio of medians. Both sides: ResNet-50 with frozen batch norms, stem and first stage frozen, FPN of 256 channels.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median

import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.models.detection import FCOS, FasterRCNN
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from ssod.detectors import build_detector
from ssod.structures import Instances

Step = Callable[[], object]
NUM_CLASSES = 80


def peer(name: str, size: int) -> nn.Module:
    body = resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
    if name == "fcos":
        extra = LastLevelP6P7(256, 256)
        backbone = _resnet_fpn_extractor(body, 3, returned_layers=[2, 3, 4], extra_blocks=extra)
        return FCOS(backbone, NUM_CLASSES, min_size=size, max_size=size)
    return FasterRCNN(_resnet_fpn_extractor(body, 3), NUM_CLASSES + 1, min_size=size, max_size=size)


def their_step(name: str, model: nn.Module, images: Tensor, targets: list[Instances], bf16: bool) -> Step:
    first = 0 if name == "fcos" else 1
    wanted = [{"boxes": t.boxes, "labels": t.labels + first} for t in targets]
    pixels = list(images.float() / 255)

    def step() -> None:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            losses = model(pixels, wanted)
        sum(losses.values()).backward()

    return step


def our_step(model: nn.Module, images: Tensor, targets: list[Instances], bf16: bool) -> Step:
    def step() -> None:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            output = model.head(model.features(images))
            losses = model.loss(output, targets)
        sum(losses.values()).backward()

    return step


def alternate(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Median CPU milliseconds of each step; one warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 1):
        for name, step in steps.items():
            start = time.process_time()
            step()
            if i:
                times[name].append(1000 * (time.process_time() - start))
    return {name: median(values) for name, values in times.items()}


def make_targets(batch: int, size: int, per_image: int = 7) -> list[Instances]:
    targets = []
    for _ in range(batch):
        corner = torch.rand(per_image, 2) * size * 0.6
        side = size * (0.05 + 0.35 * torch.rand(per_image, 2))
        targets.append(Instances(torch.cat([corner, corner + side], 1), torch.randint(0, NUM_CLASSES, (per_image,))))
    return targets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detectors", nargs="+", default=["fcos", "faster_rcnn"])
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (args.batch, 3, args.size, args.size), dtype=torch.uint8)
    targets = make_targets(args.batch, args.size)

    print(
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}, "
        f"{platform.processor() or platform.machine()}, 1 thread, load {os.getloadavg()[0]:.1f}; "
        f"{args.size} px, batch {args.batch}, medians of {args.rounds} rounds, CPU ms per step"
    )
    print(
        f"{'':12} {'theirs fp32':>12} {'ours fp32':>10} {'ratio':>6} {'ours bf16':>10} {'ratio':>6} {'theirs bf16':>12}"
    )
    for name in args.detectors:
        theirs = peer(name, args.size)
        ours = build_detector(name, NUM_CLASSES, frozen_norm=True, freeze=1)
        trained = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (theirs, ours)]
        assert abs(trained[0] - trained[1]) < 0.001 * trained[0], trained  # background has no codes in ours
        t = alternate(
            {
                "theirs": their_step(name, theirs, images, targets, False),
                "ours": our_step(ours, images, targets, False),
                "bf16": our_step(ours, images, targets, True),
                "theirs bf16": their_step(name, theirs, images, targets, True),
            },
            args.rounds,
        )
        print(
            f"{name:12} {t['theirs']:12.0f} {t['ours']:10.0f} {t['ours'] / t['theirs']:6.2f} {t['bf16']:10.0f} "
            f"{t['bf16'] / t['theirs']:6.2f} {t['theirs bf16']:12.0f}"
        )


if __name__ == "__main__":
    main()
