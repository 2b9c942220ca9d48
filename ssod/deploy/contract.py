"""What every exported model is, whatever its format: names, shapes and the card that rides in the file.

Letters: B images, D = card.max_det. Inputs: `images` float32 [B, 3, H, W], RGB 0 .. 1, the image in the upper left
corner, padding filled with `card.mean`; for deformable_detr also `sizes` int32 [B, 2], the valid (h, w) in pixels.
Outputs, by descending score: `num_dets` int32 [B, 1], `boxes` float32 [B, D, 4] xyxy pixels of the input, `scores`
float32 [B, D], `labels` int32 [B, D]; rows from `num_dets` on are 0, 0 and -1. Normalisation, thresholds and NMS are in
the graph. This file, as all that runs an ONNX model, needs numpy and no torch.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ssod.deploy.described import described
from ssod.errors import UserError

T = TypeVar("T")
KEY = "ssod"  # of the card in a file's metadata
FORMAT = 1
OUTPUTS = ("num_dets", "boxes", "scores", "labels")


class Outputs(NamedTuple):
    """What a model gave for B images: see the top of this file."""

    num_dets: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


class ForeignModel(UserError):
    """A model file that was not exported by ssod."""


def from_description(kind: type[T], values: Any, path: object) -> T:
    """A dataclass from what a description holds. Raises ForeignModel, naming `path`, for values it cannot have."""
    try:
        return described(kind, values)
    except ValueError as error:
        raise ForeignModel(f"{path}: its description is not what ssod writes ({error}). Export it again.") from None


@dataclass(frozen=True)
class Card:
    """What a program must know of an exported model.

    names      class names, in label order
    detector   "fcos", ...; backbone  a timm name; weights  "student" or "teacher"
    imgsz      long side of an image in pixels, or [short, long], as trained
    size       (H, W) of the input in pixels, or None: any multiples of `multiple`
    multiple   what H and W are multiples of
    mean, std  of R, G, B on the 0 .. 1 scale; the graph normalises by itself, padding is filled with `mean`
    conf, iou, max_det  lowest score, NMS threshold and most detections of an image, fixed in the graph
    target     "onnx", "onnxruntime" or "tensorrt": which operators the graph is made of
    precision  "fp32", "fp16" or "int8"
    inputs     ("images",) or ("images", "sizes")
    opset      of the ONNX file, 0 elsewhere
    versions   {"ssod": ..., "torch": ...} that made it
    source     SHA-256 of the checkpoint, or "" where it came from memory
    """

    names: list[str]
    detector: str
    backbone: str
    weights: str
    imgsz: int | list[int]
    size: tuple[int, int] | None
    multiple: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    conf: float
    iou: float
    max_det: int
    target: str
    precision: str
    inputs: tuple[str, ...]
    opset: int
    versions: dict[str, str]
    source: str = ""

    def __post_init__(self) -> None:
        for name in ("multiple", "max_det"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, not above 0")

    def dumps(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, ensure_ascii=False)

    @staticmethod
    def loads(text: str | None, path: object) -> Card:
        """Raises ForeignModel, naming `path`, for text that no export of ssod wrote."""
        try:
            values: dict[str, Any] = json.loads(text or "")
            found = values.pop("format")
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise ForeignModel(
                f"{path} carries no description by ssod: it was exported by another program. "
                "Export a checkpoint with `ssod export model=best.pt`."
            ) from None
        if found != FORMAT:
            raise ForeignModel(
                f"{path} has description format {found}; this version of ssod reads format {FORMAT}. Export it again."
            )
        known = {f.name for f in fields(Card)}
        return from_description(Card, {k: v for k, v in values.items() if k in known}, path)
