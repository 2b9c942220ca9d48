import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ssod.nn.fpn import FPN, ConvLevels

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from ssod.deploy.half_graph import to_half  # noqa: E402

F, H, INT = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64
RNG = np.random.default_rng(0)


def model(nodes, outputs, constants=(), shape=("B", 8, 6, 6)):
    """A model of one input `x`; constants {name: array}."""
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", F, shape)],
        [
            helper.make_tensor_value_info(name, kind, ["?"] * (1 if kind == INT and name == "size" else 4))
            for name, kind in outputs.items()
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in dict(constants).items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(made, full_check=True)
    return made


def node(op, inputs, output, **attributes):
    return helper.make_node(op, inputs.split(), output.split(), f"n_{output}", **attributes)


def weights(*shape):
    return (RNG.standard_normal(shape) / 8).astype(np.float32)


CONV = {"w": weights(8, 8, 1, 1)}


def run(made, **inputs):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def ends(graph):
    return [(v.name, v.type.tensor_type.elem_type) for v in (*graph.input, *graph.output)]


def halved(made) -> tuple[onnx.ModelProto, dict[str, int]]:
    """The half model, checked: valid, float32 at its ends, runs; and the element type of each of its tensors."""
    half = to_half(made)
    onnx.checker.check_model(half, full_check=True)
    assert ends(half.graph) == ends(made.graph)
    graph = onnx.shape_inference.infer_shapes(half, strict_mode=True).graph
    values = (*graph.input, *graph.output, *graph.value_info)
    types = {v.name: v.type.tensor_type.elem_type for v in values} | {t.name: t.data_type for t in graph.initializer}
    casts = [(n.input[0], n.attribute[0].i) for n in graph.node if n.op_type == "Cast"]
    assert len(casts) == len(set(casts)), "a tensor is cast twice to one type"
    assert not any(types[name] == to for name, to in casts), "a cast to what it is"
    return half, types


def computed_in(half, types) -> dict[str, int]:
    """{node name: element type of its first output}, casts left out."""
    return {n.name: types[n.output[0]] for n in half.graph.node if n.op_type != "Cast"}


def test_layers_and_what_is_between_are_fp16_and_the_rest_is_not():
    nodes = [
        node("Mul", "x factor", "scaled"),
        node("Conv", "scaled w", "a"),
        node("Relu", "a", "b"),
        node("Conv", "b w", "c"),
        node("Exp", "c", "d"),
        node("Add", "d x", "y"),
    ]
    half, types = halved(model(nodes, {"y": F}, CONV | {"factor": np.float32(2)}))
    assert computed_in(half, types) == {"n_scaled": F, "n_a": H, "n_b": H, "n_c": H, "n_d": F, "n_y": F}
    assert sum(n.op_type == "Cast" for n in half.graph.node) == 2
    assert types["w_half"] == H
    assert "w" not in types  # written once


def test_what_follows_the_last_layer_is_fp32():
    # the boxes of a head: an offset times a stride, at a place of the image
    nodes = [node("Conv", "x w", "codes"), node("Mul", "codes stride", "px"), node("Add", "px places", "y")]
    constants = CONV | {"stride": np.float32(32), "places": np.float32(500.3)}
    made = model(nodes, {"y": F}, constants)
    half, types = halved(made)
    assert computed_in(half, types) == {"n_codes": H, "n_px": F, "n_y": F}
    x = RNG.random((2, 8, 6, 6), np.float32)
    np.testing.assert_allclose(run(half, x=x)[0], run(made, x=x)[0], atol=0.05)


def test_picked_boxes_do_not_count_as_leading_to_a_layer():
    # proposals: the best of the first stage's boxes are what the second one looks at
    nodes = [
        node("Conv", "x w", "a"),
        node("Add", "a places", "boxes"),
        node("TopK", "boxes one", "best where"),
        node("GatherElements", "boxes where", "picked"),
        node("Conv", "picked w", "y"),
    ]
    half, types = halved(model(nodes, {"y": F}, CONV | {"places": np.float32(500), "one": np.array([1])}))
    assert computed_in(half, types) == {"n_a": H, "n_boxes": F, "n_best where": F, "n_picked": F, "n_y": H}


def test_sigmoid_is_fp16_as_a_gate_only():
    nodes = [
        node("Conv", "x w", "a"),
        node("Sigmoid", "a", "gate"),
        node("Mul", "a gate", "silu"),
        node("Conv", "silu w", "b"),
        node("Sigmoid", "b", "score"),
        node("Add", "b score", "c"),
        node("Conv", "c w", "y"),
    ]
    half, types = halved(model(nodes, {"y": F, "score": F}, CONV))
    found = computed_in(half, types)
    assert (found["n_gate"], found["n_silu"], found["n_score"], found["n_c"]) == (H, H, F, F)


def test_products_with_weights_are_layers_and_those_with_a_row_of_bins_are_not():
    nodes = [
        node("Conv", "x w", "a"),
        node("Softmax", "a", "p"),
        node("MatMul", "p bins", "distance"),
        node("MatMul", "x wide", "z"),
        node("Transpose", "z", "turned", perm=[0, 1, 3, 2]),
        node("MatMul", "z turned", "attention"),
        node("Softmax", "attention", "shares"),
        node("MatMul", "shares z", "b"),
        node("MatMul", "b back", "y"),
    ]
    constants = CONV | {"bins": np.arange(6, dtype=np.float32)[:, None], "wide": weights(6, 16), "back": weights(16, 6)}
    half, types = halved(model(nodes, {"distance": F, "y": F}, constants))
    found = computed_in(half, types)
    assert found["n_distance"] == F
    assert {found[name] for name in ("n_z", "n_turned", "n_attention", "n_shares", "n_b", "n_y")} == {H}


@pytest.mark.parametrize(("value", "kind"), [(1e5, F), (-3e38, F), (1e-7, F), (np.inf, H), (3.0, H)])
def test_constants_that_fp16_does_not_have_keep_a_node_fp32(value, kind):
    nodes = [node("Conv", "x w", "a"), node("Add", "a c", "b"), node("Conv", "b w", "y")]
    half, types = halved(model(nodes, {"y": F}, CONV | {"c": np.float32(value)}))
    assert computed_in(half, types)["n_b"] == kind


def test_a_layer_with_weights_out_of_range_stays_fp32():
    huge = {"w": np.full((8, 8, 1, 1), 7e4, np.float32)}
    made = model([node("Conv", "x w", "y")], {"y": F}, huge)
    half, types = halved(made)
    assert computed_in(half, types) == {"n_y": F}
    assert types["w"] == F


def test_a_constant_of_both_worlds_is_there_in_both_types():
    nodes = [
        node("Conv", "x w", "a"),
        node("ArgMax", "x", "where", keepdims=0),
        node("Gather", "w where", "rows"),
        node("ReduceSum", "rows", "sum", keepdims=0),
        node("Add", "a sum", "y"),
    ]
    _, types = halved(model(nodes, {"y": F}, CONV))
    assert (types["w"], types["w_half"]) == (F, H)


def test_inputs_of_a_fixed_type_and_integers_are_left_alone():
    nodes = [
        node("Conv", "x w", "a"),
        node("Shape", "a", "shape"),
        node("Add", "shape shape", "twice"),
        node("Slice", "twice two four zero", "size"),
        helper.make_node("Resize", ["a", "", "scales"], ["b"], "n_b", mode="nearest"),
        node("Conv", "b w", "y"),
    ]
    constants = CONV | {"scales": np.array([1, 1, 2, 2], np.float32)}
    constants |= {"two": np.array([2]), "four": np.array([4]), "zero": np.array([0])}
    half, types = halved(model(nodes, {"y": F, "size": INT}, constants))
    assert types["scales"] == F
    assert computed_in(half, types)["n_b"] == H
    assert [n.input[0] for n in half.graph.node if n.op_type == "Shape"] == ["a_half"]  # no cast only to be measured


def test_outputs_with_a_type_of_their_own_keep_it():
    nodes = [
        node("Conv", "x w", "a"),
        node("MaxPool", "a", "b where", kernel_shape=[2, 2]),
        node("LayerNormalization", "b scale", "c mean"),
        node("Conv", "c w", "y"),
    ]
    half, types = halved(model(nodes, {"y": F, "where": INT, "mean": F}, CONV | {"scale": np.ones(5, np.float32)}))
    found = computed_in(half, types)
    assert (found["n_b where"], found["n_c mean"], types["where"], types["mean"]) == (H, H, INT, F)


def test_subgraphs_are_left_alone_and_find_what_they_read():
    def branch(name, op):
        out = helper.make_tensor_value_info(name, F, None)
        return helper.make_graph([helper.make_node(op, ["a"], [name])], name, [], [out])

    nodes = [
        node("Conv", "x w", "a"),
        node("ReduceSum", "x", "sum", keepdims=0),
        node("Greater", "sum zero", "positive"),
        helper.make_node(
            "If", ["positive"], ["b"], "n_b", then_branch=branch("t", "Neg"), else_branch=branch("e", "Relu")
        ),
        node("Add", "b x", "y"),
    ]
    made = model(nodes, {"y": F}, CONV | {"zero": np.float32(0)})
    half, types = halved(made)
    assert types["a_half"] == H
    for sign in (1, -1):
        x = sign * RNG.random((1, 8, 6, 6), np.float32)
        np.testing.assert_allclose(run(half, x=x)[0], run(made, x=x)[0], atol=5e-3)


def test_the_given_model_and_its_metadata_stay_as_they_are():
    made = model([node("Conv", "x w", "y")], {"y": F}, CONV)
    made.metadata_props.add(key="ssod", value="card")
    before = made.SerializeToString(deterministic=True)
    half = to_half(made)
    assert made.SerializeToString(deterministic=True) == before
    assert [(p.key, p.value) for p in half.metadata_props] == [("ssod", "card")]


class Net(nn.Module):
    """What detectors are made of, small: SiLU, squeeze and excitation, attention with packed projections, a pyramid,
    a head, boxes and the best of them."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Conv2d(3, 16, 3, 8, 1), nn.Conv2d(16, 32, 3, 2, 1)
        self.squeeze, self.excite = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 32, 1)
        self.layer = nn.TransformerEncoderLayer(32, 2, 64, 0.0, "gelu", batch_first=True)
        self.fpn = FPN({8: 16, 16: 32}, 16, ConvLevels(16))
        self.norm, self.cls, self.box = nn.GroupNorm(4, 16), nn.Conv2d(16, 3, 3, padding=1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low = nn.functional.silu(self.low(x - 0.45))
        high = nn.functional.hardswish(self.high(low))
        high = high * self.excite(self.squeeze(high.mean((2, 3), keepdim=True)).relu()).sigmoid()
        high = self.layer(high.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, high.shape[2:])
        scores, boxes = [], []
        for stride, m in self.fpn({8: low, 16: high}, (8, 16)).items():
            m = self.norm(m)
            scores.append(self.cls(m).flatten(2).amax(1).sigmoid())
            y, x = torch.meshgrid(torch.arange(m.shape[-2]), torch.arange(m.shape[-1]), indexing="ij")
            place = (torch.stack([x, y, x, y], -1).flatten(0, 1) + 0.5) * stride
            boxes.append(self.box(m).flatten(2).transpose(1, 2) * stride + place)
        best, where = torch.cat(scores, 1).topk(10)
        return best, torch.cat(boxes, 1).gather(1, where.unsqueeze(-1).expand(-1, -1, 4))


def test_a_small_detector():
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    x = torch.rand(2, 3, 64, 64)
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operator that ONNX does not have
    try:
        program = torch.onnx.export(Net().eval(), (x,), dynamo=True, input_names=["x"], opset_version=18, verbose=False)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    made = program.model_proto
    for n in made.graph.node:
        del n.metadata_props[:]  # stack traces, longer than the weights
    half, types = halved(made)
    assert len(half.SerializeToString()) < 0.65 * len(made.SerializeToString())
    kinds = [(n.op_type, types[n.output[0]]) for n in half.graph.node]
    trunk = (
        "Conv",
        "HardSwish",
        "Resize",
        "InstanceNormalization",
        "LayerNormalization",
        "MatMul",
        "Softmax",
        "Gather",
    )
    assert {op for op, kind in kinds if kind == H} >= set(trunk)
    assert not {op for op, kind in kinds if kind == F} & set(trunk)
    assert kinds.count(("Sigmoid", H)) == 2  # SiLU and SE; the scores of two levels are not
    assert kinds.count(("Sigmoid", F)) == 2
    assert kinds.count(("Cast", H)) == 1
    assert dict(kinds)["TopK"] == dict(kinds)["GatherElements"] == F
    (scores, boxes), (scores_half, boxes_half) = run(made, x=x.numpy()), run(half, x=x.numpy())
    np.testing.assert_allclose(scores_half, scores, atol=1e-3)
    np.testing.assert_allclose(np.sort(boxes_half, 1), np.sort(boxes, 1), atol=0.1)
