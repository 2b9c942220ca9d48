"""An fp32 ONNX file becomes one that mostly computes in int8, by onnxruntime's static quantisation.

Around every convolution, every hidden layer of the RoI head and both layers of a transformer's feed-forward stand pairs
of QuantizeLinear and DequantizeLinear, with scales from what went through it on real images; the programs that run the
file fuse them with it. All else, other layers, decoding and NMS, stays fp32.
The two targets want different files: on a CPU activations of 8 bits without a sign are 2.6 times as fast as fp32, those
with one hardly faster, and TensorRT takes none but signed ones around 0.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ssod.deploy.contract import KEY
from ssod.deploy.graph import check_installed
from ssod.errors import UserError
from ssod.files import replacing

if TYPE_CHECKING:
    from onnx import ModelProto

Batch = dict[str, np.ndarray]  # {input name: values}
_LAYERS = ["Conv", "Gemm", "MatMul"]
# Percent of a tensor's values that the 256 steps cover; what lies beyond is clipped. AP of a RetinaNet on blood cells,
# target onnx, 16 images: 33.0 in fp32; 31.8 with this, 31.0 with 99.999, 31.2 with all values, 28.5 with 99.9, 30.5 by
# onnxruntime's entropy method. Leaving out the convolutions that give scores and codes did not help (30.9, of 31.2).
_COVERED = 99.99


def quantize(onnx_in: Path, onnx_out: Path, batches: Iterable[Batch], target: Literal["onnx", "tensorrt"]) -> None:
    """Write the int8 form of `onnx_in` to `onnx_out`, calibrated on `batches`, which are read once and not kept.

    The card goes over, with precision "int8". Raises UserError without a batch, or without onnx or onnxruntime.
    """
    check_installed()
    import onnx
    from onnxruntime.quantization import QDQQuantizer, QuantType  # type: ignore[import-untyped]

    model = onnx.load(onnx_in)
    metadata = {p.key: p.value for p in model.metadata_props}
    signed = target == "tensorrt"
    with contextlib.redirect_stdout(io.StringIO()):  # it tells of its progress, tensor by tensor
        ranges = _ranges(model, batches)
        quantizer = QDQQuantizer(
            onnx.shape_inference.infer_shapes(model),
            per_channel=True,
            reduce_range=False,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QInt8 if signed else QuantType.QUInt8,
            tensors_range=ranges,
            nodes_to_quantize=[],
            nodes_to_exclude=_left_alone(model),
            op_types_to_quantize=_LAYERS,
            # What comes out of a product has its bias added in fp32. TensorRT has zero points of 0 only, and adds
            # biases of convolutions in fp32, too.
            extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul"]}
            | ({"ActivationSymmetric": True, "QuantizeBias": False} if signed else {}),
        )
        quantizer.quantize_model()
    quantizer.model.topological_sort()
    made = quantizer.model.model
    if KEY in metadata:
        metadata[KEY] = json.dumps(json.loads(metadata[KEY]) | {"precision": "int8"}, ensure_ascii=False)
    onnx.helper.set_model_props(made, metadata)  # without what onnxruntime notes for itself
    made.producer_name, made.producer_version = model.producer_name, model.producer_version
    for node in made.graph.node:
        del node.metadata_props[:]
    onnx.checker.check_model(made, full_check=True)
    with replacing(onnx_out) as file:
        onnx.save(made, file)


def _left_alone(model: ModelProto) -> list[str]:
    """Products that stay fp32: all but hidden layers, which a ReLU follows, and the way back from one to as many
    channels as went into it.

    Layers of scores and codes are small, and AP suffers: of a Faster R-CNN on blood cells 49.2 in fp32, 48.9 with int8
    convolutions alone, 48.8 with the hidden layers, too, and 48.1 with these (40 images).
    """
    nodes = model.graph.node
    weights = {t.name: list(t.dims) for t in model.graph.initializer}
    bias_of = {name: n.output[0] for n in nodes if n.op_type == "Add" for name in n.input}
    active = {n.input[0]: n.output[0] for n in nodes if n.op_type == "Relu"}
    products = [n for n in nodes if n.op_type == "Gemm" or (n.op_type == "MatMul" and n.input[1] in weights)]
    hidden, entered = set(), {}  # entered: {what comes out of a hidden layer: channels that went in}
    for node in products:
        relu = active.get(node.output[0]) or active.get(bias_of.get(node.output[0], ""))
        if relu:
            hidden.add(node.name)
            entered[relu] = weights[node.input[1]][0] if node.op_type == "MatMul" else 0
    back = {n.name for n in products if n.op_type == "MatMul" and weights[n.input[1]][1] == entered.get(n.input[0])}
    return [n.name for n in nodes if n.op_type in ("Gemm", "MatMul") and n.name not in hidden | back]


def _ranges(model: ModelProto, batches: Iterable[Batch]) -> Any:
    """What goes in and out of each layer, as lowest and highest value worth a step.

    onnxruntime's calibrator keeps every value of every tensor until it has seen all data, gigabytes after a few images.
    So it is given one batch at a time, after which it keeps a histogram a tensor.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, create_calibrator

    with tempfile.TemporaryDirectory(prefix="ssod-int8-") as folder:
        file = Path(folder) / "model.onnx"
        onnx.save(model, file)
        calibrator = create_calibrator(
            file,
            _LAYERS,
            str(Path(folder) / "augmented.onnx"),
            CalibrationMethod.Percentile,
            extra_options={"percentile": _COVERED},
        )
        seen = False
        for batch in batches:
            calibrator.collect_data(_Once(batch))
            seen = True
        if not seen:
            raise UserError(
                "int8 is calibrated on images and there is none: give data= with images in its train split."
            )
        return calibrator.compute_data()


class _Once:
    """What onnxruntime calls a reader, of a single batch."""

    def __init__(self, batch: Batch) -> None:
        self.batch: Batch | None = batch

    def get_next(self) -> Batch | None:
        batch, self.batch = self.batch, None
        return batch
