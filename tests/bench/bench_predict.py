"""Time of `predict` on images in memory against the bare model on batches that are ready, at batch 8.

    python tests/bench/bench_predict.py best.pt best.onnx --rounds 7 [--batch 8] [--workers 2] [--size 480x640]

Both look at the same pixels; `predict` also resizes, stacks, maps boxes back and makes Results. Without --size images
have the size the model looks at, so nothing is resized. They alternate in one process with one thread of the model;
medians over the rounds of the times and of the ratio within a round.

On the CPU two ratios: CPU time of the thread that calls, in which the model runs, so what is asked of it beside the
model, where another core reads ahead; and CPU time of all threads, as if there were one core. Neither counts other
programs' load. On CUDA wall time.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

os.environ["OMP_NUM_THREADS"] = "1"  # onnxruntime reads it, too

import numpy as np
import torch

from ssod.data.batching import stack
from ssod.deploy.array_model import ArrayModel, OnArrays
from ssod.deploy.infer import OnTensors, look
from ssod.deploy.predictor import Predictor
from ssod.structures import Instances

LIMIT = 1.10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--size", help="HEIGHTxWIDTH of the images; default: what the model looks at")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"torch {torch.__version__}, {platform.processor() or platform.machine()}, 1 thread, "
        f"load {os.getloadavg()[0]:.1f}, {time.strftime('%Y-%m-%d')}; batch {args.batch}, {args.workers} workers, "
        f"medians of {args.rounds}"
    )
    print(
        "| model | image | bare, ms an image | predict, ms an image | ratio | all threads |\n|---|---|---|---|---|---|"
    )
    for path in args.models:
        predictor = Predictor(path, device=args.device, batch=args.batch, workers=args.workers)
        height, width = map(int, args.size.split("x")) if args.size else input_size(predictor)
        rng = np.random.default_rng(0)
        count = args.batch * args.batches
        images = [rng.integers(0, 255, (height, width, 3), dtype=np.uint8) for _ in range(count)]
        model = bare(predictor, images, args.batch)
        times = []
        for number in range(args.rounds + 1):
            pair = timed(model, args.device), timed(lambda: predictor(images), args.device)  # noqa: B023
            if number:
                times.append(pair)
        own, whole = (1000 * median(t[0] for t in side) / count for side in zip(*times, strict=True))
        ratio, everything = (median(b[k] / a[k] for a, b in times) for k in (0, 1))
        verdict = "" if ratio <= LIMIT else f" (more than {LIMIT:.2f})"
        row = f"{path.name} | {height}x{width} | {own:.2f} | {whole:.2f} | {ratio:.3f}{verdict} | {everything:.3f}"
        print(f"| {row} |", flush=True)


def input_size(predictor: Predictor) -> tuple[int, int]:
    """(height, width) that a landscape image of 3 : 4 has in front of the network."""
    return predictor._runner(1).fit.resized(480, 640)


def bare(predictor: Predictor, images: list[np.ndarray], batch: int) -> Callable[[], object]:
    """The model alone, as `predict` calls it, on batches that are ready."""
    runner = predictor._runner(batch)
    groups = [[runner.ready(p) for p in images[i : i + batch]] for i in range(0, len(images), batch)]
    if isinstance(runner, OnArrays):
        model: ArrayModel = runner.model
        fed = [(np.stack([r.image for r in g]), np.array([r.size for r in g], np.int32)) for g in groups]
        return lambda: [model.run(*one) for one in fed]
    assert isinstance(runner, OnTensors)
    views = [
        stack([r.frame for r in g], [Instances.empty()] * len(g), list(range(len(g))), runner.how.multiple)
        for g in groups
    ]
    return lambda: [look(runner.detector, view, runner.how) for view in views]


def timed(work: Callable[[], object], device: str) -> tuple[float, float]:
    """Seconds: of the calling thread, of all threads."""
    clocks = (time.thread_time, time.process_time) if device == "cpu" else (time.perf_counter, time.perf_counter)
    start = [clock() for clock in clocks]
    work()  # results are on the CPU when it returns, so a device has nothing left to do
    mine, everyones = (clock() - began for clock, began in zip(clocks, start, strict=True))
    return mine, everyones


if __name__ == "__main__":
    main()
