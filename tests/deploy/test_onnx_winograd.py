"""Winograd's form of 3x3 convolutions: equal to a convolution, at every size, and only where it pays."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from test_graph import CARD, lively  # noqa: E402

from ssod.deploy.compare import GATES  # noqa: E402
from ssod.deploy.graph import export_onnx  # noqa: E402
from ssod.deploy.onnx_model import OnnxModel  # noqa: E402
from ssod.deploy.onnx_winograd import fewer_products  # noqa: E402
from ssod.deploy.verify import pictures, verify  # noqa: E402

C, K = 112, 100
LARGE = (1, C, 32, 32)


def kernel(rng, k=K, c=C):
    return (rng.standard_normal((k, c, 3, 3)) * (2 / 9 / c) ** 0.5).astype(np.float32)


def graph(shape, convs, weights, outputs=("y",), opset=18):
    """convs  (input, weight, output, attributes); a weight may be followed by its bias, "w b"."""
    nodes = [helper.make_node("Conv", [x, *w.split()], [y], **({"pads": [1, 1, 1, 1]} | a)) for x, w, y, a in convs]
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * 4) for name in outputs],
        [numpy_helper.from_array(w, name) for name, w in weights.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def changed(model, shape=LARGE):
    fewer_products(model, {"x": np.zeros(shape, np.float32)})
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model, x):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


def kinds(model):
    return [n.op_type for n in model.graph.node]


@pytest.fixture(scope="module")
def anything():
    """A convolution of any size in Winograd's form, with its weights."""
    rng = np.random.default_rng(0)
    weights = {"w": kernel(rng), "b": rng.standard_normal(K).astype(np.float32)}
    model = changed(graph(["B", C, "h", "w"], [("x", "w b", "y", {})], weights))
    assert "Conv" not in kinds(model)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]), weights


@settings(max_examples=40, deadline=None)
@given(batch=st.integers(1, 3), height=st.integers(1, 13), width=st.integers(1, 13), seed=st.integers(0, 99))
def test_equals_a_convolution_of_every_size(anything, batch, height, width, seed):
    session, weights = anything
    x = np.random.default_rng(seed).standard_normal((batch, C, height, width)).astype(np.float32)
    (y,) = session.run(None, {"x": x})
    expected = F.conv2d(*(torch.from_numpy(a).double() for a in (x, weights["w"], weights["b"])), padding=1)
    np.testing.assert_allclose(y, expected.numpy(), atol=1e-4)


def test_loses_little_to_rounding():
    """Root mean square of the error over that of the result, by the weights of a usual head; a plain convolution has
    3e-7, the usual points 0, 1, -1, 2, -2 would have 3e-6."""
    rng = np.random.default_rng(0)
    weights = {"w": kernel(rng, 64, 256)}
    x = np.maximum(rng.standard_normal((1, 256, 32, 32)), 0).astype(np.float32)
    (y,) = run(changed(graph(x.shape, [("x", "w", "y", {})], weights), x.shape), x)
    expected = F.conv2d(torch.from_numpy(x).double(), torch.from_numpy(weights["w"]).double(), padding=1).numpy()
    assert np.sqrt(((y - expected) ** 2).mean() / expected.var()) < 2e-6


@pytest.mark.parametrize(
    ("k", "c", "size", "attributes"),
    [
        pytest.param(K, C, 32, {"strides": [2, 2]}, id="stride 2"),
        pytest.param(K, C, 32, {"dilations": [2, 2], "pads": [2, 2, 2, 2]}, id="dilated"),
        pytest.param(K, C, 32, {"pads": [0, 0, 0, 0]}, id="no padding"),
        pytest.param(K, C, 32, {"pads": [1, 0, 1, 2]}, id="padded otherwise"),
        pytest.param(2 * C, C // 2, 32, {"group": 2}, id="grouped"),
        pytest.param(48, C, 32, {}, id="narrow"),
        pytest.param(K, C, 26, {}, id="small"),
    ],
)
def test_leaves_alone_what_does_not_fit_or_pay(k, c, size, attributes):
    rng = np.random.default_rng(0)
    weights = {"w": kernel(rng, k, c)}
    groups = attributes.get("group", 1)
    shape = (1, c * groups, size, size)
    model = graph(shape, [("x", "w", "y", attributes)], weights)
    before = model.SerializeToString()
    assert changed(model, shape).SerializeToString() == before


def test_a_kernel_of_the_input_is_left_alone():
    model = graph(LARGE, [("x", "w", "y", {})], {})
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [K, C, 3, 3]))
    feed = {"x": np.zeros(LARGE, np.float32), "w": np.zeros((K, C, 3, 3), np.float32)}
    fewer_products(model, feed)
    assert kinds(model) == ["Conv"]


