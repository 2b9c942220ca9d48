"""Time and memory of deformable attention's forms against transformers' own function.

    python tests/bench/bench_deform_attn.py --rounds 7

All forms alternate in one process at one thread; the figure is process CPU time, the median over the rounds, and the
ratio to transformers' median. The memory is what a process of its own needs beyond its inputs, forward and backward.
Sizes are those of a 640 px batch: in the encoder every cell of the pyramid asks, in the decoder 300 queries do.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import transformers
from common import Row, common_options, save
from torch import Tensor
from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

from ssod.nn.deform_attn import attention_form, deform_attn

SHAPES = [(80, 80), (40, 40), (20, 20), (10, 10)]
CELLS = sum(h * w for h, w in SHAPES)
HEADS, DIM, POINTS = 8, 32, 4
PLACES = {"encoder": CELLS, "decoder": 300}
THEIRS, FASTEST = "transformers", "bags"
Form = Callable[[Tensor, Tensor, Tensor], Tensor]


def form(name: str) -> Form:
    def ours(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        with attention_form(name):
            return deform_attn(value, SHAPES, locations, weights)

    peer = MultiScaleDeformableAttention()
    return ours if name != THEIRS else lambda v, at, w: peer(v, None, SHAPES, None, at, w, 64)


def make_inputs(batch: int, queries: int, near: bool) -> list[Tensor]:
    """Samples a few cells around their query's place, as a fresh model takes them, or anywhere in the image."""
    torch.manual_seed(0)
    value = torch.randn(batch, CELLS, HEADS, DIM)
    locations = torch.rand(batch, queries, HEADS, len(SHAPES), POINTS, 2)
    if near:
        grids = [torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w) for h, w in SHAPES]
        places = torch.cat(grids).flip(1)  # (x, y) of every cell, [S, 2]
        if queries < CELLS:
            places = places[torch.randperm(CELLS)[:queries]]
        sizes = torch.tensor([[w, h] for h, w in SHAPES])[:, None]  # [L, 1, 2]
        locations = places[:, None, None, None] + 2 * torch.randn_like(locations) / sizes
    weights = torch.rand(batch, queries, HEADS, len(SHAPES) * POINTS).softmax(-1)
    weights = weights.view(batch, queries, HEADS, len(SHAPES), POINTS)
    return [t.requires_grad_() for t in (value, locations, weights)]


def alternate(forms: dict[str, Form], inputs: list[Tensor], rounds: int) -> dict[str, tuple[float, float]]:
    """Median CPU milliseconds of the forward pass, and of forward and backward; one warm-up round."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in forms}
    for i in range(rounds + 1):
        for name, run in forms.items():
            start = time.process_time()
            out = run(*inputs)
            middle = time.process_time()
            torch.autograd.grad(out, inputs, torch.ones_like(out))
            if i:
                times[name].append((1000 * (middle - start), 1000 * (time.process_time() - start)))
    return {name: (median(f for f, _ in t), median(b for _, b in t)) for name, t in times.items()}


def peak(name: str, inputs: list[Tensor]) -> float:
    """MB of this process's peak beyond what it held before (Linux with glibc)."""
    run = form(name)
    few = [inputs[0], *(t[:, :1] for t in inputs[1:])]
    torch.autograd.grad(run(*few).sum(), inputs[1])  # the code itself is loaded now, and is not counted
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # from here on the highest mark counts anew
    before = highest_mb()
    out = run(*inputs)
    torch.autograd.grad(out, inputs, torch.ones_like(out))
    return highest_mb() - before


def highest_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="+", default=["plain", "gather", "bags"])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak", nargs=2, metavar=("FORM", "PLACE"), help="print one figure of memory and end")
    common_options(parser)
    args = parser.parse_args()
    if args.quick:
        args.batch, args.rounds = 1, 1
        PLACES.pop("encoder")
    torch.set_num_threads(1)
    if args.peak:
        print(peak(args.peak[0], make_inputs(args.batch, PLACES[args.peak[1]], near=True)))
        return

    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{platform.processor() or platform.machine()}, 1 thread, load {os.getloadavg()[0]:.1f}; "
        f"batch {args.batch}, medians of {args.rounds} rounds"
    )
    print(f"{'':26} {'forward ms':>11} {'ratio':>6} {'and backward':>13} {'ratio':>6} {'peak MB':>8} {'ratio':>6}")
    names = [THEIRS, *args.forms]
    rows = []
    for place, queries in PLACES.items():
        command = [sys.executable, __file__, "--batch", str(args.batch), "--peak"]
        memory = {n: float(subprocess.check_output([*command, n, place], text=True)) for n in names}
        for near in (True, False):
            t = alternate({n: form(n) for n in names}, make_inputs(args.batch, queries, near), args.rounds)
            if near and FASTEST in t:
                mine, theirs = (t[n][1] for n in (FASTEST, THEIRS))
                rows.append(Row(f"attention in the {place}, both passes / transformers", mine, theirs))
            for name, (forward, both) in t.items():
                print(
                    f"{place} {'near' if near else 'far':4} {name:13} "
                    f"{forward:11.1f} {forward / t[THEIRS][0]:6.3f} {both:13.1f} {both / t[THEIRS][1]:6.3f} "
                    f"{memory[name]:8.0f} {memory[name] / memory[THEIRS]:6.2f}"
                )
    save(rows, args.json)


if __name__ == "__main__":
    main()
