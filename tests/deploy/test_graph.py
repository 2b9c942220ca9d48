"""Exported graphs of all detectors: they run in onnxruntime, find what the detector finds, and tell nothing else."""

import dataclasses
import sys

import numpy as np
import pytest
import torch

from ssod.deploy.contract import KEY, Card

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from ssod.deploy.compare import GATES  # noqa: E402
from ssod.deploy.graph import export_onnx  # noqa: E402
from ssod.deploy.onnx_model import OnnxModel  # noqa: E402
from ssod.deploy.verify import pictures, verify  # noqa: E402
from ssod.detectors import build_detector  # noqa: E402

SMALL = {
    "fcos": {"fpn_channels": 16, "head_convs": 1, "head_groups": 4},
    "retinanet": {"fpn_channels": 16, "head_convs": 1},
    "faster_rcnn": {"fpn_channels": 16, "box_head_width": 32, "test_pre_nms": 200, "test_proposals": 100},
    "deformable_detr": {
        "width": 32,
        "heads": 2,
        "feed_forward": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "queries": 50,
    },
}
CARD = Card(
    names=["Zelle", "größer", "c"],
    detector="fcos",
    backbone="test_resnet",
    weights="student",
    imgsz=256,
    size=None,
    multiple=32,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    conf=0.1,
    iou=0.5,
    max_det=40,
    target="onnx",
    precision="fp32",
    inputs=("images",),
    opset=18,
    versions={"ssod": "0", "torch": "0"},
)
SLOW = pytest.mark.slow
FIXED = (192, 256)
# A graph for any size takes more than twice as long to write.
ALL = [
    *(pytest.param((n, "tensorrt", FIXED), id=f"{n}-tensorrt-fixed") for n in ("fcos", "deformable_detr")),
    *(pytest.param((n, "tensorrt", FIXED), id=f"{n}-tensorrt-fixed", marks=SLOW) for n in ("retinanet", "faster_rcnn")),
    pytest.param(("faster_rcnn", "onnx", FIXED), id="faster_rcnn-onnx-fixed", marks=SLOW),
    pytest.param(("faster_rcnn", "onnxruntime", FIXED), id="faster_rcnn-onnxruntime-fixed"),
    pytest.param(("faster_rcnn", "onnxruntime", None), id="faster_rcnn-onnxruntime", marks=SLOW),
    pytest.param(("fcos", "onnx", None), id="fcos-onnx"),
    *(pytest.param((name, "onnx", None), id=f"{name}-onnx", marks=SLOW) for name in SMALL if name != "fcos"),
    *(pytest.param((name, "tensorrt", None), id=f"{name}-tensorrt", marks=SLOW) for name in SMALL),
]


def lively(name, **options):
    """A network of random weights whose scores and boxes differ from place to place."""
    torch.manual_seed(0)
    model = build_detector(name, 3, "test_resnet", SMALL[name] | options).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if any(word in key for word in ("logits", "codes", "cls_heads", "box_heads", "centerness")):
                parameter.add_(torch.randn(parameter.shape) * (0.2 if parameter.dim() > 1 else 0.05))
                if parameter.dim() == 1 and ("logits" in key or "cls_heads" in key):
                    parameter.clamp_(min=-2)
    return model


@pytest.fixture(scope="module", params=ALL)
def made(request, tmp_path_factory):
    name, target, size = request.param
    wide = {"fpn_channels": 96} if target == "onnxruntime" else {}  # for Winograd's form, which narrow layers never get
    detector = lively(name, **wide)
    inputs = ("images", "sizes") if name == "deformable_detr" else ("images",)
    card = dataclasses.replace(CARD, detector=name, target=target, size=size, inputs=inputs)
    path = tmp_path_factory.mktemp("graph") / f"{name}.onnx"
    export_onnx(detector, path, card)
    return detector, card, path


def gate(card):
    """What an export must pass. On flat ground and in padding, which Faster R-CNN is not told of, cells look alike:
    which of them a network finds that has not learned is a matter of rounding, so a few boxes may be others."""
    lenient = card.detector == "faster_rcnn" and card.size is None
    return dataclasses.replace(GATES["fp32"], unmatched=0.03) if lenient else GATES["fp32"]


def test_finds_what_the_detector_finds(made):
    detector, card, path = made
    model = OnnxModel(path)
    difference = verify(detector, card, model.run, pictures([])[0], GATES["fp32"].score)
    assert difference.passes(gate(card)), difference.text()
    assert difference.total > 50


def test_the_file_is_valid_and_carries_its_card_and_no_path(made):
    _, card, path = made
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {p.key: p.value for p in model.metadata_props} == {KEY: card.dumps()}
    assert OnnxModel(path).card == card
    content = path.read_bytes()
    for word in (b"site-packages", sys.prefix.encode(), b"ssod/detectors", b".py"):
        assert word not in content
    operators = {n.op_type for n in model.graph.node}
    if card.target == "tensorrt":
        assert not operators & {"NonMaxSuppression", "RoiAlign", "NonZero", "GridSample", "ScatterND"}
    if card.target == "onnxruntime":
        assert sum(n.op_type == "MatMul" for n in model.graph.node) > 36  # the products of ssod.deploy.onnx_winograd
    assert not model.functions


def test_no_image_at_all_to_see_is_no_detection_too_many(made):
    """Outputs have fixed shapes, and rows beyond num_dets are 0, 0 and -1."""
    _, card, path = made
    h, w = card.size or (64, 96)
    for batch in (1, 3):
        images = np.broadcast_to(np.reshape(card.mean, (1, 3, 1, 1)), (batch, 3, h, w)).astype(np.float32)
        out = OnnxModel(path).run(images, np.array([[h, w]] * batch, np.int32))
        assert [o.shape for o in out] == [(batch, 1), (batch, 40, 4), (batch, 40), (batch, 40)]
        assert [o.dtype for o in out] == [np.int32, np.float32, np.float32, np.int32]
        rest = np.arange(40) >= out.num_dets
        assert (out.labels[rest] == -1).all()
        assert not out.boxes[rest].any()
        assert (out.labels[~rest] >= 0).all()
        assert (out.scores[~rest] > card.conf).all()


def test_builds_as_an_engine(made, tmp_path):
    """Built, not run: that takes a GPU. The two stages, a minute's work, are built by `make test-slow` alone."""
    pytest.importorskip("tensorrt_rtx")
    from ssod.deploy.engine import build_engine

    _, card, path = made
    if card.target != "tensorrt":
        pytest.skip("a graph for other programs")
    size = None if card.size else ((64, 64), (192, 256), (256, 256))
    engine = tmp_path / "m.engine"
    sidecar = build_engine(path, engine, card=card, batch=(1, 2, 4), size=size, flavour="tensorrt_rtx")
    assert sidecar.profile["images"][2] == (4, 3, *(card.size or (256, 256)))
    assert engine.stat().st_size > 1e6


def test_openvino_finds_the_same(made, tmp_path):
    pytest.importorskip("openvino")
    from ssod.deploy.openvino_model import OpenVinoModel, write_openvino

    detector, card, path = made
    if card.target != "onnx":
        pytest.skip("a graph for another program")
    write_openvino(path, tmp_path / "m_openvino", card)
    model = OpenVinoModel(tmp_path / "m_openvino")
    assert model.card == card
    difference = verify(detector, card, model.run, pictures([])[0], GATES["fp32"].score)
    assert difference.passes(gate(card)), difference.text()
    assert difference.total > 50
