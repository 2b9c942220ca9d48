"""An exported OpenVINO model on the CPU. Needs no torch."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from ssod.deploy.array_model import ArrayModel, threads
from ssod.deploy.contract import OUTPUTS, Card, Outputs
from ssod.errors import UserError

SIDECAR = "ssod.json"  # the card, beside the .xml in its folder


def write_openvino(onnx: Path, folder: Path, card: Card) -> None:
    """An ONNX file as a folder: model.xml, model.bin and the card. Weights are fp16 where the card says so.

    Raises UserError without openvino.
    """
    openvino = _package()
    folder.mkdir()
    model = openvino.Core().read_model(onnx)
    openvino.save_model(model, folder / "model.xml", compress_to_fp16=card.precision == "fp16")
    (folder / SIDECAR).write_text(card.dumps(), encoding="utf-8")


def _package() -> Any:
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        raise UserError(f"OpenVINO models need openvino: pip install openvino ({error}).") from None


class OpenVinoModel(ArrayModel):
    """A folder NAME_openvino that `ssod export` wrote (an .xml, a .bin and ssod.json), or the .xml in it.

    Raises ForeignModel where there is no ssod.json, UserError for a damaged model and another device than the CPU.
    """

    device = "CPU"

    def __init__(self, path: str | Path, device: str | int = "auto") -> None:
        self.path = Path(path)
        if device not in ("auto", "cpu"):
            raise UserError(
                f"device={device}: OpenVINO models run on the CPU. Leave out device=, or use an .onnx file."
            )
        openvino = _package()
        xml = _xml_of(self.path)
        sidecar = xml.with_name(SIDECAR)
        self.card = Card.loads(sidecar.read_text(encoding="utf-8") if sidecar.is_file() else None, self.path)
        settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads()} if threads() else {}
        if self.card.precision == "fp32":  # else CPUs with bf16 instructions silently use them
            settings["INFERENCE_PRECISION_HINT"] = "f32"
        try:
            core = openvino.Core()
            self._model = core.compile_model(core.read_model(xml), "CPU", settings)
        except Exception as error:  # openvino raises RuntimeError and its own kinds for broken files
            last = str(error).strip().splitlines()[-1].strip()
            raise UserError(f"{xml} cannot be loaded by OpenVINO, or it is cut off: {last}") from None

    def run(self, images: np.ndarray, sizes: np.ndarray) -> Outputs:
        found = self._model(self.feed(images, sizes), share_outputs=False)
        return Outputs(*(found[name] for name in OUTPUTS))


def _xml_of(path: Path) -> Path:
    if path.is_file():
        return path
    files = sorted(path.glob("*.xml"))
    if len(files) != 1:
        raise UserError(f"{path} holds {len(files)} .xml files. Give the one to run.")
    return files[0]
