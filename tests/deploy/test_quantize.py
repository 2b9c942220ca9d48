import importlib.util
import json

import numpy as np
import pytest

from ssod.errors import UserError

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from ssod.deploy.graph import folded  # noqa: E402
from ssod.deploy.quantize import quantize  # noqa: E402

CARD = {"format": 1, "names": ["Zelle", "größer"], "precision": "fp32"}
SIZE = 32


def weights(*shape):
    rng = np.random.default_rng(shape[0])
    return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


@pytest.fixture
def fp32(tmp_path):
    """A convolution with a bias, one whose weights are a product, as a frozen norm leaves them, a matrix, and two fully
    connected layers, a hidden one and the last."""
    constants = {
        "w1": weights(32, 3, 3, 3),
        "b1": weights(32),
        "w2": weights(64, 32, 3, 3),
        "m": weights(SIZE, 8),
        "scale": np.full((64, 1, 1, 1), 2.0, np.float32),
        "f1": weights(16, 8),
        "g1": weights(16),
        "f2": weights(8, 16),
        "g2": weights(8),
        "rows": np.array([-1, 8]),
        "back": np.array([-1, 64, SIZE, 8]),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["a"], "first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"], "relu"),
        helper.make_node("Mul", ["w2", "scale"], ["w"], "fold"),
        helper.make_node("Conv", ["b", "w"], ["c"], "second", pads=[1, 1, 1, 1]),
        helper.make_node("MatMul", ["c", "m"], ["d"], "matrix"),
        helper.make_node("Reshape", ["d", "rows"], ["e"], "flat"),
        helper.make_node("Gemm", ["e", "f1", "g1"], ["f"], "hidden", transB=1),
        helper.make_node("Relu", ["f"], ["g"], "relu of hidden"),
        helper.make_node("Gemm", ["g", "f2", "g2"], ["h"], "last", transB=1),
        helper.make_node("Reshape", ["h", "back"], ["y"], "deep"),
    ]
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("B", 3, SIZE, SIZE))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ("B", 64, SIZE, 8))],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10, producer_name="ssod")
    model.metadata_props.add(key="ssod", value=json.dumps(CARD))
    path = tmp_path / "in" / "m.onnx"
    path.parent.mkdir()
    onnx.save(folded(model), path)
    return path


def batches(count=3):
    rng = np.random.default_rng(7)
    for _ in range(count):
        yield {"x": rng.random((2, 3, SIZE, SIZE), np.float32)}


def run(path, x):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


@pytest.fixture(params=["onnx", "tensorrt"])
def int8(request, fp32, tmp_path):
    out = tmp_path / f"{request.param}.onnx"
    quantize(fp32, out, batches(), request.param)
    return request.param, out


def test_result_is_close_small_and_valid(int8, fp32):
    _, out = int8
    onnx.checker.check_model(str(out), full_check=True)
    x = np.random.default_rng(9).random((1, 3, SIZE, SIZE), np.float32)
    wanted, got = run(fp32, x), run(out, x)
    assert 1e-6 < np.abs(got - wanted).mean() < 0.02 * np.abs(wanted).mean()
    assert out.stat().st_size < 0.45 * fp32.stat().st_size


def test_convolutions_and_hidden_layers_are_quantised_per_channel_and_nothing_else(int8):
    _, out = int8
    graph = onnx.load(out).graph
    made_by = {o: n for n in graph.node for o in n.output}
    constants = {t.name: t for t in graph.initializer}
    layers = [n for n in graph.node if n.op_type in ("Conv", "Gemm") and n.name != "last"]
    assert len(layers) == 3
    for layer in layers:
        activation, weight = (made_by[name] for name in layer.input[:2])
        assert activation.op_type == weight.op_type == "DequantizeLinear"
        stored, scale = constants[weight.input[0]], constants[weight.input[1]]
        assert stored.data_type == TensorProto.INT8
        assert list(scale.dims) == [stored.dims[0]]
    for rest in (n for n in graph.node if n.op_type == "MatMul" or n.name == "last"):
        assert constants[rest.input[1]].data_type == TensorProto.FLOAT


