"""Linear layers and 1x1 convolutions in float32 by oneDNN against torch's own, of the sizes that detectors have: what
`LEAST` of ssod/ops/products.py follows from.

    python tests/bench/bench_products.py [--rounds 9]

Forward alone, and forward with all gradients. A ratio below 1: oneDNN is faster. One thread; 1x1 convolutions of more
threads are oneDNN's on both sides.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import Row, alternate, arguments, finish, head
from torch import Tensor

from ssod.ops.products import convolve, linear

# What it is, rows, features in and out.
LINEAR = (
    ("the first of Faster R-CNN's box head", 1024, 12544, 1024),
    ("the second", 1024, 1024, 1024),
    ("feed-forward of Deformable DETR's encoder", 17000, 256, 1024),
    ("its projections", 17000, 256, 256),
    ("a decoder's projection", 600, 256, 256),
    ("small", 200, 128, 128),
)
# Images, map, channels in and out.
CONVOLUTIONS = ((2, 160, 64, 256), (2, 80, 512, 128), (2, 40, 256, 1024), (2, 20, 2048, 512), (2, 80, 512, 256))


def main() -> None:
    parser = arguments(__doc__, rounds=9)
    args = parser.parse_args()
    head(args, what="products of matrices")
    torch.manual_seed(0)
    rows = []
    for name, m, c, k in LINEAR[-2:] if args.quick else LINEAR:
        inputs = torch.randn(m, c), torch.randn(k, c) / c**0.5, torch.randn(k)
        rows += compared(f"{m} x {c} -> {k}, {name}", linear, F.linear, inputs, torch.randn(m, k), args)
    for b, side, c, k in CONVOLUTIONS[-1:] if args.quick else CONVOLUTIONS:
        inputs = torch.randn(b, c, side, side), torch.randn(k, c, 1, 1) / c**0.5, torch.randn(k)
        last = inputs[0].contiguous(memory_format=torch.channels_last), *inputs[1:]
        grad = torch.randn(b, k, side, side).contiguous(memory_format=torch.channels_last)
        what = f"{b} x {side} x {side}, {c} -> {k} channels"
        rows += compared(what, convolve, F.conv2d, last, grad, args)
    finish(rows, args)


def compared(
    what: str,
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    grad: Tensor,
    args: argparse.Namespace,
) -> list[Row]:
    leaves = [t.requires_grad_() for t in inputs]

    @torch.no_grad()
    def forward(form: Callable[..., Tensor]) -> None:
        form(*leaves)

    def learn(form: Callable[..., Tensor]) -> None:
        torch.autograd.grad(form(*leaves), leaves, grad)

    works = {"ours": ours, "theirs": theirs}
    alone = alternate({who: lambda f=f: forward(f) for who, f in works.items()}, args)
    learning = alternate({who: lambda f=f: learn(f) for who, f in works.items()}, args)
    return [
        Row(what, alone["ours"], alone["theirs"]),
        Row(f"{what}, with gradients", learning["ours"], learning["theirs"]),
    ]


if __name__ == "__main__":
    main()
