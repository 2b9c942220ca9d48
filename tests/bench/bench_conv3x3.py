"""3x3 convolutions as they are and in Winograd's form, of many sizes: what the limits at the top of
ssod/ops/winograd.py (torch: training, a checkpoint's predictions) and ssod/deploy/onnx_winograd.py follow from.

    python tests/bench/bench_conv3x3.py [--rounds 15] [--only torch]

In onnxruntime a chain of three with a ReLU after each, as in a head (of one where the channels change), on one image;
in torch one convolution, channels last for Winograd's form, forward alone and forward with all gradients. A ratio below
1: Winograd's form is faster. In torch it is for CPUs without 512-bit vectors; others can be held to theirs:

    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python tests/bench/bench_conv3x3.py --only torch
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from common import Row, alternate, arguments, finish, head
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor

from ssod.deploy import onnx_winograd
from ssod.ops.winograd import conv3x3

# map's side, channels in, channels out
SIZES = [
    *((side, 256, 256) for side in (80, 40, 20, 12, 10)),
    *((side, 128, 128) for side in (80, 40, 20)),
    *((side, 96, 96) for side in (80, 28)),
    *((side, 64, 64) for side in (160, 80, 40)),
    *((40, 256, out) for out in (720, 80, 36)),
    (20, 512, 512),
]
# and images of a batch, for torch
BATCHES = [
    *((batch, 80, 256, 256) for batch in (1, 2)),
    *((batch, 40, 256, 256) for batch in (1, 2, 8)),
    *((batch, 20, 256, 256) for batch in (2, 4, 8, 16)),
    *((2, side, 128, 128) for side in (80, 40)),
    (8, 28, 128, 128),
    *((2, 80, width, width) for width in (112, 96, 64)),
    *((2, 40, 256, out) for out in (720, 80, 36)),
    *((batch, 20, 512, 512) for batch in (2, 8, 16)),
    (2, 39, 256, 256),
]


def main() -> None:
    parser = arguments(__doc__, rounds=15)
    parser.add_argument("--only", choices=("torch", "onnxruntime"))
    args = parser.parse_args()
    head(args, "onnxruntime", what="3x3 convolutions")
    rows = [] if args.only == "torch" else in_onnxruntime(args)
    if args.only != "onnxruntime":
        rows += [row for size in (BATCHES[-1:] if args.quick else BATCHES) for row in in_torch(*size, args)]
    finish(rows, args)


def in_torch(batch: int, side: int, c: int, k: int, args: argparse.Namespace) -> list[Row]:
    torch.manual_seed(0)
    weight, bias = torch.randn(k, c, 3, 3) * (2 / 9 / c) ** 0.5, torch.randn(k)
    x, grad = torch.randn(batch, c, side, side), torch.randn(batch, k, side, side)
    last = [t.contiguous(memory_format=torch.channels_last) for t in (x, grad)]

    def plain(*inputs: Tensor) -> Tensor:
        return F.conv2d(*inputs, padding=1)

    def learn(convolve: Callable[..., Tensor], x: Tensor, grad: Tensor) -> None:
        inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
        torch.autograd.grad(convolve(*inputs), inputs, grad)

    times = alternate(
        {
            "plain": lambda: plain(x, weight, bias),
            "other": lambda: conv3x3(last[0], weight, bias),
            "plain, learning": lambda: learn(plain, x, grad),
            "other, learning": lambda: learn(conv3x3, *last),
        },
        args,
    )
    what = f"torch, {batch} x {side} x {side}, {c} -> {k} channels"
    return [
        Row(what, times["other"], times["plain"]),
        Row(f"{what}, with gradients", times["other, learning"], times["plain, learning"]),
    ]


def in_onnxruntime(args: argparse.Namespace) -> list[Row]:
    # All of them, also those that the export leaves alone.
    onnx_winograd.LEAST_CHANNELS = onnx_winograd.LEAST_PLACES = onnx_winograd.WORTH_PLACES = 0
    rows = []
    for side, c, k in SIZES[-1:] if args.quick else SIZES:
        x = np.random.default_rng(0).standard_normal((1, c, side, side)).astype(np.float32)
        layers = 3 if c == k else 1
        plain, other = chain(c, k, side, layers), chain(c, k, side, layers)
        onnx_winograd.fewer_products(other, {"x": x})
        assert not any(n.op_type == "Conv" for n in other.graph.node)
        times = alternate({"plain": run(plain, x), "other": run(other, x)}, args)
        what = f"{side} x {side}, {c} -> {k} channels"
        rows.append(Row(what, times["other"] / layers, times["plain"] / layers))
    return rows


def chain(c: int, k: int, side: int, layers: int) -> ModelProto:
    rng = np.random.default_rng(1)
    nodes, weights, x = [], [], "x"
    for i in range(layers):
        kernel = rng.standard_normal((k, c, 3, 3)) * np.sqrt(2 / 9 / c)
        weights.append(numpy_helper.from_array(kernel.astype(np.float32), f"w{i}"))
        nodes.append(helper.make_node("Conv", [x, f"w{i}"], [f"c{i}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{i}"], [f"r{i}"]))
        x = f"r{i}"
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", c, side, side])],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, ["B", k, side, side])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def run(model: ModelProto, x: np.ndarray) -> Callable[[], object]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return lambda: session.run(None, {"x": x})


if __name__ == "__main__":
    main()
