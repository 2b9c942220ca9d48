"""The protocol between detectors and everybody else: four verbs, none of which depends on `self.training`.

    features(images, sizes, shift=0) -> Pyramid
    head(pyramid)                    -> Output (typed, raw)
    loss(output, targets, weigh)     -> {name: scalar}
    decode(output, conf, iou, max_det) -> B Instances (boxes xyxy px, labels, scores, quality)
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from ssod.structures import DenseOutput, Instances, Pyramid, Weigh


class DetectorOptions(BaseModel):
    """Options of one detector (`detector.NAME=VALUE`); each detector file owns a subclass."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Detector(nn.Module):
    """Base of all detectors. Subclasses set `Options` and implement the four verbs."""

    Options: type[DetectorOptions] = DetectorOptions
    num_classes: int

    def features(self, images: Tensor, sizes: Tensor | None = None, shift: int = 0) -> Pyramid:
        """Normalise and run backbone + neck.

        images  uint8 [B, 3, H, W] 0..255 or float 0..1, RGB, padded at the right and the bottom
        sizes   int64 [B, 2] valid (h, w) in pixels of `images`; None = all of it is valid
        shift   1 says "this image is half-size": strides, frame and sizes are those of the full-size frame
        """
        raise NotImplementedError

    def head(self, pyramid: Pyramid) -> Any:
        raise NotImplementedError

    def loss(self, output: Any, targets: list[Instances], weigh: Weigh | None = None) -> dict[str, Tensor]:
        """Named scalars, finite also where no image has a box; their sum is what is minimised."""
        raise NotImplementedError

    def decode(self, output: Any, conf: float = 0.05, iou: float = 0.6, max_det: int = 100) -> list[Instances]:
        """Final detections of each image, by descending score, clipped to the image's valid size."""
        raise NotImplementedError

    def forward(
        self, images: Tensor, sizes: Tensor | None = None, conf: float = 0.05, iou: float = 0.6, max_det: int = 100
    ) -> list[Instances]:
        with torch.no_grad():
            return self.decode(self.head(self.features(images, sizes)), conf, iou, max_det)


@runtime_checkable
class HasDense(Protocol):
    """Class and box maps of every candidate: what SED's re-weighting and Co-mining work on."""

    def dense(self, output: Any) -> DenseOutput: ...


@runtime_checkable
class HasRegions(Protocol):
    """Region proposals that another network may score: what PRC and Soft Teacher's jitter need."""

    def proposals(self, output: Any) -> list[Tensor]: ...

    def refine(self, output: Any, boxes: list[Tensor]) -> list[Instances]: ...
