"""Models that fulfil ssod.deploy.contract and take no training: their answer can be said in advance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from ssod.deploy.contract import KEY, Card
from ssod.deploy.openvino_model import SIDECAR
from ssod.deploy.torchscript_model import EXTRA

NAMES = ["cat", "dog"]
PARTS = np.array([[0.25, 0.25, 0.5, 0.75], [0, 0, 1, 1], [0, 0, 0, 0]], np.float32)  # of the valid image, xyxy
FACTORS = np.array([1, 0.5, 0], np.float32)  # score of each detection = factor * brightest value of the image
LABELS = np.array([1, 0, -1], np.int32)
COUNT = 2  # rows that are detections


def card(**changes: Any) -> Card:
    values: dict[str, Any] = {
        "names": NAMES,
        "detector": "fcos",
        "backbone": "test_resnet",
        "weights": "student",
        "imgsz": 96,
        "size": None,
        "multiple": 32,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "conf": 0.05,
        "iou": 0.6,
        "max_det": 3,
        "target": "onnx",
        "precision": "fp32",
        "inputs": ("images", "sizes"),
        "opset": 18,
        "versions": {"ssod": "0.1.0"},
    }
    return Card(**values | changes)


def write_onnx(path: Path, about: Card | None, sized: bool = True) -> Path:
    """Boxes are PARTS of the valid size (`sized`), else of the padded image."""
    constants = {
        "parts": PARTS[None],
        "factors": FACTORS[None],
        "labels_row": LABELS[None],
        "count": np.array([[COUNT]], np.int32),
        "axes": np.array([1, 2, 3], np.int64),
        "one": np.array([1], np.int64),
        "xyxy": np.array([1, 0, 1, 0], np.int64),
        "rows": np.array([len(LABELS)], np.int64),
    }
    node = helper.make_node
    nodes = [
        node("ReduceMax", ["images", "axes"], ["brightest"], keepdims=0),
        node("Unsqueeze", ["brightest", "one"], ["column"]),
        node("Mul", ["column", "factors"], ["scores"]),
        node("Shape", ["images"], ["batch"], start=0, end=1),
        node("Concat", ["batch", "one"], ["batch_1"], axis=0),
        node("Expand", ["count", "batch_1"], ["num_dets"]),
        node("Concat", ["batch", "rows"], ["batch_d"], axis=0),
        node("Expand", ["labels_row", "batch_d"], ["labels"]),
    ]
    if sized:
        nodes.append(node("Cast", ["sizes"], ["valid"], to=TensorProto.FLOAT))
    else:
        nodes += [
            node("Shape", ["images"], ["padded"], start=2, end=4),
            node("Cast", ["padded"], ["hw"], to=TensorProto.FLOAT),
            node("Concat", ["batch", "two"], ["batch_2"], axis=0),
            node("Expand", ["hw", "batch_2"], ["valid"]),
        ]
        constants["two"] = np.array([2], np.int64)
    nodes += [
        node("Gather", ["valid", "xyxy"], ["whwh"], axis=1),
        node("Unsqueeze", ["whwh", "one"], ["wide"]),
        node("Mul", ["wide", "parts"], ["boxes"]),
    ]
    height, width = (about.size if about is not None and about.size else None) or ("H", "W")
    inputs = [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["B", 3, height, width])]
    if sized:
        inputs.append(helper.make_tensor_value_info("sizes", TensorProto.INT32, ["B", 2]))
    outputs = [
        helper.make_tensor_value_info("num_dets", TensorProto.INT32, ["B", 1]),
        helper.make_tensor_value_info("boxes", TensorProto.FLOAT, ["B", 3, 4]),
        helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["B", 3]),
        helper.make_tensor_value_info("labels", TensorProto.INT32, ["B", 3]),
    ]
    initial = [numpy_helper.from_array(values, name) for name, values in constants.items()]
    graph = helper.make_graph(nodes, "small", inputs, outputs, initial)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    if about is not None:
        model.metadata_props.add(key=KEY, value=about.dumps())
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def write_openvino(folder: Path, about: Card | None) -> Path:
    folder.mkdir()
    source = write_onnx(folder / "source.onnx", about)
    openvino.save_model(openvino.Core().read_model(source), folder / "model.xml", compress_to_fp16=False)
    source.unlink()
    if about is not None:
        (folder / SIDECAR).write_text(about.dumps(), encoding="utf-8")
    return folder


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("parts", torch.from_numpy(PARTS))
        self.register_buffer("factors", torch.from_numpy(FACTORS))
        self.register_buffer("labels", torch.from_numpy(LABELS))
        self.count = COUNT

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        batch = images.shape[0]
        boxes = sizes[:, [1, 0, 1, 0]].float()[:, None] * self.parts
        scores = images.amax((1, 2, 3))[:, None] * self.factors
        num_dets = torch.full([batch, 1], self.count, dtype=torch.int32, device=images.device)
        return num_dets, boxes, scores, self.labels.expand(batch, -1)


def write_torchscript(path: Path, about: Card | None) -> Path:
    extra = {} if about is None else {EXTRA: about.dumps()}
    torch.jit.save(torch.jit.script(Small()), str(path), _extra_files=extra)
    return path


def write_model(folder: Path, kind: str, about: Card | None) -> Path:
    """kind: "onnx", "openvino" or "torchscript"."""
    if kind == "openvino":
        return write_openvino(folder / "small_openvino", about)
    return {"onnx": write_onnx, "torchscript": write_torchscript}[kind](folder / f"small.{kind}", about)
