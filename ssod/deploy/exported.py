"""A model of any format, ready for `detect`: checkpoints as detectors, exported files as what is called like one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ssod.data.sizes import Fit, Size
from ssod.deploy.array_model import ArrayModel
from ssod.deploy.asked import Asked, asked, check_weights, fit_of
from ssod.deploy.contract import Card
from ssod.deploy.formats import kind_of
from ssod.deploy.infer import Inference, pick_device
from ssod.deploy.predictor import load_detector, open_arrays
from ssod.deploy.torchscript_model import TorchScriptModel
from ssod.detectors.base import Detector
from ssod.errors import UserError
from ssod.nn.precision import amp_dtype, lay_out
from ssod.structures import Instances
from ssod.zoo.fetch import resolve

Call = Callable[[Tensor, Tensor | None], Sequence[Tensor]]


class Exported(nn.Module):
    """An exported model called as a detector is. It has no parameters: they are in the file.

    call  (images float32 [B, 3, H, W], sizes int32 [B, 2] or None) -> num_dets, boxes, scores, labels; see
          ssod.deploy.contract
    """

    def __init__(self, card: Card, path: Path, call: Call) -> None:
        super().__init__()
        self.card, self.path, self.call = card, path, call
        self.num_classes = len(card.names)

    def forward(
        self,
        images: Tensor,
        sizes: Tensor | None = None,
        conf: float | None = None,
        iou: float | None = None,
        max_det: int | None = None,
    ) -> list[Instances]:
        """images uint8 [B, 3, H, W] or float 0..1, sizes [B, 2] valid (h, w): final detections of each image.

        Raises UserError for thresholds other than those in the file allow, and images larger than a fixed input.
        """
        wanted = asked(self.card, self.path, conf, iou, max_det, default_conf=0.0)
        if sizes is None:
            sizes = torch.tensor(images.shape[2:], device=images.device).expand(len(images), 2)
        canvas = self._canvas(images, sizes)
        needed = sizes.to(torch.int32) if "sizes" in self.card.inputs else None
        # The number format is in the file; a caller's autocast is about detectors.
        with torch.autocast(images.device.type, enabled=False):
            num_dets, boxes, scores, labels = self.call(canvas, needed)
        found = []
        for row, (count, (h, w)) in enumerate(zip(num_dets.flatten().tolist(), sizes.tolist(), strict=True)):
            own = torch.minimum(boxes[row, :count].clamp(min=0), boxes.new_tensor([w, h, w, h]))
            one = Instances(own, labels[row, :count].long(), scores=scores[row, :count])
            inside = (own[:, 2:] > own[:, :2]).all(1)  # a model without `sizes` may find something in the padding
            found.append(one[inside & (scores[row, :count] >= wanted.conf)][: wanted.max_det])
        return found

    def _canvas(self, images: Tensor, sizes: Tensor) -> Tensor:
        """float32 [B, 3, H, W] of a size the model takes, the mean outside of the valid part of each image."""
        rows = sizes.tolist()
        height, width = Fit(0, self.card.multiple, self.card.size).padded(
            *(max(side) for side in zip(*rows, strict=True))
        )
        if any(h > height or w > width for h, w in rows):
            raise UserError(f"images are {rows}; the input of {self.path} is fixed at {height} x {width} pixels.")
        values = images.float() / 255 if images.dtype == torch.uint8 else images
        mean = torch.tensor(self.card.mean, device=images.device).view(1, 3, 1, 1)
        canvas = mean.expand(len(images), 3, height, width).contiguous()
        for own, image, (h, w) in zip(canvas, values, rows, strict=True):
            own[:, :h, :w] = image[:, :h, :w]
        return canvas


def on_arrays(model: ArrayModel) -> Call:
    """A model on arrays as one on tensors, which are on the CPU."""

    def call(images: Tensor, sizes: Tensor | None) -> Sequence[Tensor]:
        given = torch.zeros(len(images), 2, dtype=torch.int32) if sizes is None else sizes
        return [torch.from_numpy(values) for values in model.run(images.numpy(), given.numpy())]

    return call


@dataclass(frozen=True)
class Loaded:
    """A model and how it wants its images.

    card   of an exported model, None of a checkpoint
    dtype  of autocast, None = float32
    most   images at once that an engine takes, None = any number
    """

    path: Path
    detector: Detector | Exported
    names: list[str]
    imgsz: Size
    device: torch.device
    dtype: torch.dtype | None = None
    card: Card | None = None
    most: int | None = None

    def how(self, wanted: Asked, imgsz: Size | None, batch: int, workers: int) -> Inference:
        """Raises UserError for an image size that an exported model does not take."""
        fit = Fit(imgsz or self.imgsz) if self.card is None else fit_of(self.card, self.path, imgsz)
        batch = min(batch, self.most or batch)
        limits = (wanted.conf, wanted.iou, wanted.max_det)
        return Inference(fit.imgsz, self.device, self.dtype, batch, workers, *limits, fit.frame, fit.multiple)


def load_model(path: str | Path, weights: str = "auto", device: str | int = "auto") -> Loaded:
    """Load a checkpoint, an exported model of any format or one of the zoo for PyTorch's side: `detect`, validation,
    labelling.

    weights: "student", "teacher" or "auto"; an exported file holds one of them.
    Raises UserError for an unusable file and for a device that the machine or the format does not have.
    """
    path = resolve(path)
    kind = kind_of(path)
    if kind == "checkpoint":
        detector, content = load_detector(path, weights)
        where = pick_device(device)
        dtype = amp_dtype("auto", where, detector) if where.type == "cuda" else None
        lay_out(detector.to(where), dtype)
        return Loaded(path, detector, content["names"], content["imgsz"], where, dtype)
    if kind == "engine":
        from ssod.deploy.engine_runtime import EngineModel

        engine = EngineModel(path, pick_device(device))
        most = engine.sidecar.profile["images"][2][0]
        return _exported(path, engine.card, engine, engine.device, weights, most)
    if kind == "torchscript":
        script = TorchScriptModel(path, pick_device(device))
        return _exported(path, script.card, script, script.device, weights)
    arrays = open_arrays(path, device)
    return _exported(path, arrays.card, on_arrays(arrays), torch.device("cpu"), weights)


def _exported(
    path: Path, card: Card, call: Call, device: torch.device, weights: str, most: int | None = None
) -> Loaded:
    check_weights(card, path, weights)
    return Loaded(path, Exported(card, path, call), card.names, card.imgsz, device, card=card, most=most)
