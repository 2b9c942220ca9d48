"""Time and peak memory of one training step of the four detectors, against torchvision (FCOS, RetinaNet, Faster R-CNN)
and transformers (Deformable DETR).

    python tests/bench/bench_step.py --size 640 --batch 2 --rounds 5 [--semi] [--device cuda]

A supervised step is forward, loss and backward (peers.py). With --semi a step of a mean teacher with as many unlabelled
images, the updates of optimizer and moving average included, theirs by the plainest loop (peers_semi.py).
Time: ours and theirs alternate in one process; on a CPU process time at one thread, on CUDA wall time after a
synchronisation; medians over the rounds. Memory: one fresh process for each side and mode, its peak above what the
imports took (CPU), or the allocator's peak (CUDA). Each side is then taken in its fastest mode, and both ratios are of
those.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import timm
import torch
import torchvision
from common import Row, common_options, save
from peers import DETECTORS, OUR_MODES, THEIR_MODES, Step, make_step
from peers_semi import make_semi_step

Key = tuple[str, str]  # (who, mode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detectors", nargs="+", default=list(DETECTORS), choices=DETECTORS)
    parser.add_argument("--size", type=int, default=640)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--semi", action="store_true", help="semi-supervised steps instead of supervised ones")
    parser.add_argument("--compile", action="store_true", help="also compiled, ours as by compile=true")
    parser.add_argument("--memory-of", nargs=3, metavar=("DETECTOR", "WHO", "MODE"), help="print bytes and leave")
    common_options(parser)
    args = parser.parse_args()
    if args.quick:
        args.size, args.batch, args.rounds, args.detectors = 128, 1, 1, ["fcos", "deformable_detr"]
    torch.set_num_threads(1)
    if args.memory_of:
        print(json.dumps(peak_memory(*args.memory_of, args)))
        return

    modes: list[Key] = [*(("theirs", m) for m in THEIR_MODES), *(("ours", m) for m in OUR_MODES)]
    if args.semi:
        modes.remove(("theirs", "bf16"))  # with channels_last it is faster
    if args.quick:
        modes = [("theirs", "fp32"), ("ours", "fp32"), ("ours", "bf16")]
    if args.compile:
        modes += [("theirs", "bf16 channels_last compile"), ("ours", "fp32 compile"), ("ours", "bf16 compile")]
    make = make_semi_step if args.semi else make_step
    where = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    print(
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}, {where}, "
        f"1 thread, load {os.getloadavg()[0]:.1f}, {time.strftime('%Y-%m-%d')}; "
        f"ResNet-50, {args.size} px, batch {args.batch}{f' + {args.batch}' if args.semi else ''}, "
        f"medians of {args.rounds} rounds"
    )
    rows, lines = [], []
    for name in args.detectors:
        times = alternate({key: make(name, *key, args.size, args.batch, args.device) for key in modes}, args)
        memory = {key: memory_in_fresh_process(name, *key, args) for key in modes}
        print(f"\n{name:28} {'ms':>8} {'GB':>6}")
        for key in modes:
            print(f"  {' '.join(key):26} {times[key]:8.0f} {memory[key] / 1e9:6.2f}")
        best = {who: min((k for k in modes if k[0] == who), key=times.__getitem__) for who in ("theirs", "ours")}
        a, b = best["ours"], best["theirs"]
        rows.append((name, a[1], b[1], times[a] / times[b], memory[a] / memory[b]))
        lines += table_rows(f"semi-supervised {name}" if args.semi else name, times, memory, a, b)
    print("\n| | ours | theirs | time | peak memory |\n|---|---|---|---|---|")
    for name, mine, other, ratio, space in rows:
        print(f"| {name} | {mine} | {other} | {ratio:.2f} | {space:.2f} |")
    save(lines, args.json)


def table_rows(name: str, times: dict[Key, float], memory: dict[Key, float], mine: Key, other: Key) -> list[Row]:
    """Of one detector, mine and other the fastest mode of each side: the goals are those of a CPU."""
    theirs, peer = times["theirs", "fp32"], "transformers" if "deformable_detr" in name else "torchvision"
    fp32, half = (0.7, None) if "deformable_detr" in name else (0.9, 0.55)
    return [
        Row(f"step of {name}, fp32 / {peer}", times["ours", "fp32"], theirs, fp32),
        Row(f"step of {name}, bf16 / {peer} fp32", times["ours", "bf16"], theirs, half),
        Row(f"step of {name}, fastest / {peer}, fastest", times[mine], times[other]),
        Row(f"memory of {name}, fastest / {peer}, fastest", memory[mine] / 1e9, memory[other] / 1e9, 0.9, unit="GB"),
    ]


def alternate(steps: dict[Key, Step], args: argparse.Namespace) -> dict[Key, float]:
    """Median milliseconds of each step; one warm-up round."""
    times: dict[Key, list[float]] = {key: [] for key in steps}
    for i in range(args.rounds + 1):
        for key, step in steps.items():
            start = now(args.device)
            step()
            if i:
                times[key].append(1000 * (now(args.device) - start))
    return {key: median(values) for key, values in times.items()}


def now(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def memory_in_fresh_process(name: str, who: str, mode: str, args: argparse.Namespace) -> float:
    words = [sys.executable, __file__, "--memory-of", name, who, mode]
    words += ["--size", str(args.size), "--batch", str(args.batch), "--device", args.device]
    words += ["--semi"] if args.semi else []
    found: float = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[-1])
    return found


def peak_memory(name: str, who: str, mode: str, args: argparse.Namespace) -> int:
    """Bytes at the peak of two steps: weights, gradients, activations, and what updates keep."""
    if name == "deformable_detr" and (who == "theirs" or args.semi):
        import transformers.models.deformable_detr.modeling_deformable_detr  # noqa: F401  imports are not the model's
    before = status("VmRSS")
    make = make_semi_step if args.semi else make_step
    step = make(name, who, mode, args.size, args.batch, args.device)
    for _ in range(2):
        step()
    return torch.cuda.max_memory_allocated() if args.device == "cuda" else status("VmHWM") - before


def status(key: str) -> int:
    """Bytes of a line of /proc/self/status. (`ru_maxrss` would begin with the memory of the parent process.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


if __name__ == "__main__":
    main()
