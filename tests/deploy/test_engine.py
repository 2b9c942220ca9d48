"""Engines that tensorrt_rtx builds here of small ONNX files: what lies on the disk, and every way it can go wrong.

Nothing here runs an engine but the test marked `gpu`, which has not been run: no GPU was at hand.
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ssod.deploy.contract import OUTPUTS, Card, ForeignModel
from ssod.deploy.engine import build_engine, node_in_log, own_capability, profile_shapes
from ssod.deploy.engine_runtime import EngineModel, cuda_device, installed_for
from ssod.deploy.engine_sidecar import Sidecar, check_shape, read_engine, sidecar_path
from ssod.deploy.trt import RTX, has_capabilities, load_trt, runs_on
from ssod.errors import UserError

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

BATCH = (1, 2, 4)
SIZES = ((32, 64), (64, 64), (96, 128))
CARD = Card(
    names=["cat", "dog"],
    detector="fcos",
    backbone="test_resnet",
    weights="teacher",
    imgsz=96,
    size=None,
    multiple=32,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    conf=0.05,
    iou=0.6,
    max_det=2,
    target="tensorrt",
    precision="fp32",
    inputs=("images",),
    opset=18,
    versions={"ssod": "0.1.0"},
)


def write_model(path: Path, card: Card = CARD, fixed: tuple[int, int, int] | None = None, **tail: Any) -> Path:
    """A network with a model's inputs and outputs: a convolution, pooled, is the boxes; their mean is the score.

    fixed  (B, H, W), or None where all are dynamic
    tail   `nodes` that follow, `constants` they use, `outputs` they add; `count`: a name for num_dets, if they make it
    """
    b, h, w = fixed or ("B", "H", "W")
    rng = np.random.default_rng(0)
    weight = rng.normal(0, 0.3, (4 * card.max_det, 3, 3, 3)).astype(np.float32)
    constants = {
        "boxes_shape": np.array([0, card.max_det, 4]),
        "axis": np.array([2]),
        "one": np.array([1]),
        "bar": np.float32(0.1),
        **tail.get("constants", {}),
    }
    node = helper.make_node
    if card.precision == "int8":  # symmetric, per channel, no zero point: what TensorRT takes
        constants |= {"scale": np.float32(1 / 127), "weight_scale": np.abs(weight).max((1, 2, 3)) / 127}
        ratio = weight / constants["weight_scale"][:, None, None, None]
        constants["weight_int8"] = ratio.round().astype(np.int8)
        first = [
            node("QuantizeLinear", ["images", "scale"], ["images_int8"], output_dtype=TensorProto.INT8),
            node("DequantizeLinear", ["images_int8", "scale"], ["x"]),
            node("DequantizeLinear", ["weight_int8", "weight_scale"], ["weight"], axis=0),
            node("Conv", ["x", "weight"], ["maps"], name="stem", strides=[2, 2], pads=[1, 1, 1, 1]),
        ]
        opset = 21  # the first where QuantizeLinear names its type without a zero point
    elif card.precision == "fp16":
        constants["weight"] = weight.astype(np.float16)
        first = [
            node("Cast", ["images"], ["x"], to=TensorProto.FLOAT16),
            node("Conv", ["x", "weight"], ["maps_half"], name="stem", strides=[2, 2], pads=[1, 1, 1, 1]),
            node("Cast", ["maps_half"], ["maps"], to=TensorProto.FLOAT),
        ]
        opset = 18
    else:
        constants["weight"] = weight
        first = [node("Conv", ["images", "weight"], ["maps"], name="stem", strides=[2, 2], pads=[1, 1, 1, 1])]
        opset = 18
    nodes = [
        *first,
        node("GlobalAveragePool", ["maps"], ["pooled"]),
        node("Reshape", ["pooled", "boxes_shape"], ["unit_boxes"], name="to_boxes"),
        node("ReduceMean", ["unit_boxes", "axis"], ["scores"], keepdims=0),
        node("Greater", ["scores", "bar"], ["sure"]),
        node("Cast", ["sure"], ["labels"], to=TensorProto.INT32),
        node("ReduceSum", ["labels", "one"], [tail.get("count", "num_dets")], keepdims=1),
    ]
    inputs = [helper.make_tensor_value_info("images", TensorProto.FLOAT, [b, 3, h, w])]
    if "sizes" in card.inputs:
        inputs.append(helper.make_tensor_value_info("sizes", TensorProto.INT32, [b, 2]))
        nodes += [
            node("Cast", ["sizes"], ["extent"], to=TensorProto.FLOAT),
            node("Concat", ["extent", "extent"], ["extents"], axis=1),
            node("Unsqueeze", ["extents", "one"], ["frames"]),
            node("Mul", ["unit_boxes", "frames"], ["boxes"]),
        ]
    else:
        nodes.append(node("Identity", ["unit_boxes"], ["boxes"]))
    nodes += tail.get("nodes", [])
    d = card.max_det
    shapes = {"num_dets": [b, 1], "boxes": [b, d, 4], "scores": [b, d], "labels": [b, d]}
    types = {name: TensorProto.INT32 if name in ("num_dets", "labels") else TensorProto.FLOAT for name in OUTPUTS}
    outputs = [helper.make_tensor_value_info(name, types[name], shapes[name]) for name in OUTPUTS]
    initial = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "small", inputs, outputs + tail.get("outputs", []), initial)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), path)
    return path


def build(folder: Path, card: Card = CARD, **options: Any) -> tuple[Path, Sidecar]:
    pytest.importorskip("tensorrt_rtx")
    onnx_path = write_model(folder / "m.onnx", card)
    options = {"batch": BATCH, "size": SIZES, "flavour": RTX, "card": card} | options
    return folder / "m.engine", build_engine(onnx_path, folder / "m.engine", **options)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("engine"))[0]


@pytest.fixture
def own(engine: Path, tmp_path: Path) -> Path:
    """A copy of the engine that a test may damage."""
    for path in (engine, sidecar_path(engine)):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path / engine.name


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_plan_and_what_stands_beside_it(engine: Path) -> None:
    rtx = pytest.importorskip("tensorrt_rtx")
    assert left(engine.parent) == ["m.engine", "m.engine.json", "m.onnx"]
    plan, sidecar = read_engine(engine)
    assert (sidecar.flavour, sidecar.version, sidecar.capabilities) == ("tensorrt_rtx", rtx.__version__, [])
    assert sidecar.card == CARD
    assert sidecar.profile == {"images": ((1, 3, 32, 64), (2, 3, 64, 64), (4, 3, 96, 128))}
    assert sidecar.plan_sha256 == hashlib.sha256(engine.read_bytes()).hexdigest()
    assert sidecar.onnx_sha256 == hashlib.sha256((engine.parent / "m.onnx").read_bytes()).hexdigest()
    if hasattr(rtx.Runtime, "get_engine_validity"):  # NVIDIA's own reader: the plan has no header of ours
        diagnosis = rtx.Runtime(rtx.Logger(rtx.Logger.ERROR)).get_engine_validity(plan)[1]
        assert not diagnosis & int(rtx.EngineInvalidityDiagnostics.MALFORMED_ENGINE)


def test_precision_is_that_of_the_file(tmp_path: Path) -> None:
    bytes_of = {}
    for precision in ("fp32", "fp16", "int8"):
        path, sidecar = build(tmp_path, replace(CARD, precision=precision, max_det=8192))  # 885,000 weights
        assert read_engine(path)[1] == sidecar
        assert sidecar.card.precision == precision
        bytes_of[precision] = path.stat().st_size
    assert bytes_of["fp16"] < bytes_of["fp32"] - 1_000_000
    assert bytes_of["int8"] < bytes_of["fp16"] - 500_000


def test_every_input_has_a_profile(tmp_path: Path) -> None:
    card = replace(CARD, detector="deformable_detr", inputs=("images", "sizes"))
    _, sidecar = build(tmp_path, card)
    assert sidecar.profile["sizes"] == ((1, 2), (2, 2), (4, 2))


def test_fixed_shapes_need_no_size(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    onnx_path = write_model(tmp_path / "m.onnx", fixed=(2, 64, 96))
    sidecar = build_engine(
        onnx_path, tmp_path / "m.engine", card=replace(CARD, size=(64, 96)), batch=(2, 2, 2), flavour=RTX
    )
    assert sidecar.profile == {"images": ((2, 3, 64, 96),) * 3}


def test_capabilities_and_workspace(tmp_path: Path) -> None:
    path, sidecar = build(tmp_path, capabilities=["SM75", "sm89"], workspace=2.0)
    assert sidecar.capabilities == ["sm75", "sm89"]
    assert read_engine(path)[1] == sidecar


def test_verbose_lets_tensorrt_speak(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    build(tmp_path, verbose=True)
    assert "tensorrt_rtx: " in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"workspace": 0.5}, r"workspace=0.5: TensorRT needs 2 GiB or more"),
        ({"timing_cache": Path("t.cache")}, r"timing_cache=t.cache: tensorrt_rtx measures no kernels .* leave it out"),
        ({"capabilities": ["sm90"]}, r"does not build for sm90; it knows .*sm89.*H200"),
        ({"flavour": "rtx"}, r"flavour=rtx does not exist.* tensorrt_rtx"),
        ({"batch": (0, 1, 2)}, r"batch=\(0, 1, 2\).*from 1 on"),
        ({"size": ((32, 64), (64, 60), (96, 128))}, r"size=\(\(32, 64\), \(64, 60\).*in this order"),
        ({"size": ((32, 64), (64, 72), (96, 128))}, r"size=\(64, 72\).*multiples of 32"),
        ({"size": None}, r"images of any size: give the least, usual and largest"),
    ],
)
def test_refused_before_it_is_built(options: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        build(tmp_path, **options)
    assert left(tmp_path) == ["m.onnx"]


def nms() -> dict[str, Any]:
    """NonMaxSuppression on the small model's boxes: TensorRT-RTX reads it, and has nothing that runs it."""
    return {
        "nodes": [
            helper.make_node("Unsqueeze", ["scores", "one"], ["class_scores"]),
            helper.make_node("NonMaxSuppression", ["boxes", "class_scores", "most", "bar"], ["kept"], name="sift"),
            helper.make_node("Cast", ["kept"], ["kept_int"], to=TensorProto.INT32),
            helper.make_node("ReduceSum", ["kept_int"], ["total"], keepdims=0),
            helper.make_node("Add", ["sure_ones", "total"], ["num_dets"]),
        ],
        "count": "sure_ones",
        "constants": {"most": np.array([2])},
    }


