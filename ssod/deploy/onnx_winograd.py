"""3x3 convolutions of an ONNX graph with a quarter of the products, for float32 on a CPU.

It is the form of `ssod.ops.winograd`, written in ONNX: Gather cuts the tiles, channels last and so over whole vectors,
MatMul does the rest. Kernels stay in the file as they are: onnxruntime changes their basis when it loads the model, to
four times as many numbers.

Letters: B images, C channels in, K out, T tiles of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from ssod.deploy.onnx_model import load_onnxruntime
from ssod.ops.winograd import PRODUCTS, SIDE, TAPS, TILE, bases

# A change of basis costs with the sum of the channels, what is saved grows with their product: below these it does not
# pay (docs/performance.md).
LEAST_CHANNELS = 80  # harmonic mean of C and K
LEAST_PLACES = 200  # h * w
WORTH_PLACES = 700  # h * w of one of the maps that a kernel sees: on smaller ones it saves little for its memory

Extent = tuple[int | str, int | str, int | str]


def fewer_products(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> None:
    """Give every convolution Winograd's form for which that pays, in place.

    feed  inputs of the size that the model is meant for: what there is to save depends on it. Others stay right
    """
    weights = {w.name: w for w in model.graph.initializer}
    fit = [n for n in model.graph.node if _fits(n) and n.input[1] in weights and _wide(weights[n.input[1]].dims)]
    if not fit:
        return
    shapes = _shapes(model, feed, [n.input[0] for n in fit])
    places = {n.output[0]: np.prod(shapes[n.input[0]][2:]) for n in fit}
    worth = {n.input[1] for n in fit if places[n.output[0]] >= WORTH_PLACES}  # kernels
    chosen = {n.output[0] for n in fit if places[n.output[0]] >= LEAST_PLACES and n.input[1] in worth}
    extents = {v.name: _extent(v) for v in [*model.graph.input, *model.graph.value_info]}
    body = _Body()
    matrices: dict[str, list[str]] = {}
    levels: dict[Extent, _Level] = {}
    for node in model.graph.node:
        if node.output[0] not in chosen:
            body.nodes.append(node)
            continue
        x, weight, *bias = node.input
        k, c = weights[weight].dims[:2]
        if weight not in matrices:  # once for all levels that share it
            matrices[weight] = _kernel(body, weight, c, k)
        extent = extents.get(x) or (x, x, x)  # unknown: like none but its own
        if extent not in levels:
            levels[extent] = _level(body, x, extent)
        out = _convolution(body, x, matrices[weight], levels[extent], c, k)
        body("Transpose", body("Add", out, *bias) if bias else out, out=node.output, perm=[2, 3, 0, 1])
    del model.graph.node[:]
    model.graph.node.extend(body.nodes)
    model.graph.value_info.extend(body.known)


def _fits(node: NodeProto) -> bool:
    if node.op_type != "Conv":
        return False
    said = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    one = said.get("strides", [1, 1]) == said.get("dilations", [1, 1]) == [1, 1] and said.get("group", 1) == 1
    return one and said.get("pads") == [1, 1, 1, 1]


def _wide(kernel: Sequence[int]) -> bool:
    k, c, *taps = kernel
    return taps == [TAPS, TAPS] and 2 * c * k >= LEAST_CHANNELS * (c + k)


def _extent(value: ValueInfoProto) -> Extent | None:
    """B, h and w as a graph tells them, numbers or expressions; equal ones are equal at every size."""
    shape = [d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim]
    return (shape[0], shape[2], shape[3]) if len(shape) == 4 and all(shape) else None


def _shapes(model: onnx.ModelProto, feed: dict[str, np.ndarray], names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Of these values in one run."""
    onnxruntime = load_onnxruntime()
    names = sorted(set(names))
    told = onnx.ModelProto()
    told.CopyFrom(model)
    told.graph.output.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(told.SerializeToString(), options, ["CPUExecutionProvider"])
    return {name: value.shape for name, value in zip(names, session.run(names, feed), strict=True)}


