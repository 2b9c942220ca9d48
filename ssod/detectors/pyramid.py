"""What the convolutional detectors share: how boxes are coded and ranked, and levels and anchors by stride."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from ssod.detectors.base import Detector, DetectorOptions, check_batch, pyramid_of, touching
from ssod.errors import UserError
from ssod.nn.fpn import FPN
from ssod.ops.anchors import AnchorGrid
from ssod.ops.bucket import BucketCodec
from ssod.ops.codecs import Codec, DeltaGIoUCodec, GaussianCodec, L1Codec
from ssod.structures import Pyramid


class BoxOptions(DetectorOptions):
    codec: Literal["l1", "giou", "gaussian", "bucket"] = Field("l1", description="how boxes are coded and learned")
    buckets: int = Field(30, ge=2, le=200, description="codec bucket: intervals a side, K")
    bucket_scale: float = Field(3.0, ge=1, description="codec bucket: segments reach to the candidate scaled by this")
    box_loss_weight: float = Field(1.0, ge=0, description="factor of the box loss; 10 suits giou on an RoI head")
    rank_by_quality: bool = Field(
        False, description="score = sqrt(class probability * the codec's quality); codecs gaussian and bucket"
    )
    rounded_strides: bool = Field(
        False, description="anchor places as torchvision computes them, from frame // cells instead of the stride"
    )
    half_scale: bool = Field(
        False, description="one pyramid level below, so that a half-size image has every stride of the full one"
    )


class PyramidDetector(Detector):
    """A backbone, an FPN, and anchors at every cell of its levels.

    strides  of the levels that candidates come from, in the full-size frame, ascending
    """

    options: BoxOptions
    strides: tuple[int, ...]
    fpn: FPN
    anchors: AnchorGrid

    def __init__(self, num_classes: int, options: BoxOptions) -> None:
        super().__init__()
        if options.rank_by_quality and options.codec not in ("gaussian", "bucket"):
            raise UserError(
                f"detector.rank_by_quality=true needs boxes with a quality, and detector.codec={options.codec} "
                "gives none; choose codec bucket or gaussian."
            )
        self.num_classes = num_classes
        self.options = options

    def features(self, images: Tensor, sizes: Tensor | None = None, shift: int = 0) -> Pyramid:
        """See `Detector.features`. Levels that would lie outside `strides` are not computed.

        A half-size image (shift=1) has a level at the lowest stride only with the option `half_scale`.
        """
        check_batch(images, sizes)
        maps = self.backbone(self.backbone.normalize(images, sizes))
        levels = self.fpn(maps, [s // 2**shift for s in self.strides])
        if self.options.half_scale and shift == 0:
            first = self.strides[0]
            levels[first] = touching(levels[first], self.fpn.of_level(first // 2))
        return pyramid_of(levels, images, sizes, shift)

    def _places(self, pyramid: Pyramid) -> tuple[Tensor, dict[int, slice]]:
        """Anchors [P, 4] of the levels of a pyramid, and the slice of each stride."""
        frame = pyramid.frame if self.options.rounded_strides else None
        device = next(iter(pyramid.maps.values())).device
        return self.anchors({s: m.shape[-2:] for s, m in pyramid.maps.items()}, device, frame)


def anchor_codec(options: BoxOptions, weights: tuple[float, float, float, float], beta: float) -> Codec:
    """The codec of boxes that refer to anchors or proposals; weights and beta are those of `L1Codec`."""
    if options.codec == "bucket":
        return BucketCodec(options.buckets, options.bucket_scale)
    if options.codec == "gaussian":
        return GaussianCodec()
    return DeltaGIoUCodec(weights) if options.codec == "giou" else L1Codec(weights, beta)


def ranked(scores: Tensor, quality: Tensor | None, options: BoxOptions) -> Tensor:
    """What orders boxes in the NMS and is reported: class probability, or its geometric mean with the quality."""
    if not options.rank_by_quality:
        return scores
    assert quality is not None
    return (scores * quality).sqrt()
