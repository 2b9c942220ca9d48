"""`SSOD`: one object for a model of any format. Needs torch only where the model does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ssod.data.sizes import Size
from ssod.deploy.contract import Card
from ssod.deploy.predictor import Predictor, open_model
from ssod.deploy.results import Results
from ssod.deploy.sources import Source


class SSOD:
    """A trained model.

    model    a checkpoint (.pt) written by `ssod train`, or what `ssod export` made of it: .onnx (runs without torch),
             .torchscript, .engine, or an OpenVINO folder
    weights  which network of a checkpoint: "auto" (the one that scored better), "student" or "teacher"
    device   "auto", "cpu", "cuda", "cuda:0" or 0; for .onnx also "tensorrt"

    names  {class number: class name};  card  the description of an exported model, None for a checkpoint
    Raises UserError for a file that cannot be used and a device that cannot be had.
    """

    def __init__(self, model: str | Path, *, weights: str = "auto", device: str | int = "auto") -> None:
        self.path = Path(model)
        self._model = open_model(model, weights, device)
        self.names = dict(enumerate(self._model.names))
        self.card: Card | None = self._model.card

    def __repr__(self) -> str:
        return f"SSOD({self.path}: {len(self.names)} classes, on {self._model.device})"

    def predict(
        self,
        source: Source,
        *,
        conf: float | None = None,
        iou: float | None = None,
        max_det: int | None = None,
        imgsz: Size | None = None,
        classes: Sequence[int | str] | None = None,
        batch: int = 8,
        workers: int = 0,
    ) -> list[Results]:
        """Detect on an image file, a folder, a text list, a glob, an array uint8 [H, W, 3] RGB, a Pillow image, or a
        list of these; results in the order of the sources, without the images that cannot be read.

        The options are those of `Predictor`. Raises UserError as it does.
        """
        predictor = Predictor(
            self._model,
            conf=conf,
            iou=iou,
            max_det=max_det,
            imgsz=imgsz,
            classes=classes,
            batch=batch,
            workers=workers,
        )
        return predictor(source)
