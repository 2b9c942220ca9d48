"""The protocol between detectors and everybody else: four verbs, none of which depends on `self.training`.

features(images, sizes, shift=0) -> Pyramid
head(pyramid)                    -> Output (typed, raw)
loss(output, targets, weigh)     -> {name: scalar}
decode(output, conf, iou, max_det) -> B Instances (boxes xyxy px, labels, scores, quality); `fixed` in fixed shapes,
                                      `pseudo` where they are to teach
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from ssod.errors import UserError
from ssod.nn.backbone import Backbone
from ssod.ops.assign import PaddedTargets
from ssod.ops.codecs import Codec
from ssod.ops.fixed import Detections
from ssod.ops.forms import extent
from ssod.ops.set_matching import CostWeights
from ssod.structures import Candidates, DenseOutput, Instances, Pyramid, SlotOutput, Weigh, Weights


class DetectorOptions(BaseModel):
    """Options of one detector (`detector.NAME=VALUE`); each detector file owns a subclass.

    Whatever a network grows with has an upper bound: a checkpoint from a stranger may name any number of layers.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Detector(nn.Module):
    """Base of all detectors. Subclasses set `Options`, implement the four verbs, and are made by `build_detector`."""

    Options: type[DetectorOptions] = DetectorOptions
    num_classes: int
    backbone: Backbone
    classifier: tuple[str, ...]  # its modules that class scores depend on and boxes do not
    spec: dict[str, Any]  # plain values; `build_detector(**spec)` makes the same architecture again

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

    def pseudo(self, output: Any, conf: float, iou: float, max_det: int) -> list[Instances]:
        """As `decode`, for detections that are to teach: the sure ones count, so fewer candidates may be looked at."""
        return self.decode(output, conf, iou, max_det)

    def fixed(self, output: Any, conf: float = 0.05, iou: float = 0.6, max_det: int = 100) -> Detections:
        """As `decode`, in fixed shapes: what an exported graph computes."""
        raise NotImplementedError

    def forward(
        self, images: Tensor, sizes: Tensor | None = None, conf: float = 0.05, iou: float = 0.6, max_det: int = 100
    ) -> list[Instances]:
        with torch.no_grad():
            return self.decode(self.head(self.features(images, sizes)), conf, iou, max_det)


@runtime_checkable
class HasDense(Protocol):
    """Class and box maps of every candidate: what SED's re-weighting and Co-mining work on.

    Those of a detector of two stages are its first stage's: one logit, an object or not.

    codec  what the codes of `dense` mean
    """

    @property
    def codec(self) -> Codec: ...

    def dense(self, output: Any) -> DenseOutput: ...


@runtime_checkable
class HasSlots(Protocol):
    """Queries with an embedding, class logits and a box each, in no order: what is matched by Hungarian assignment.

    cost  how much class, L1 distance and GIoU count in the matching
    """

    @property
    def cost(self) -> CostWeights: ...

    def slots(self, output: Any) -> SlotOutput: ...


@dataclass
class RegionOutput:
    """What a region head says of M given boxes of the batch, the first image's first.

    logits   float32 [M, K + 1]  before the softmax, background last
    labels   int64 [M]           the class whose box is given
    boxes    float32 [M, 4]      xyxy pixels, the given box as corrected for that class, not clipped
    quality  float32 [M]         0 .. 1, the codec's, None where it has none
    rows     int64 [M]           which of the boxes asked about these are; None: all
    """

    logits: Tensor
    labels: Tensor
    boxes: Tensor
    quality: Tensor | None
    rows: Tensor | None = None


@runtime_checkable
class HasRegions(Protocol):
    """Region proposals that another network may score: what PRC and Soft Teacher's jitter need.

    proposals  B tensors [R, 4] xyxy pixels, by descending objectness
    read       boxes of each image -> what the head says of them, with gradient; corrected for the class asked for
               (labels of each image, int64 [R]) or for the best one; where `wanted`, bool [M], is given, of those only
    classify   boxes of each image -> probabilities [R, K + 1] of each, background last
    refine     boxes of each image -> as many Instances, same order: boxes as in `read`, clipped; scores are the
               probabilities of their class
    """

    def proposals(self, output: Any) -> list[Tensor]: ...

    def read(
        self, output: Any, boxes: list[Tensor], labels: list[Tensor] | None = None, wanted: Tensor | None = None
    ) -> RegionOutput: ...

    def classify(self, output: Any, boxes: list[Tensor]) -> list[Tensor]: ...

    def refine(self, output: Any, boxes: list[Tensor], labels: list[Tensor] | None = None) -> list[Instances]: ...


def check_batch(images: Tensor, sizes: Tensor | None) -> None:
    """Raises UserError for what no network can look at: another shape than [B, 3, H, W], or an empty one."""
    if images.dim() != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise UserError(f"images are {list(images.shape)}; a detector wants [batch, 3, height, width], none of them 0.")
    if sizes is not None and sizes.shape != (images.shape[0], 2):
        raise UserError(f"sizes are {list(sizes.shape)} for {len(images)} images; give one (height, width) an image.")


def check_targets(targets: list[Instances], batch: int) -> None:
    """Raises UserError unless there is one list of targets an image."""
    if len(targets) != batch:
        raise UserError(f"there are targets of {len(targets)} images for a batch of {batch}; give one list an image.")


def pyramid_of(maps: dict[int, Tensor], images: Tensor, sizes: Tensor | None, shift: int) -> Pyramid:
    """Network maps {stride: ...} as a Pyramid in the full-size frame: `shift` doubles strides, frame and sizes."""
    scale = 2**shift
    height, width = images.shape[-2:]
    if sizes is None:
        sizes = extent(height, width, images.device).expand(images.shape[0], 2)
    return Pyramid({s * scale: m for s, m in maps.items()}, (height * scale, width * scale), sizes * scale)


def full_precision(like: Tensor) -> torch.autocast:
    """Losses and decoding compute in float32 also inside a caller's autocast: a context for the device of `like`."""
    return torch.autocast(like.device.type, enabled=False)


def touching(x: Tensor, modules: Iterable[nn.Module]) -> Tensor:
    """x with a gradient of 0 to the parameters of modules that a step may leave out: a parameter without any gradient
    would stop DDP."""
    if not torch.is_grad_enabled():
        return x
    return x + 0 * torch.stack([p.sum() for m in modules for p in m.parameters()]).sum()


def candidate_weights(candidates: Candidates, targets: PaddedTargets, weigh: Weigh | None) -> Weights:
    """Weight of each of M candidates: its target's own weight times what `weigh` says; None = 1 for all."""
    asked = Weights() if weigh is None else weigh(candidates)
    return replace(
        asked,
        cls=_product(_of_target(targets.cls_weight, candidates), asked.cls),
        box=_product(_of_target(targets.box_weight, candidates), asked.box),
    )


def _of_target(weight: Tensor | None, candidates: Candidates) -> Tensor | None:
    if weight is None:
        return None
    return weight[candidates.image, candidates.matched.clamp(min=0)].where(candidates.matched >= 0, 1.0)


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a * b
