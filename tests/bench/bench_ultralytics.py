"""Labelled images per second and core: ours against ultralytics' dataset, where that is installed.

ultralytics is AGPL-3.0 and no dependency of this project; nothing of it is used but its public loader, as a peer. Both
decode a 640 x 480 JPEG with ten boxes, resize it to a long side of 640, flip it, jitter its colours (hue, saturation,
brightness in HSV there, as a colour matrix here), and collate a batch of 8. Alternating in one process on one thread;
medians of process CPU time.

    python tests/bench/bench_ultralytics.py [--rounds 7] [--images 32]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from bench_loader import BATCH, handed_over, textured

from ssod.data.annotations.sources import load_data
from ssod.data.batching import parcel
from ssod.data.loader import build_loader
from ssod.data.views.transforms import pipeline

BOXES, IMGSZ = 10, 640


def make_set(root: Path, count: int) -> Path:
    """A YOLO set of textured images, each with BOXES boxes; returns its data YAML."""
    (root / "images").mkdir()
    (root / "labels").mkdir()
    rng = np.random.default_rng(0)
    for path in textured(root / "images", count):
        rows = np.concatenate([rng.integers(0, 3, (BOXES, 1)), rng.uniform(0.2, 0.4, (BOXES, 4))], axis=1)
        (root / "labels" / f"{path.stem}.txt").write_text(
            "\n".join(f"{int(r[0])} {r[1]} {r[2]} {r[3]} {r[4]}" for r in rows)
        )
    data = root / "data.yaml"
    data.write_text("path: .\ntrain: images\nnames: [a, b, c]\n")
    return data


def ours(data: Path) -> Callable[[int], object]:
    samples = load_data(data, "train").samples
    jitter = {"color": {"brightness": 0.4, "saturation": 0.7, "hue": 0.015, "p": 1.0}}
    weak = pipeline("weak", IMGSZ)
    loader = build_loader(
        samples,
        [],
        batch=BATCH,
        batch_unlabeled=0,
        imgsz=IMGSZ,
        labeled_view=pipeline([{"resize": {}}, {"flip": 0.5}, jitter], IMGSZ, "labeled"),
        weak=weak,
        strong=weak,
        seed=0,
        start_step=0,
        steps=10**6,
        workers=0,
    )
    return lambda step: parcel(loader.dataset[step].labeled)


def theirs(data: Path, count: int) -> Callable[[int], object]:
    from ultralytics.cfg import get_cfg
    from ultralytics.data.dataset import YOLODataset
    from ultralytics.utils import LOGGER

    LOGGER.setLevel("ERROR")
    off = dict.fromkeys(("mosaic", "mixup", "cutmix", "copy_paste", "degrees", "translate", "scale", "shear"), 0.0)
    hyp = get_cfg(overrides={**off, "hsv_h": 0.015, "hsv_s": 0.7, "hsv_v": 0.4, "fliplr": 0.5})
    dataset = YOLODataset(
        img_path=str(data.parent / "images"),
        imgsz=IMGSZ,
        augment=True,
        hyp=hyp,
        data={"names": {0: "a", 1: "b", 2: "c"}, "nc": 3, "channels": 3},
        task="detect",
        batch_size=BATCH,
    )
    return lambda step: YOLODataset.collate_fn([dataset[(step * BATCH + i) % count] for i in range(BATCH)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=32, help="images of a contender in a round")
    args = parser.parse_args()
    try:
        import ultralytics
    except ImportError:
        sys.exit("ultralytics is not installed; this benchmark is for those who have it anyway.")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = make_set(Path(folder), 16)
        contenders = {"ultralytics": theirs(data, 16), "ours": ours(data)}
        times: dict[str, list[float]] = {name: [] for name in contenders}
        batches = args.images // BATCH
        for turn in range(args.rounds + 1):  # the first round warms up
            for name, batch in contenders.items():
                began = time.process_time()
                for b in range(batches):
                    handed_over(batch(turn * batches + b))
                times[name].append((time.process_time() - began) / (batches * BATCH))
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    print(f"ultralytics {ultralytics.__version__}, torch {torch.__version__}, load {os.getloadavg()[0]:.2f}, 1 thread")
    for name, value in medians.items():
        print(f"{name:14s}{1 / value:8.0f} images/s/core   {medians['ultralytics'] / value:5.2f}x")


if __name__ == "__main__":
    main()