def test_one_kernel_serves_all_levels_but_the_small_ones():
    """A tower over maps of 32, 16 and 8 pixels; a layer that only the middle one has is not worth its memory."""
    rng = np.random.default_rng(0)
    weights = {name: kernel(rng, C, C) for name in ("tower", "middle")}
    pools = {"m": 2, "s": 4}
    convs = [
        ("x", "tower", "y0", {}),
        ("m", "tower", "y1", {}),
        ("s", "tower", "y2", {}),
        ("m", "middle", "y3", {}),
    ]
    model = graph(LARGE, convs, weights, outputs=("y0", "y1", "y2", "y3"))
    for name, size in pools.items():
        pool = helper.make_node("AveragePool", ["x"], [name], kernel_shape=[size, size], strides=[size, size])
        model.graph.node.insert(0, pool)
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    changed(model)
    left = {n.output[0] for n in model.graph.node if n.op_type == "Conv"}
    assert left == {"y2", "y3"}
    assert sum("tower" in n.input for n in model.graph.node) == 2  # once changed, once for the smallest map
    x = rng.standard_normal(LARGE).astype(np.float32)
    for mine, expected in zip(run(model, x), run(plain, x), strict=True):
        np.testing.assert_allclose(mine, expected, atol=1e-4)


def test_layers_of_other_batches_share_no_memory():
    """onnxruntime plans its memory by the names of sizes, so values of the same name must be as large."""
    rng = np.random.default_rng(0)
    weights = {"w": kernel(rng, C, C), "v": kernel(rng, C, C)}
    model = graph(["B", C, 32, 32], [("x", "w", "y0", {}), ("twice", "v", "y1", {})], weights, outputs=("y0", "y1"))
    model.graph.node.insert(0, helper.make_node("Concat", ["x", "x"], ["twice"], axis=0))
    model.graph.value_info.append(helper.make_tensor_value_info("twice", TensorProto.FLOAT, ["2*B", C, 32, 32]))
    changed(model)
    named = {v.name: v.type.tensor_type.shape.dim[0].dim_param for v in model.graph.value_info if "row" in v.name}
    assert len(set(named.values())) == 2
    x = rng.standard_normal((2, C, 32, 32)).astype(np.float32)
    y0, y1 = run(model, x)
    twice = np.concatenate([x, x])
    for mine, (given_, name) in zip((y0, y1), ((x, "w"), (twice, "v")), strict=True):
        expected = F.conv2d(torch.from_numpy(given_), torch.from_numpy(weights[name]), padding=1).numpy()
        np.testing.assert_allclose(mine, expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "opset"), [pytest.param((256, 288), 18, id="fixed"), pytest.param(None, 22, id="any size")]
)
def test_a_detector_finds_the_same(tmp_path, size, opset):
    detector = lively("retinanet", fpn_channels=128, head_convs=2)
    card = dataclasses.replace(CARD, detector="retinanet", target="onnxruntime", size=size, opset=opset)
    export_onnx(detector, tmp_path / "m.onnx", card)
    made = kinds(onnx.load(tmp_path / "m.onnx"))
    assert made.count("MatMul") > 4 * 36  # towers of two maps
    difference = verify(detector, card, OnnxModel(tmp_path / "m.onnx").run, pictures([])[0], GATES["fp32"].score)
    assert difference.passes(GATES["fp32"]), difference.text()
    assert difference.total > 50


@pytest.mark.slow
@pytest.mark.parametrize("other", [{"precision": "int8"}, {"target": "onnx"}], ids=["int8", "onnx"])
def test_what_is_not_float32_for_a_cpu_keeps_its_convolutions(tmp_path, other):
    card = dataclasses.replace(CARD, detector="retinanet", target="onnxruntime", size=(256, 288))
    export_onnx(lively("retinanet", fpn_channels=128), tmp_path / "m.onnx", dataclasses.replace(card, **other))
    assert kinds(onnx.load(tmp_path / "m.onnx")).count("MatMul") < 36