def test_an_operator_without_a_runner_is_named_and_leaves_the_old_engine(own: Path) -> None:
    before = {p.name: p.read_bytes() for p in own.parent.iterdir()}
    onnx_path = write_model(own.parent / "nms.onnx", **nms())
    sentence = r"nms.onnx: tensorrt_rtx \S+ does not take the operator NMS \(node sift"
    with pytest.raises(UserError, match=sentence) as error:
        build_engine(onnx_path, own, card=replace(CARD, target="onnx"), batch=BATCH, size=SIZES, flavour=RTX)
    assert "no runners" in str(error.value)
    assert "cpp" not in str(error.value)
    assert "format=engine" in str(error.value)
    onnx_path.unlink()
    assert {p.name: p.read_bytes() for p in own.parent.iterdir()} == before


@pytest.mark.parametrize(
    ("op", "takes", "attributes", "reason"),
    [
        ("Det", ["maps"], {}, "it is not supported"),
        ("Resize", ["maps", "", "", "twice"], {"mode": "linear", "antialias": 1}, "Antialiasing is not supported"),
    ],
)
def test_an_operator_that_is_not_read_is_named(
    op: str, takes: list[str], attributes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    odd = helper.make_node(op, takes, ["unused"], name="odd_one", **attributes)
    onnx_path = write_model(tmp_path / "m.onnx", nodes=[odd], constants={"twice": np.array([1, 8, 64, 64])})
    with pytest.raises(UserError, match=rf"does not take the operator {op} \(node odd_one\): {reason}"):
        build_engine(onnx_path, tmp_path / "m.engine", card=CARD, batch=BATCH, size=SIZES, flavour=RTX)
    assert left(tmp_path) == ["m.onnx"]


def test_the_log_of_older_versions_names_the_node() -> None:
    log = ["Error", 'ModelImporter.cpp:771: While parsing node number 12 [NonMaxSuppression -> "kept"]:']
    assert node_in_log(log) == ("NonMaxSuppression", "kept")
    assert node_in_log(["Failed to parse the ONNX model."]) == ("", "")


def test_files_that_are_no_model_of_ours(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    options: dict[str, Any] = {"card": CARD, "batch": BATCH, "size": SIZES, "flavour": RTX}
    with pytest.raises(UserError, match=r"none.onnx: there is no such ONNX file"):
        build_engine(tmp_path / "none.onnx", tmp_path / "m.engine", **options)
    (tmp_path / "junk.onnx").write_text("junk")
    with pytest.raises(UserError, match=r"junk.onnx cannot be read as an ONNX file by tensorrt_rtx"):
        build_engine(tmp_path / "junk.onnx", tmp_path / "m.engine", **options)
    other = write_model(tmp_path / "other.onnx", outputs=[helper.make_tensor_value_info("maps", 1, None)])
    with pytest.raises(ForeignModel, match=r"the outputs boxes, labels, maps, num_dets, scores; a model of ssod has"):
        build_engine(other, tmp_path / "m.engine", **options)
    with pytest.raises(UserError, match=r"the folder .*missing does not exist"):
        build_engine(other, tmp_path / "missing" / "m.engine", **options)
    assert left(tmp_path) == ["junk.onnx", "other.onnx"]


def test_a_full_disk_leaves_the_old_engine(own: Path) -> None:
    before = {p.name: p.read_bytes() for p in own.parent.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # a plan is longer
    try:
        with pytest.raises(OSError, match="too large"):
            build(own.parent)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (own.parent / "m.onnx").unlink()
    assert {p.name: p.read_bytes() for p in own.parent.iterdir()} == before


def test_profiles_fit_the_network() -> None:
    dynamic = {"images": (-1, 3, -1, -1)}
    fixed = {"images": (2, 3, 64, 96)}
    assert profile_shapes(dynamic, replace(CARD, size=(64, 96)), (1, 1, 8), None)["images"][2] == (8, 3, 64, 96)
    assert profile_shapes(fixed, CARD, (2, 2, 2), None)["images"][0] == (2, 3, 64, 96)
    with pytest.raises(UserError, match=r"images of the shape \[1, 3, 64, 96\]: the ONNX file takes \[2, 3, 64, 96\]"):
        profile_shapes(fixed, CARD, (1, 2, 2), None)
    with pytest.raises(UserError, match=r"\[2, 3, 32, 96\]: the ONNX file takes \[any, 3, 64, any\]"):
        profile_shapes({"images": (-1, 3, 64, -1)}, CARD, (2, 2, 2), ((32, 96),) * 3)


def test_only_shapes_of_the_profile_are_taken(engine: Path) -> None:
    _, sidecar = read_engine(engine)
    for shape in ((1, 3, 32, 64), (4, 3, 96, 128), (3, 3, 64, 96)):
        check_shape(sidecar, shape)
    for shape, sentence in {
        (5, 3, 64, 64): "batch 5: the engine was built for 1 to 4",
        (1, 3, 128, 64): "height 128: the engine was built for 32 to 96",
        (1, 3, 64, 32): "width 32: the engine was built for 64 to 128",
        (1, 3, 64, 72): "64 x 72 pixels: height and width must be multiples of 32",
        (3, 64, 64): r"the shape \[3, 64, 64\]; an engine takes \[B, 3, H, W\]",
    }.items():
        with pytest.raises(UserError, match=sentence):
            check_shape(sidecar, shape)


def rewrite(engine: Path, **values: Any) -> None:
    path = sidecar_path(engine)
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_what_does_not_belong_together_is_not_loaded(own: Path) -> None:
    with pytest.raises(UserError, match=r"none.engine: there is no such engine"):
        EngineModel(own.with_name("none.engine"))
    rewrite(own, format=99)
    with pytest.raises(ForeignModel, match=r"m.engine.json has format 99; this version of ssod reads format 1"):
        EngineModel(own)
    sidecar_path(own).write_text("[]")
    with pytest.raises(ForeignModel, match=r"m.engine.json is not a description by ssod"):
        EngineModel(own)
    sidecar_path(own).unlink()
    with pytest.raises(ForeignModel, match=r"m.engine.json is not beside it.*format=engine"):
        EngineModel(own)


def test_a_damaged_plan_is_not_loaded(own: Path) -> None:
    plan = bytearray(own.read_bytes())
    plan[len(plan) // 2] ^= 1
    own.write_bytes(plan)
    with pytest.raises(UserError, match=r"m.engine is not the engine that m.engine.json describes"):
        EngineModel(own)


def test_another_tensorrt_is_refused(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite(own, version="1.0.0")
    with pytest.raises(UserError, match=r"built by tensorrt_rtx 1.0.0, and \S+ is installed.*tensorrt-rtx==1.0.0"):
        EngineModel(own)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    rewrite(own, flavour="tensorrt", version="10.9.0")
    with pytest.raises(UserError, match=r"built by tensorrt 10.9.0. tensorrt is not installed: .*ssod\[trt\]"):
        EngineModel(own)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a CUDA device")
def test_without_a_gpu_loading_says_so(engine: Path) -> None:
    assert installed_for(read_engine(engine)[1], engine).__name__ == "tensorrt_rtx"
    with pytest.raises(
        UserError, match=r"m.engine: an engine needs a CUDA device, and this machine has none. format=onnx"
    ):
        EngineModel(engine)
    with pytest.raises(UserError, match=r"this machine has none"):
        cuda_device("cpu", engine)  # what device=auto comes to here
    with pytest.raises(UserError, match=r"builds on the GPU that shall run .*flavour=tensorrt_rtx"):
        own_capability(SimpleNamespace(__name__="tensorrt"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("inputs", [("images",), ("images", "sizes")])
def test_runs_as_onnxruntime_does(inputs: tuple[str, ...], tmp_path: Path) -> None:
    """Never run so far. Changing shapes, a second stream, tensors that are not contiguous; then what is refused."""
    ort = pytest.importorskip("onnxruntime")
    try:
        trt = load_trt()
    except UserError as error:
        pytest.skip(str(error))
    if has_capabilities(trt) and not runs_on(trt, [], "sm{}{}".format(*torch.cuda.get_device_capability())):
        pytest.skip("tensorrt_rtx does not build for this GPU")
    card = replace(CARD, inputs=inputs)
    onnx_path = write_model(tmp_path / "m.onnx", card)
    build_engine(onnx_path, tmp_path / "m.engine", card=card, batch=BATCH, size=SIZES)
    model = EngineModel(tmp_path / "m.engine")
    session = ort.InferenceSession(onnx_path, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    for shape in ((1, 3, 32, 64), (4, 3, 96, 128), (4, 3, 96, 128), (2, 3, 64, 64)):
        images = torch.rand(shape, generator=generator)
        sizes = torch.tensor([shape[2:]] * shape[0], dtype=torch.int32)
        given = {"images": images.numpy(), "sizes": sizes.numpy()}
        wanted = session.run(list(OUTPUTS), {name: given[name] for name in inputs})
        images = images.cuda()
        if shape[0] == 4:  # the same values, laid out by columns
            images = images.transpose(2, 3).contiguous().transpose(2, 3)
        stream = torch.cuda.Stream() if shape[0] == 2 else torch.cuda.current_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = model(images, sizes.cuda() if "sizes" in inputs else None)
        torch.cuda.synchronize()
        for name, tensor, want in zip(OUTPUTS, found, wanted, strict=True):
            assert tensor.device == model.device
            assert tensor.cpu().numpy().dtype == want.dtype, name
            torch.testing.assert_close(tensor.cpu(), torch.from_numpy(want), rtol=1e-2, atol=1e-3)  # TF32
    with pytest.raises(UserError, match=r"images is torch\.float16"):
        model(torch.rand(1, 3, 32, 64).half().cuda(), sizes.cuda() if "sizes" in inputs else None)
    with pytest.raises(UserError, match="on cpu"):
        model(torch.rand(1, 3, 32, 64), sizes.cuda() if "sizes" in inputs else None)
    with pytest.raises(UserError, match="The engine takes"):
        model(torch.rand(1, 3, 32, 64).cuda(), None if "sizes" in inputs else sizes.cuda())
