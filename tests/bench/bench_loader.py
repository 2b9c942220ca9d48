"""Weak and strong pairs per second and core: ours against the usual recipe, torchvision's v2 on PIL images.

Both decode a 640 x 480 JPEG, resize it to a long side of 640, flip it (weak), add Unbiased Teacher's strong view
(colour jitter, gray, blur, three erasings) and hand over a batch as it would leave a worker; the last few batches stay
alive, as those that a loader has fetched ahead do. The contenders alternate in one process on one thread; the figures
are medians of process CPU time.

    python tests/bench/bench_loader.py [--images FOLDER] [--imgsz 640] [--rounds 7] [--pairs 32]
"""

from __future__ import annotations

import argparse
import os
import pickle
import random
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from unittest import mock

import numpy as np
import PIL
import torch
import torchvision
from common import Row, common_options, save
from PIL import Image, ImageFilter
from torchvision.transforms import v2

from ssod.data import batching, image
from ssod.data.loader import build_loader
from ssod.data.samples import Sample
from ssod.data.views import geometry, pixels
from ssod.data.views.transforms import pipeline

BATCH = 8
GOALS = {"ours, no extras": None, "ours, with `fast`": 6.0}
FETCHED_AHEAD = 3  # batches: two of a worker's prefetching, one in use


def textured(folder: Path, count: int, width: int = 640, height: int = 480) -> list[Path]:
    """JPEGs with the 1/f spectrum of photographs, quality 90."""
    rng = np.random.default_rng(0)
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    falloff = 1 / np.maximum(np.hypot(fy, fx), 1 / width)
    paths = []
    for i in range(count):
        spectrum = falloff * np.exp(2j * np.pi * rng.random((3, *falloff.shape)))
        planes = np.fft.irfft2(spectrum, (height, width))
        planes[1:] = 0.7 * planes[:1] + 0.3 * planes[1:]  # channels go together, as they do outdoors
        planes = 120 + 50 * planes / planes.std((1, 2), keepdims=True)
        paths.append(folder / f"{i}.jpg")
        Image.fromarray(planes.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)).save(paths[-1], quality=90)
    return paths


def _pil_blur(picture: Image.Image) -> Image.Image:
    """Half the time of v2's GaussianBlur with a kernel wide enough for sigma 2; papers' own code does this."""
    return picture.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def usual(paths: list[Path], imgsz: int) -> Callable[[int], object]:
    """Batches by the usual recipe: PIL, v2, float tensors, a list of dicts."""
    weak = v2.Compose([v2.RandomHorizontalFlip()])
    strong = v2.Compose(
        [
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.Lambda(_pil_blur)], 0.5),
        ]
    )
    to_tensor = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    erase = v2.Compose(
        [
            v2.RandomErasing(0.7, (0.05, 0.2), (0.3, 3.3), value="random"),
            v2.RandomErasing(0.5, (0.02, 0.2), (0.1, 6), value="random"),
            v2.RandomErasing(0.3, (0.02, 0.2), (0.05, 8), value="random"),
        ]
    )

    def batch(step: int) -> object:
        pairs = []
        for i in range(BATCH):
            with Image.open(paths[(step * BATCH + i) % len(paths)]) as opened:
                picture = opened.convert("RGB")
            size = geometry.fitted(picture.height, picture.width, imgsz)
            picture = weak(v2.functional.resize(picture, list(size)))
            pairs.append({"weak": to_tensor(picture), "strong": erase(to_tensor(strong(picture))), "index": i})
        return pairs

    return batch


def ours(paths: list[Path], imgsz: int) -> Callable[[int], object]:
    """Batches of the unlabelled stream of `build_loader`; one tiny labelled image pays for the labelled stream."""
    sizes = [Image.open(path).size for path in paths]
    samples = [Sample.unlabeled(path, i, *size) for i, (path, size) in enumerate(zip(paths, sizes, strict=True))]
    weak, strong = pipeline("weak", imgsz), pipeline("strong", imgsz)
    loader = build_loader(
        samples[:1],
        samples,
        batch=1,
        batch_unlabeled=BATCH,
        imgsz=imgsz,
        labeled_view=weak,
        weak=weak,
        strong=strong,
        seed=0,
        start_step=0,
        steps=10**6,
        workers=0,
    )
    dataset = loader.dataset
    assert dataset.unlabeled is not None  # type: ignore[attr-defined]

    def batch(step: int) -> object:
        with mock.patch.object(batching, "get_worker_info", return_value=True):  # as in a worker
            views = dataset._unlabeled(dataset.unlabeled, step, [])  # type: ignore[attr-defined]
            return [batching.parcel(view) for view in views]

    return batch


def without_extras(batch: Callable[[int], object]) -> Callable[[int], object]:
    """The same without OpenCV and simplejpeg."""
    rooms = (geometry, "cv2"), (pixels, "cv2"), (batching, "cv2"), (image, "simplejpeg")

    def plain(step: int) -> object:
        for room, name in rooms:
            mock.patch.object(room, name, None).start()
        try:
            return batch(step)
        finally:
            mock.patch.stopall()

    return plain


def handed_over(item: object) -> object:
    """Through the pickler of a worker's queue and back."""
    return pickle.loads(bytes(ForkingPickler.dumps(item)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of JPEGs; textured ones are made otherwise")
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pairs", type=int, default=32, help="pairs of a contender in a round")
    common_options(parser)
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.pairs, args.imgsz = 1, BATCH, 128
    torch.set_num_threads(1)
    if geometry.cv2 is not None:
        geometry.cv2.setNumThreads(0)
    random.seed(0)
    torch.manual_seed(0)

    with tempfile.TemporaryDirectory() as folder:
        paths = sorted(args.images.glob("*.jpg"))[:64] if args.images else textured(Path(folder), 16)
        if not paths:
            sys.exit(f"no .jpg in {args.images}")
        contenders = {"torchvision v2 on PIL": usual(paths, args.imgsz)}
        contenders["ours, no extras"] = without_extras(ours(paths, args.imgsz))
        if geometry.cv2 is not None and image.simplejpeg is not None:
            contenders["ours, with `fast`"] = ours(paths, args.imgsz)
        times: dict[str, list[float]] = {name: [] for name in contenders}
        ahead: dict[str, deque[object]] = {name: deque(maxlen=FETCHED_AHEAD) for name in contenders}
        batches = args.pairs // BATCH
        for turn in range(args.rounds + 1):  # the first round warms up
            for name, batch in contenders.items():
                began = time.process_time()
                for b in range(batches):
                    ahead[name].append(handed_over(batch(turn * batches + b)))
                times[name].append((time.process_time() - began) / (batches * BATCH))

    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    usual_time = medians["torchvision v2 on PIL"]
    extras = {m.__name__: m.__version__ for m in (geometry.cv2, image.simplejpeg) if m is not None}
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, Pillow {PIL.__version__}, {extras}")
    print(f"load {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores, {len(paths)} JPEGs, imgsz {args.imgsz}, 1 thread")
    print(f"{'':24s}{'pairs/s/core':>14s}{'ms/pair':>10s}{'ratio':>8s}{'spread':>9s}")
    for name, value in medians.items():
        spread = (max(times[name][1:]) - min(times[name][1:])) / value
        print(f"{name:24s}{1 / value:14.0f}{value * 1e3:10.2f}{usual_time / value:8.2f}{spread:9.0%}")
    rows = [
        Row(f"loader: {name} / torchvision", 1 / value, 1 / usual_time, GOALS[name], more=True, unit="pairs/s")
        for name, value in medians.items()
        if name in GOALS
    ]
    save(rows, args.json)


if __name__ == "__main__":
    main()
