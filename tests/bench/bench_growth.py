"""How things grow: a training step with the size of the image, the number of classes and the boxes of an image; the
memory of the index with the size of the set.

    python tests/bench/bench_growth.py [--detectors fcos faster_rcnn] [--rounds 3]

Each figure is compared with the one of the smallest setting. A step is forward, loss and backward of two images on
ResNet-18 in fp32. No goals: what is looked for is growth that is out of proportion.
"""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch
from bench_index import in_process, write_set
from common import Row, alternate, arguments, finish, head
from peers import DETECTORS, Step, our_step

from ssod.detectors import build_detector
from ssod.structures import Instances

BATCH = 2
SIZES, CLASSES, BOXES = (320, 640, 960), (20, 80, 365), (5, 50, 300)
IMAGES = (2_000, 20_000, 100_000)
PER_IMAGE = 7


def step(name: str, size: int, classes: int, boxes: int) -> Step:
    torch.manual_seed(0)
    model = build_detector(name, classes, "resnet18", frozen_norm=True, freeze=1).train()
    images = torch.randint(0, 256, (BATCH, 3, size, size), dtype=torch.uint8)
    targets = []
    for _ in range(BATCH):
        corner = torch.rand(boxes, 2) * size * 0.7
        side = size * (0.03 + 0.25 * torch.rand(boxes, 2))
        targets.append(Instances(torch.cat([corner, corner + side], 1), torch.randint(0, classes, (boxes,))))
    return our_step(model, images, targets, nullcontext)


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--detectors", nargs="+", default=["fcos", "faster_rcnn"], choices=DETECTORS)
    args = parser.parse_args()
    sizes, classes, boxes, images = SIZES, CLASSES, BOXES, IMAGES
    if args.quick:
        sizes, classes, boxes, images = (64, 128), (3, 6), (2, 4), (20, 60)
        args.detectors = args.detectors[:1]
    head(args, "torchvision", "timm", what=f"ResNet-18, batch {BATCH}")
    rows = []
    for name in args.detectors:
        # one thing grows, the others stay at their smallest
        settings = {("px", n): (n, classes[0], boxes[0]) for n in sizes}
        settings |= {("classes", n): (sizes[0], n, boxes[0]) for n in classes}
        settings |= {("boxes", n): (sizes[0], classes[0], n) for n in boxes}
        times = alternate({key: step(name, *given) for key, given in settings.items()}, args)
        for kind, values in (("px", sizes), ("classes", classes), ("boxes", boxes)):
            for n in values[1:]:
                what = f"step of {name}: {n} {kind} / {values[0]}"
                rows.append(Row(what, times[kind, n], times[kind, values[0]]))
    memory = {}
    for n in images:
        with tempfile.TemporaryDirectory() as folder:
            yaml = write_set(Path(folder) / "set", n, PER_IMAGE * n)
            memory[n] = in_process("ours", yaml, Path(folder) / "cache")["MB"]
    rows += [Row(f"index: {n} images / {images[0]}", memory[n], memory[images[0]], unit="MB") for n in images[1:]]
    finish(rows, args)


if __name__ == "__main__":
    main()