class _Body:
    """Nodes, written one after the other.

    known  shapes that onnxruntime cannot infer, and without which its plan of the memory takes seconds
    """

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.known: list[ValueInfoProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def __call__(self, kind: str, *inputs: str, out: Sequence[str] = (), **attributes: Any) -> str:
        names = list(out) or [f"winograd_{len(self.nodes)}"]
        self.nodes.append(helper.make_node(kind, inputs, names, **attributes))
        return names[0]

    def constant(self, values: Any) -> str:
        array = np.asarray(values)
        kept = array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
        key = (kept.dtype.str, kept.shape, kept.tobytes())
        if key not in self._constants:
            self._constants[key] = self("Constant", value=numpy_helper.from_array(kept))
        return self._constants[key]

    def many(self, name: str, shape: Sequence[int | str]) -> list[str]:
        """Names of PRODUCTS values of this shape."""
        names = [f"winograd_{len(self.nodes)}_{name}_{i}" for i in range(PRODUCTS)]
        self.known += [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in names]
        return names

    def count(self, length: str) -> str:
        """0 .. length - 1."""
        one = self.constant([1])
        return self("Sub", self("CumSum", self("Expand", one, length), self.constant(0)), one)

    def column(self, length: str) -> str:
        return self("Unsqueeze", self.count(length), self.constant([1]))


@dataclass(frozen=True)
class _Level:
    """What all convolutions of one batch, height and width share, int64.

    border   pads of [h, w, B, C]: a pixel in front, one and what the last tiles lack behind
    read     [6, 6, rows, columns of tiles] which pixel of the bordered image each place of each tile is
    written  [h, w] in which row of [16 * T] each pixel of the result lies
    tiles    what B * T is called
    """

    border: str
    read: str
    written: str
    tiles: str


def _level(body: _Body, x: str, extent: Extent) -> _Level:
    height, width = (
        body.constant([side]) if isinstance(side, int) else body("Shape", x, start=axis, end=axis + 1)
        for axis, side in enumerate(extent[1:], 2)
    )
    tile, last, zero, one = (body.constant([n]) for n in (TILE, TILE - 1, 0, 1))
    down, across = (body("Div", body("Add", side, last), tile) for side in (height, width))
    line = body("Add", body("Mul", across, tile), body.constant([TAPS - 1]))  # pixels of a bordered row
    right = body("Sub", line, body("Add", width, one))
    below = body("Sub", body("Add", body("Mul", down, tile), one), height)
    border = body("Concat", one, one, zero, zero, below, right, zero, zero, axis=0)

    step = np.arange(SIDE)
    row = body("Add", body.constant(step.reshape(SIDE, 1, 1, 1)), body("Mul", body.column(down), tile))
    column = body("Add", body.constant(step.reshape(SIDE, 1, 1)), body("Mul", body.count(across), tile))
    read = body("Add", body("Mul", row, line), column)  # [6, 6, down, across]

    i, j = body.column(height), body.count(width)
    place = body("Add", body("Mul", body("Mod", i, tile), tile), body("Mod", j, tile))
    place = body("Add", body("Mul", place, down), body("Div", i, tile))
    place = body("Add", body("Mul", place, across), body("Div", j, tile))  # [h, w]
    return _Level(border, read, place, tiles=f"tiles_{len(body.nodes)}")


def _kernel(body: _Body, weight: str, c: int, k: int) -> list[str]:
    """Kernel [K, C, 3, 3] -> 36 matrices [C, K]."""
    basis = np.kron(bases()[1], bases()[1])  # [36, 9]
    taps = body("Reshape", body("Transpose", weight, perm=[1, 2, 3, 0]), body.constant([c, TAPS * TAPS, k]))
    points = body("MatMul", body.constant(basis), taps)  # [C, 36, K]
    return [body("Gather", points, body.constant(i), axis=1) for i in range(PRODUCTS)]


def _convolution(body: _Body, x: str, kernel: Sequence[str], level: _Level, c: int, k: int) -> str:
    """x [B, C, h, w], 36 matrices [C, K] -> [h, w, B, K]."""
    inputs, _, outputs = bases()
    points, any_number = body.constant([PRODUCTS, -1]), body.constant([-1])
    batch = body("Shape", x, start=0, end=1)
    pixels = body("Pad", body("Transpose", x, perm=[2, 3, 0, 1]), level.border)
    pixels = body("Reshape", pixels, body("Concat", any_number, batch, body.constant([c]), axis=0))
    cut = body("Gather", pixels, level.read, axis=0)  # [6, 6, down, across, B, C]
    cut = body("MatMul", body.constant(np.kron(inputs, inputs)), body("Reshape", cut, points))
    # One product after the other, since onnxruntime packs constant matrices, but no stack of them.
    rows = body.many("row", [level.tiles, c])
    body("Split", body("Reshape", cut, body.constant([-1, c])), out=rows, axis=0, num_outputs=PRODUCTS)
    products = body.many("product", [level.tiles, k])
    for row, matrix, product in zip(rows, kernel, products, strict=True):
        body("MatMul", row, matrix, out=[product])
    stack = body("Reshape", body("Concat", *products, axis=0), points)
    kept = body("MatMul", body.constant(np.kron(outputs, outputs)), stack)  # [16, T * B * K]
    kept = body("Reshape", kept, body("Concat", any_number, batch, body.constant([k]), axis=0))
    return body("Gather", kept, level.written, axis=0)
