"""An exported ONNX file in onnxruntime, on the CPU, CUDA or TensorRT provider. Needs no torch."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ssod.deploy.array_model import ArrayModel, threads
from ssod.deploy.contract import KEY, OUTPUTS, Card, ForeignModel, Outputs
from ssod.errors import UserError, did_you_mean, first_line

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
_KINDS = {"cpu": CPU, "cuda": CUDA, "tensorrt": TENSORRT}


class OnnxModel(ArrayModel):
    """An ONNX file that `ssod export` wrote.

    device  "auto" (CUDA where this onnxruntime has it, else the CPU), "cpu", "cuda", "cuda:1", 0, or "tensorrt", which
            builds an engine when the first image of a size comes: minutes

    Raises ForeignModel for a file of another program, UserError for one that is missing, damaged, or needs a device
    that cannot be had: onnxruntime itself would go on with the CPU and say nothing.
    """

    def __init__(self, path: str | Path, device: str | int = "auto") -> None:
        self.path = Path(path)
        ort = load_onnxruntime()
        wanted, number = parse_device(device)
        available = ort.get_available_providers()
        if wanted is not None and wanted not in available:
            raise UserError(
                f"device={device}: this onnxruntime has no {wanted}, only {', '.join(available)}. Replace the package: "
                "pip uninstall onnxruntime; pip install onnxruntime-gpu. Or use device=cpu."
            )
        hoped = wanted or (CUDA if CUDA in available else CPU)
        self._session = _session(ort, self.path, hoped, number, available)
        got = self._session.get_providers()
        if hoped not in got:
            told = (
                f"onnxruntime could not start its {hoped} and took {got[0]} instead: CUDA, cuDNN, TensorRT or the "
                "driver is missing or of another version (its own message above says which)."
            )
            if wanted is not None:
                raise UserError(f"device={device}: {told} Install what it names, or use device=cpu.")
            warnings.warn(told, RuntimeWarning, stacklevel=2)
        self.device = got[0].removesuffix("ExecutionProvider")
        self.card = Card.loads(self._session.get_modelmeta().custom_metadata_map.get(KEY), self.path)
        inputs = tuple(i.name for i in self._session.get_inputs())
        outputs = tuple(o.name for o in self._session.get_outputs())
        if set(inputs) != set(self.card.inputs) or not set(OUTPUTS) <= set(outputs):
            raise ForeignModel(
                f"{self.path} has the inputs {', '.join(inputs)} and the outputs {', '.join(outputs)}, not those its "
                "description tells of: it was changed after the export. Export it again."
            )

    def run(self, images: np.ndarray, sizes: np.ndarray) -> Outputs:
        return Outputs(*self._session.run(list(OUTPUTS), self.feed(images, sizes)))


def parse_device(device: str | int) -> tuple[str | None, int]:
    """(provider that must be had, or None for "auto"; device number). Raises UserError for what is no device."""
    kind, _, number = ("cuda", "", str(device)) if str(device).isdigit() else str(device).partition(":")
    if kind == "auto" and not number:
        return None, 0
    if kind not in _KINDS or not (number == "" or (number.isdigit() and kind != "cpu")):
        known = ["auto", *_KINDS]
        raise UserError(
            f"device={device} is not a device.{did_you_mean(kind, known)} Use auto, cpu, cuda, 0 or tensorrt."
        )
    return _KINDS[kind], int(number or 0)


def device_of_rank(device: str | int, rank: int) -> str | int:
    """The device of one process of several on a machine: of "auto" and "cuda" each takes the GPU of its own number,
    where this onnxruntime knows GPUs. Any other device is that of all."""
    if device == "cuda" or (device == "auto" and CUDA in load_onnxruntime().get_available_providers()):
        return f"cuda:{rank}"
    return device


def _session(ort: ModuleType, path: Path, hoped: str, number: int, available: Sequence[str]) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads()
    chain = [TENSORRT, CUDA, CPU][[TENSORRT, CUDA, CPU].index(hoped) :]  # what one cannot do, the next one does
    if hoped != CPU and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # CUDA and cuDNN from Python packages, where the system has none
    providers = [(name, {} if name == CPU else {"device_id": str(number)}) for name in chain if name in available]
    try:
        return ort.InferenceSession(str(path), sess_options=options, providers=providers)
    except Exception as error:  # onnxruntime's own classes share no base but this
        raise UserError(
            f"{path} is not an ONNX model that onnxruntime can load, or it is cut off: {first_line(error)}"
        ) from None


def load_onnxruntime() -> ModuleType:
    """Raises UserError where it is not installed."""
    try:
        onnxruntime = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise UserError(
            "an .onnx file needs onnxruntime: pip install onnxruntime, or onnxruntime-gpu for a GPU, never both "
            f"({error})."
        ) from None
    onnxruntime.disable_telemetry_events()  # on Windows it is on
    return onnxruntime
