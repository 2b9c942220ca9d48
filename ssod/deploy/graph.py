"""A detector becomes an ONNX file: normalisation in, final boxes out, fixed output shapes, no path of this machine.

The file fulfils `ssod.deploy.contract`. Training heads and teachers are no part of a detector: none enters the graph.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ssod.deploy.contract import KEY, OUTPUTS, Card
from ssod.detectors.base import Detector
from ssod.errors import UserError, first_line
from ssod.files import replacing
from ssod.ops.fixed import Detections
from ssod.ops.forms import Target, graph_for

OPSETS = (18, 22)  # lowest and highest; 23 has an Attention that TensorRT does not take
TRACED = (2, 320, 416)  # batch, H, W: the exporter would take any size of 1 for a constant, at stride 128 too
LARGEST = 1 << 14  # pixels of a side


class Graph(nn.Module):
    """What is exported of a detector: images float32 [B, 3, H, W] 0..1 in, and for some int32 [B, 2] valid sizes."""

    def __init__(self, detector: Detector, conf: float, iou: float, max_det: int) -> None:
        super().__init__()
        self.detector = detector
        self.thresholds = (conf, iou, max_det)

    def forward(self, images: Tensor, sizes: Tensor | None = None) -> Detections:
        pyramid = self.detector.features(images, sizes)
        return self.detector.fixed(self.detector.head(pyramid), *self.thresholds)


def export_onnx(detector: Detector, path: Path, card: Card) -> None:
    """Write `detector` as the ONNX file that `card` describes, in float32; card.precision is the caller's to fulfil.

    The detector is in eval mode on the CPU. Raises UserError without the packages that it takes, and for a network
    that torch cannot export.
    """
    check_installed()
    import onnx

    model = folded(_traced(detector, card).model_proto)
    if card.target == "onnxruntime" and card.precision == "fp32":  # int8 is for convolutions as they are
        from ssod.deploy.onnx_winograd import fewer_products

        fewer_products(model, _empty(card))
    for node in _nodes(model.graph):
        del node.metadata_props[:]  # stack traces, with the paths of this machine
        node.doc_string = ""
    assert not model.functions, "everything is inlined"
    stamp(model, card)
    with replacing(path) as file:
        onnx.save(model, file)


def _empty(card: Card) -> dict[str, np.ndarray]:
    """An image without anything to see, of the size that the model is for."""
    long = card.imgsz if isinstance(card.imgsz, int) else max(card.imgsz)
    height, width = card.size or [-(-long // card.multiple) * card.multiple] * 2
    feed = {"images": np.zeros((1, 3, height, width), np.float32), "sizes": np.array([[height, width]], np.int32)}
    return {name: feed[name] for name in card.inputs}


def folded(model: Any) -> Any:
    """Products of weights as numbers: the exporter leaves large ones, such as those with the scale of a frozen norm,
    and neither half precision nor int8 would know them for weights."""
    from onnxscript import optimizer

    return optimizer.optimize(model, input_size_limit=1 << 31)  # what grows by it is left alone all the same


def check_installed() -> None:
    """Raises UserError where a package is missing that writing or checking an ONNX file takes."""
    from importlib.util import find_spec

    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise UserError(f"export needs {' and '.join(missing)}, not installed here: pip install 'ssod[export]'.")


def stamp(model: Any, card: Card) -> None:
    """Put the card into an ONNX model, and nothing else."""
    del model.metadata_props[:]
    model.metadata_props.add(key=KEY, value=card.dumps())
    model.doc_string = ""
    model.producer_name, model.producer_version = "ssod", card.versions["ssod"]


def _traced(detector: Detector, card: Card) -> Any:
    batch, height, width = TRACED
    height, width = card.size or (height, width)
    args: tuple[Tensor, ...] = (torch.rand(batch, 3, height, width),)
    b = torch.export.Dim("batch", min=1, max=1024)
    shapes: list[dict[int, Any]] = [{0: b}]
    if card.size is None:
        most = LARGEST // card.multiple
        shapes[0] |= {2: card.multiple * torch.export.Dim("rows", max=most)}
        shapes[0] |= {3: card.multiple * torch.export.Dim("columns", max=most)}
    if "sizes" in card.inputs:
        args += (torch.tensor([[height, width]] * batch, dtype=torch.int32),)
        shapes.append({0: b})
    graph = Graph(detector, card.conf, card.iou, card.max_det).eval()
    target = cast(Target, card.target)
    with torch.no_grad(), graph_for(target), _quiet():
        try:
            return torch.onnx.export(
                graph,
                args,
                dynamo=True,
                dynamic_shapes=tuple(shapes),
                input_names=list(card.inputs),
                output_names=list(OUTPUTS),
                opset_version=card.opset,
                custom_translation_table=_translations(),
            )
        except (torch.onnx.OnnxExporterError, RuntimeError, ValueError) as error:
            said = first_line(error.__cause__ or error)
            raise UserError(
                f"torch {torch.__version__} cannot export {card.detector} on {card.backbone}: {said}. "
                f"Try {'a fixed size, without dynamic=true, or ' if card.size is None else ''}another backbone."
            ) from error


def _translations() -> dict[Any, Any]:
    import ssod.ops.roi_samples  # noqa: F401  its operator is there from then on, and Faster R-CNN alone loads it
    from ssod.deploy.onnx_nms import nms_keep
    from ssod.deploy.onnx_roi import pooled_samples

    return {torch.ops.ssod.nms_keep.default: nms_keep, torch.ops.ssod.pooled_samples.default: pooled_samples}


@contextlib.contextmanager
def _quiet() -> Any:
    """The exporter talks of its progress and of its own deprecations, at length to a listener such as a test runner."""
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "onnxscript", "torch.export", "torch.__trace")]
    levels = [g.level for g in loggers]
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        for g in loggers:
            g.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for g, level in zip(loggers, levels, strict=True):
                g.setLevel(level)


def _nodes(graph: Any) -> Sequence[Any]:
    """All nodes, also of branches and loops."""
    found = list(graph.node)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                found += _nodes(attribute.g)
    return found
