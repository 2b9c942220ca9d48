"""An fp32 ONNX graph with its trunk in fp16: what autocast does to a network, done to a file.

Layers with weights compute in fp16, and so does what lies between two of them. What follows the last one, as decoding
boxes, scoring and NMS, and everything that has to do with places, stays fp32: at 640 pixels fp16 has steps of half a
pixel. Inputs and outputs stay fp32 too. Types are said in the graph, casts included, so that TensorRT, which takes
them at their word, and onnxruntime compute the same.

onnxruntime's own converter (onnxruntime.transformers.float16) is of no use here: told which nodes to leave alone, it
still rounds everything between two of them, and puts casts behind their users and one name on several tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper, shape_inference

# Have weights and take nearly all of the time.
LAYERS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
# In fp16 where they stand between layers: pointwise, of a window, of a channel, or only moving numbers. None of them
# needs more range than its input has. Normalisations compute their statistics in fp32 whatever their type.
BETWEEN = {
    *("Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Clip", "Tanh", "Erf", "Gelu", "Softplus", "Mish"),
    *("HardSwish", "HardSigmoid", "Sigmoid", "Softmax", "Add", "Sub", "Mul", "Div", "Neg", "Abs", "Sum"),
    *("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceMax", "Resize"),
    *("LayerNormalization", "InstanceNormalization", "GroupNormalization"),
    *("Reshape", "Transpose", "Concat", "Slice", "Split", "Unsqueeze", "Squeeze", "Flatten", "Pad", "Expand", "Tile"),
    *("Gather", "Identity", "Dropout", "DepthToSpace", "SpaceToDepth"),
}
_LARGEST = float(np.finfo(np.float16).max)
_SMALLEST = float(np.finfo(np.float16).tiny)
_WEIGHTS = 64  # elements of a matrix from which it is a layer's weights and not, say, the places of a box code's bins


def to_half(model: ModelProto) -> ModelProto:
    """A copy of an fp32 model that computes its trunk in fp16, with weights of half the size.

    Inputs, outputs, metadata and the nodes of subgraphs are as they were; shapes of inner tensors are left out.
    """
    half = ModelProto()
    half.CopyFrom(model)
    _constants_to_initializers(half.graph)
    walk = _Walk(half)
    nodes = walk.run()
    graph = half.graph
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in (*node.input, *_captured(node))} | {o.name for o in graph.output}
    kept = [t for t in (*graph.initializer, *walk.rounded) if t.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return half


class _Walk:
    """Goes through a graph from inputs to outputs and writes it anew.

    An fp32 tensor `x` keeps its name, its fp16 form is `x` and `suffix`. Either may come first; the other one is cast
    from it when the first node asks for it, and all later ones share that cast.

    half     names of those tensors that came first as fp16
    there    names of all tensors written so far, in whatever form
    rounded  fp16 forms of constants
    """

    def __init__(self, model: ModelProto) -> None:
        self.graph = model.graph
        self.opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
        self.types = _types(model)
        self.constants = {t.name: t for t in self.graph.initializer}
        self.consumers: dict[str, list[NodeProto]] = {}
        for node in self.graph.node:
            for name in (*node.input, *_captured(node)):
                self.consumers.setdefault(name, []).append(node)
        self.leading = self._leading()
        names = {name for node in self.graph.node for name in (*node.input, *node.output)}
        self.suffix = "_half"
        while any(name.endswith(self.suffix) for name in names):
            self.suffix += "_"
        self.half: set[str] = set()
        self.there = {*self.constants, *(i.name for i in self.graph.input)}
        self.rounded: list[TensorProto] = []
        self.nodes: list[NodeProto] = []

    def run(self) -> list[NodeProto]:
        for node in self.graph.node:
            if self._fits(node):
                self._write_half(node)
            elif node.op_type in ("Shape", "Size") and node.input[0] in self.half:
                node.input[0] += self.suffix  # takes any type, and needs no cast
                self._write(node)
            else:
                for name in (*node.input, *_captured(node)):
                    self._full(name)
                self._write(node)
        for output in self.graph.output:
            self._full(output.name)
        return self.nodes

    # ---- which nodes

    def _leading(self) -> set[str]:
        """Outputs of nodes from which a layer is reached through nothing but nodes that can do fp16."""
        found: set[str] = set()
        for node in reversed(self.graph.node):
            if not self._values(node):
                continue
            followers = [c for o in node.output for c in self.consumers.get(o, []) if o in self._values(c)]
            if any(c.op_type in LAYERS or c.output[0] in found for c in followers):
                found.update(node.output)
        return found

    def _fits(self, node: NodeProto) -> bool:
        """Whether a node computes in fp16. Nodes before it have been decided."""
        values = self._values(node)
        constants = [numpy_helper.to_array(self.constants[v]) for v in values if v in self.constants]
        moving = [v for v in values if v not in self.constants]
        if not moving or any(self.types.get(v) != TensorProto.FLOAT for v in values):
            return False
        is_layer = node.op_type in LAYERS
        if node.op_type in ("Gemm", "MatMul"):  # else a product of two feature maps, as in attention
            is_layer = any(c.ndim > 1 and c.size >= _WEIGHTS for c in constants)
        if is_layer:
            return all(_within_range(c) for c in constants)
        if node.output[0] not in self.leading:
            return False
        if node.op_type == "Sigmoid" and not self._is_gate(node):
            return False
        # Of an epsilon or a tiny factor too little would be left. Tiny weights of a layer are lost in its sum anyway.
        return all(map(self.half.__contains__, moving)) and all(_within_range(c) and _normal(c) for c in constants)

    def _is_gate(self, node: NodeProto) -> bool:
        """Whether a sigmoid only scales feature maps (SiLU, squeeze and excitation); else it may be a score."""
        followers = self.consumers.get(node.output[0], [])
        others = [name for c in followers for name in c.input if name != node.output[0]]
        return all(c.op_type == "Mul" for c in followers) and all(name in self.half for name in others)

    def _values(self, node: NodeProto) -> list[str]:
        """Inputs of the type of the first output: not the scales of a Resize. None where fp16 is out of question."""
        if node.domain or node.op_type not in LAYERS | BETWEEN:
            return []
        if node.op_type == "Gather" and node.input[1] not in self.constants:
            return []  # picks what scored best; one with fixed places takes a tensor apart, as attention does
        return [node.input[i] for i in self._slots(node)]

    def _slots(self, node: NodeProto) -> Iterator[int]:
        schema = onnx.defs.get_schema(node.op_type, self.opset)
        kind = schema.outputs[0].type_str
        allowed = next(c.allowed_type_strs for c in schema.type_constraints if c.type_param_str == kind)
        for i, name in enumerate(node.input):
            said = schema.inputs[min(i, len(schema.inputs) - 1)]  # the last may stand for any number
            if name and said.type_str == kind and "tensor(float16)" in allowed:
                yield i

    # ---- writing

    def _write_half(self, node: NodeProto) -> None:
        for i in self._slots(node):
            node.input[i] = self._half(node.input[i])
        kinds = [o.type_str for o in onnx.defs.get_schema(node.op_type, self.opset).outputs]
        changed = [i for i, name in enumerate(node.output) if name and kinds[min(i, len(kinds) - 1)] == kinds[0]]
        self.half.update(node.output[i] for i in changed)
        for i in changed:
            node.output[i] += self.suffix
        self._write(node)

    def _write(self, node: NodeProto) -> None:
        self.nodes.append(node)
        self.there.update(node.output)

    def _half(self, name: str) -> str:
        wanted = name + self.suffix
        if wanted not in self.there:
            if name in self.constants:
                # Not all may fit: a layer's tiny weights become 0, which is meant.
                rounded = numpy_helper.to_array(self.constants[name]).astype(np.float16)
                self.rounded.append(numpy_helper.from_array(rounded, wanted))
                self.there.add(wanted)
            else:
                self._write(helper.make_node("Cast", [name], [wanted], wanted, to=TensorProto.FLOAT16))
        return wanted

    def _full(self, name: str) -> None:
        if name in self.half and name not in self.there:
            self._write(helper.make_node("Cast", [name + self.suffix], [name], f"{name}_full", to=TensorProto.FLOAT))


def _types(model: ModelProto) -> dict[str, int]:
    graph = shape_inference.infer_shapes(model).graph
    values = (*graph.input, *graph.output, *graph.value_info)
    return {v.name: v.type.tensor_type.elem_type for v in values} | {t.name: t.data_type for t in graph.initializer}


def _captured(node: NodeProto) -> Iterable[str]:
    """Names that the subgraphs of a node read, their own ones among them."""
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from inner.input
                yield from _captured(inner)
            yield from (output.name for output in graph.output)


def _constants_to_initializers(graph: GraphProto) -> None:
    nodes = [n for n in graph.node if n.op_type == "Constant" and n.attribute[0].name == "value"]
    for node in nodes:
        tensor = graph.initializer.add()
        tensor.CopyFrom(node.attribute[0].t)
        tensor.name = node.output[0]
        graph.node.remove(node)


def _within_range(values: np.ndarray) -> bool:
    """Infinity is within: fp16 has it. A mask of -3e38 is not, it would become infinite."""
    return bool((np.isinf(values) | (np.abs(values) <= _LARGEST)).all())


def _normal(values: np.ndarray) -> bool:
    return bool(((values == 0) | (np.abs(values) >= _SMALLEST)).all())
