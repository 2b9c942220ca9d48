"""Images in, `Results` out, by a model of any format. Needs no strategy and no trainer; for ONNX and OpenVINO files no
torch either: it is imported where a checkpoint, TorchScript or an engine is loaded, never at the top."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ssod.data.sizes import Size
from ssod.deploy.array_model import ArrayModel, Found, find_on_arrays
from ssod.deploy.asked import Asked, asked, check_weights, fit_of
from ssod.deploy.formats import kind_of
from ssod.deploy.results import Results
from ssod.deploy.sources import Picture, Source, pictures
from ssod.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from ssod.deploy.exported import Loaded
    from ssod.detectors.base import Detector

_MANY = 1000  # detections kept before some classes are picked: others must not crowd out the wanted ones


def load_detector(path: str | Path, weights: str = "auto") -> tuple[Detector, dict[str, Any]]:
    """Build the detector a checkpoint records, in eval mode on the CPU, and return it with the checkpoint.

    weights: "student", "teacher" or "auto" (the one that scored better, as the checkpoint says).
    Raises CheckpointError for an unusable file, UserError when it holds no such network.
    """
    from ssod.checkpoint import load_checkpoint
    from ssod.detectors import build_detector

    content = load_checkpoint(path)
    use = content["use"] if weights == "auto" else weights
    if use not in content["networks"]:
        raise UserError(f"{path} holds no {use}, only {', '.join(content['networks'])}. Leave out weights={weights}.")
    detector = build_detector(**content["spec"])
    detector.load_state_dict(content["networks"][use])
    return detector.eval(), content


def open_arrays(path: Path, device: str | int = "auto") -> ArrayModel:
    """Open an .onnx file or an OpenVINO model. Raises UserError for one that cannot be used."""
    if kind_of(path) == "onnx":
        from ssod.deploy.onnx_model import OnnxModel

        return OnnxModel(path, device)
    from ssod.deploy.openvino_model import OpenVinoModel

    return OpenVinoModel(path, device)


def open_model(path: str | Path, weights: str = "auto", device: str | int = "auto") -> ArrayModel | Loaded:
    """Open a model for a Predictor, its format by the ending: see ssod.deploy.formats.

    Raises UserError for a file that cannot be used, another network than that in it, and a missing device.
    """
    if kind_of(path) in ("onnx", "openvino"):
        model = open_arrays(Path(path), device)
        check_weights(model.card, path, weights)
        return model
    from ssod.deploy.exported import load_model

    return load_model(path, weights, device)


class Predictor:
    """Detect objects on images.

    model    a checkpoint written by `ssod train`, a model written by `ssod export`, or one that `open_model` opened
    weights  "auto", "student" or "teacher"
    device   "auto", "cpu", "cuda", "cuda:0" or 0; for .onnx also "tensorrt"
    imgsz    long side of the image, pixels; None = as trained
    conf     lowest score, None = 0.25; iou  class-wise NMS threshold, None = 0.6; max_det  most detections of an
             image, None = 100. In an exported model they are fixed: None takes its own, conf may be higher and max_det
             smaller than that
    classes  keep only these classes, names or numbers
    batch    images at once; workers  what reads images ahead (0 = nothing)

    Raises UserError for a file, device or class that does not exist, and for what an exported model cannot give.
    """

    def __init__(
        self,
        model: str | Path | ArrayModel | Loaded,
        *,
        weights: str = "auto",
        device: str | int = "auto",
        imgsz: Size | None = None,
        conf: float | None = None,
        iou: float | None = None,
        max_det: int | None = None,
        classes: Sequence[int | str] | None = None,
        batch: int = 8,
        workers: int = 0,
    ) -> None:
        self.model = open_model(model, weights, device) if isinstance(model, str | Path) else model
        self.names = self.model.names
        self.asked = asked(self.model.card, self.model.path, conf, iou, max_det)
        self.classes = None if classes is None else [self._class_number(c) for c in classes]
        self.imgsz, self.batch, self.workers = imgsz, batch, workers
        self.unreadable: list[tuple[str, str]] = []  # (path, reason) of sources skipped by the last call

    def __call__(self, source: Source) -> list[Results]:
        """Detect on an image file, a folder, a text list, a glob, an array uint8 [H, W, 3] RGB, a Pillow image, or a
        list of these; results in the order of the sources.

        Images that cannot be read are left out and listed in `unreadable`. Raises UserError when there is no image.
        """
        given = list(pictures(source))
        self.unreadable = []
        results: dict[int, Results] = {}
        for index, boxes, speed in self._find(given):
            keep = boxes.conf >= self.asked.conf
            if self.classes is not None:
                keep &= np.isin(boxes.cls, self.classes)
            kept = boxes[keep][: self.asked.max_det]
            results[index] = Results(kept, given[index].path, self.names, speed, given[index].pixels)
        if not results:
            first, reason = self.unreadable[0]
            raise UserError(f"none of the {len(given)} images can be read; the first, {first}: {reason}.")
        return [results[i] for i in sorted(results)]

    def _find(self, given: list[Picture]) -> Iterator[Found]:
        if isinstance(self.model, ArrayModel):
            fit = fit_of(self.model.card, self.model.path, self.imgsz)
            return find_on_arrays(self.model, given, fit, self.batch, self.workers, self.unreadable)
        from ssod.deploy.infer import find_on_tensors

        wanted = self.asked
        if self.classes is not None and self.model.card is None:
            wanted = Asked(wanted.conf, wanted.iou, max(_MANY, wanted.max_det))
        how = self.model.how(wanted, self.imgsz, self.batch, self.workers)
        return find_on_tensors(self.model.detector, given, how, self.unreadable)

    def _class_number(self, name: int | str) -> int:
        if isinstance(name, int) and 0 <= name < len(self.names):
            return name
        if name in self.names:
            return self.names.index(str(name))
        raise UserError(
            f"classes: the model has no class {name!r}.{did_you_mean(str(name), self.names)} "
            f"It knows {', '.join(self.names)}."
        )
