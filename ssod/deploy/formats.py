"""Which kind of model a path is, by its name. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from ssod.errors import UserError, did_you_mean

ENDINGS = {
    ".pt": "checkpoint",
    ".safetensors": "checkpoint",
    ".onnx": "onnx",
    ".torchscript": "torchscript",
    ".engine": "engine",
    ".xml": "openvino",
    "_openvino": "openvino",
}
_KNOWN = (
    ".pt (a checkpoint), .safetensors (one of the zoo's), .onnx, .torchscript, .engine (TensorRT) and .xml or a folder "
    "NAME_openvino (OpenVINO)"
)


def kind_of(path: str | Path) -> str:
    """A value of ENDINGS. Raises UserError for another ending, and for an exported model that is not there."""
    path = Path(path)
    kind = next((kind for ending, kind in ENDINGS.items() if path.name.endswith(ending)), None)
    if kind is None:
        what = f"ends in {path.suffix}" if path.suffix else "has no ending"
        raise UserError(f"model {path} {what}.{did_you_mean(path.suffix, ENDINGS)} Models are {_KNOWN}.")
    if kind != "checkpoint" and not path.exists():
        beside = [p.name for p in path.parent.glob("*") if p.name.endswith(tuple(ENDINGS))]
        raise UserError(f"there is no model {path}.{did_you_mean(path.name, beside)}")
    return kind