@pytest.mark.parametrize("target", ["onnx", "tensorrt"])
def test_of_a_transformer_the_feed_forward_is_quantised_and_no_answer(tmp_path, target):
    constants = {
        "in": weights(8, 32),
        "b1": weights(32),
        "out": weights(32, 8),
        "b2": weights(8),
        "answer": weights(32, 4),
        "project": weights(8, 8),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "project"], ["v"], "project"),
        helper.make_node("MatMul", ["v", "in"], ["a"], "in"),
        helper.make_node("Add", ["b1", "a"], ["b"], "bias"),
        helper.make_node("Relu", ["b"], ["c"], "relu"),
        helper.make_node("MatMul", ["c", "out"], ["d"], "out"),
        helper.make_node("Add", ["d", "b2"], ["y"], "bias of out"),
        helper.make_node("MatMul", ["c", "answer"], ["z"], "answer"),
        helper.make_node("MatMul", ["x", "turned"], ["attention"], "attention"),
        helper.make_node("Transpose", ["x"], ["turned"], "turn", perm=[0, 2, 1]),
    ]
    graph = helper.make_graph(
        [nodes[-1], *nodes[:-1]],
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("B", 5, 8))],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, ("B", 5, k)) for n, k in (("y", 8), ("z", 4))]
        + [helper.make_tensor_value_info("attention", TensorProto.FLOAT, ("B", 5, 5))],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "fp32.onnx"
    )
    x = np.random.default_rng(0).random((16, 5, 8), np.float32)
    quantize(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", [{"x": x}], target)
    made = onnx.load(tmp_path / "int8.onnx").graph
    made_by = {o: n for n in made.node for o in n.output}
    stored = {t.name: t for t in made.initializer}
    kinds = {n.name: [getattr(made_by.get(i), "op_type", None) for i in n.input] for n in made.node}
    assert kinds["in"] == kinds["out"] == ["DequantizeLinear"] * 2
    assert "DequantizeLinear" not in kinds["attention"]
    assert stored["project"].data_type == stored["answer"].data_type == TensorProto.FLOAT
    for node in (n for n in made.node if n.name in ("in", "out")):
        weight, scale = (stored[name] for name in made_by[node.input[1]].input[:2])
        assert weight.data_type == TensorProto.INT8
        assert list(scale.dims) == [weight.dims[1]], "one for each channel that comes out"
    wanted, got = run(tmp_path / "fp32.onnx", x), run(tmp_path / "int8.onnx", x)
    assert 1e-6 < np.abs(got - wanted).mean() < 0.02 * np.abs(wanted).mean()


def test_types_are_those_the_target_wants(int8):
    target, out = int8
    graph = onnx.load(out).graph
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    zeros = [constants[n.input[2]] for n in graph.node if n.op_type == "QuantizeLinear"]
    biases = [constants[n.input[0]] for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in constants]
    if target == "onnx":
        assert {z.dtype for z in zeros} == {np.dtype(np.uint8)}
    else:
        every = [constants[n.input[2]] for n in graph.node if "QuantizeLinear" in n.op_type or "Dequant" in n.op_type]
        assert all(z.dtype == np.int8 and not z.any() for z in every)
        assert all(b.dtype == np.int8 for b in biases)  # weights alone: biases stay fp32


def test_the_card_goes_over_and_no_path(int8, fp32, tmp_path):
    _, out = int8
    model = onnx.load(out)
    assert {p.key: json.loads(p.value) for p in model.metadata_props} == {"ssod": CARD | {"precision": "int8"}}
    assert model.producer_name == "ssod"
    content = out.read_bytes()
    for folder in (tmp_path, fp32.parent, "ssod-int8-"):
        assert str(folder).encode() not in content


def test_nothing_else_is_left_and_the_input_is_untouched(fp32, tmp_path, capfd):
    before = fp32.read_bytes()
    quantize(fp32, tmp_path / "out.onnx", batches(), "onnx")
    assert fp32.read_bytes() == before
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["in", "m.onnx", "out.onnx"]
    assert capfd.readouterr().out == ""


def test_batches_are_read_one_by_one(fp32, tmp_path):
    alive, most = 0, 0

    class Values(np.ndarray):
        def __del__(self):
            nonlocal alive
            alive -= 1

    def counted():
        nonlocal alive, most
        for batch in batches(6):
            alive += 1
            most = max(most, alive)
            yield {"x": batch["x"].view(Values)}

    quantize(fp32, tmp_path / "out.onnx", counted(), "onnx")
    assert most <= 2


def test_what_a_later_batch_brings_counts(fp32, tmp_path):
    """The range is that of all batches: with a dark first one alone, bright images would be cut off."""
    dark, bright = ({"x": np.full((1, 3, SIZE, SIZE), v, np.float32)} for v in (0.01, 1.0))
    quantize(fp32, tmp_path / "both.onnx", [dark, bright], "onnx")
    quantize(fp32, tmp_path / "dark.onnx", [dark], "onnx")
    wanted = run(fp32, bright["x"])
    error = {name: np.abs(run(tmp_path / f"{name}.onnx", bright["x"]) - wanted).mean() for name in ("both", "dark")}
    assert error["both"] < 0.02 * np.abs(wanted).mean()
    assert error["dark"] > 0.5 * np.abs(wanted).mean()


def test_without_images_there_is_a_sentence_and_no_file(fp32, tmp_path):
    with pytest.raises(UserError, match="int8 is calibrated on images"):
        quantize(fp32, tmp_path / "out.onnx", iter(()), "onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_a_failure_leaves_the_file_that_was_there(fp32, tmp_path):
    out = tmp_path / "out.onnx"
    out.write_bytes(b"before")

    def failing():
        yield from batches(1)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="gone"):
        quantize(fp32, out, failing(), "onnx")
    assert out.read_bytes() == b"before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out.onnx"]


def test_without_onnxruntime_there_is_a_sentence(fp32, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else real(name))
    with pytest.raises(UserError, match=r"pip install 'ssod\[export\]'"):
        quantize(fp32, tmp_path / "out.onnx", batches(), "onnx")
