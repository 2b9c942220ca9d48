"""FCOS: fully convolutional one-stage detection (Tian et al., 2019), with centre sampling and normalised distances.

Letters: B images, K classes, P points of one image over all levels, N targets, M = B * P candidates of the batch.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ssod import dist
from ssod.detectors.base import candidate_weights, check_targets, full_precision
from ssod.detectors.pyramid import BoxOptions, PyramidDetector, anchor_codec, ranked
from ssod.nn.backbone import MakeBackbone
from ssod.nn.dense_head import per_anchor, start_convs, start_predictions, tower
from ssod.nn.fpn import FPN, ConvLevels
from ssod.ops.anchors import AnchorGrid, square_cells
from ssod.ops.assign import assign_points, pad_targets
from ssod.ops.boxes import centers, clip, distances
from ssod.ops.codecs import GIoUCodec
from ssod.ops.dense import best_per_level, codes_of, dense_candidates, suppress
from ssod.ops.fixed import Detections, fixed_detections
from ssod.ops.losses import centerness, focal_loss, weighted_sum
from ssod.structures import DenseOutput, Instances, Pyramid, Weigh

STRIDES = (8, 16, 32, 64, 128)


class FCOSOptions(BoxOptions):
    codec: Literal["l1", "giou", "gaussian", "bucket"] = Field("giou", description="how boxes are coded and learned")
    anchor_scale: float = Field(
        8.0, gt=0, description="codecs other than giou: side, in strides, of the square that codes refer to"
    )
    fpn_channels: int = Field(256, ge=8, le=1024, description="width of the pyramid and of the head")
    head_convs: int = Field(4, ge=0, le=16, description="3x3 convolutions before each prediction")
    head_groups: int | None = Field(
        None, ge=1, description="groups of the group norm in the head; default: 8 channels a group, at most 32 groups"
    )
    center_radius: float = Field(1.5, gt=0, description="points within radius * stride of a box centre learn the box")
    center_weighted_box: bool = Field(
        False, description="box loss weighted by the centerness of each point and divided by the sum of these weights"
    )
    focal_alpha: float = Field(0.25, ge=0, le=1, description="weight of positives in the focal loss")
    focal_gamma: float = Field(2.0, ge=0, description="how strongly the focal loss turns from easy candidates")
    pre_nms: int = Field(1000, ge=1, description="best candidates of each level that enter the NMS")


class FCOS(PyramidDetector):
    """Dense detector: per point a class score per class, a box code (four distances) and a centerness.

    num_classes  K >= 1
    body         makes the backbone; its maps of strides 8, 16, 32 are used, two more are computed on top
    """

    Options = FCOSOptions
    options: FCOSOptions
    classifier = ("cls_tower", "cls_logits")
    strides = STRIDES

    def __init__(self, num_classes: int, body: MakeBackbone, options: FCOSOptions) -> None:
        super().__init__(num_classes, options)
        by_distances = options.codec == "giou"
        self.codec = GIoUCodec() if by_distances else anchor_codec(options, (1, 1, 1, 1), 1 / 9)
        # Distances are in strides. A segment or a shift needs a square like the boxes of its level: these reach 4 to 8
        # strides from a point to their farthest side, so 8 strides wide is in the middle of what is learned.
        side = 1.0 if by_distances else options.anchor_scale
        self.anchors = AnchorGrid(square_cells({s: s * side for s in STRIDES}))

        width = options.fpn_channels
        groups = options.head_groups or max(1, min(32, width // 8))
        self.backbone = body((4, 8, 16, 32) if options.half_scale else (8, 16, 32))
        self.fpn = FPN(self.backbone.channels, width, ConvLevels(width))
        self.cls_tower = tower(width, options.head_convs, groups)
        self.box_tower = tower(width, options.head_convs, groups)
        self.cls_logits = nn.Conv2d(width, num_classes, 3, padding=1)
        self.box_codes = nn.Conv2d(width, self.codec.dim, 3, padding=1)
        self.centerness = nn.Conv2d(width, 1, 3, padding=1)
        start_convs(self.cls_tower, self.box_tower, self.cls_logits, self.box_codes, self.centerness)
        start_predictions(self.cls_logits, self.box_codes, self.codec.start())

    def head(self, pyramid: Pyramid) -> DenseOutput:
        """Every point of the pyramid's levels."""
        logits, codes, quality = [], [], []
        for x in pyramid.maps.values():
            cls, box = self.cls_tower(x), self.box_tower(x)
            logits.append(per_anchor(self.cls_logits(cls), self.num_classes))
            codes.append(per_anchor(self.box_codes(box), self.codec.dim))
            quality.append(per_anchor(self.centerness(box), 1))
        anchors, spans = self._places(pyramid)
        return DenseOutput(
            logits=torch.cat(logits, dim=1),  # [B, P, K]
            codes=torch.cat(codes, dim=1),  # [B, P, D]
            anchors=anchors,
            spans=spans,
            pyramid=pyramid,
            quality=torch.cat(quality, dim=1).squeeze(-1),  # [B, P]
        )

    def loss(self, output: DenseOutput, targets: list[Instances], weigh: Weigh | None = None) -> dict[str, Tensor]:
        """Focal, box and centerness loss, each a weighted sum divided by the number of foreground points.

        With the option `center_weighted_box`, the box loss of a point counts as much as the point is in the middle of
        its target, divided by the sum of these centernesses (Tian et al., 2022, and Co-mining's code).
        The weights change the numerators only: halving all weights halves the loss.
        """
        check_targets(targets, len(output.logits))
        with full_precision(output.logits):
            padded = pad_targets(targets)
            points = centers(output.anchors)  # [P, 2]
            reach, ranges = self._responsible(output)
            matched = assign_points(points, reach, ranges, padded.boxes, padded.valid)  # [B, P]
            count = dist.shared((matched >= 0).sum())
            candidates = dense_candidates(matched, output.anchors, padded, self.num_classes, count.expand(len(matched)))
            weights = candidate_weights(candidates, padded, weigh)

            fg = (candidates.matched >= 0).nonzero().squeeze(1)  # [F]
            boxes = padded.boxes[candidates.image[fg], candidates.matched[fg]]  # [F, 4]
            anchors = candidates.boxes[fg]
            codes = output.codes.flatten(0, 1)[fg].float()
            box_weight = None if weights.box is None else weights.box[fg]
            assert output.quality is not None
            middle = centerness(distances(boxes, centers(anchors)))  # [F]
            centered = F.binary_cross_entropy_with_logits(
                output.quality.flatten()[fg].float(), middle, reduction="none"
            )
            focal = focal_loss(
                output.logits.flatten(0, 1),
                candidates.labels,
                weights.cls,
                self.options.focal_alpha,
                self.options.focal_gamma,
                fg,
            )
            share, divisor = box_weight, count
            if self.options.center_weighted_box:
                share = middle if box_weight is None else middle * box_weight
                divisor = dist.shared(middle.sum(), torch.finfo(middle.dtype).eps)
            box = self.codec.loss(codes, anchors, boxes, share, weights.learn_quality)
            return {
                "cls": focal / count,
                "box": box * self.options.box_loss_weight / divisor,
                "centerness": weighted_sum(centered, box_weight) / count,
            }

    def decode(self, output: DenseOutput, conf: float = 0.05, iou: float = 0.6, max_det: int = 100) -> list[Instances]:
        """Score = sqrt(class probability * centerness); with `rank_by_quality` the codec's quality in its place.

        `quality` of a detection is the codec's, or the centerness where the codec has none.
        """
        with full_precision(output.logits):
            boxes, best, label, quality = self._best(output)
            return suppress(boxes, best, label, quality, conf, iou, max_det)

    def fixed(self, output: DenseOutput, conf: float = 0.05, iou: float = 0.6, max_det: int = 100) -> Detections:
        """See `Detector.fixed`."""
        with full_precision(output.logits):
            boxes, best, label, _ = self._best(output)
            return fixed_detections(boxes, best, label, self.num_classes, conf, iou, max_det)

    def dense(self, output: DenseOutput) -> DenseOutput:
        """What `HasDense` asks for: the output is dense already."""
        return output

    def _best(self, output: DenseOutput) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Boxes [B, T, 4], scores, labels and quality [B, T] of the best candidates of each level."""
        assert output.quality is not None
        probability, centered = output.logits.float().sigmoid(), output.quality.float().sigmoid()
        # Centerness also chooses whose codes are decoded: the codec's quality is known only afterwards.
        scores = (probability * centered.unsqueeze(-1)).sqrt()  # [B, P, K]
        best, point, label = best_per_level(scores, output.spans, self.options.pre_nms)  # [B, T] each
        boxes, quality = self.codec.decode(codes_of(output.codes, point), output.anchors[point])  # [B, T, 4]
        boxes = clip(boxes, output.pyramid.sizes[:, None])
        near = centered.gather(1, point)
        if self.options.rank_by_quality:
            chosen = probability.flatten(1).gather(1, point * self.num_classes + label)
            best = ranked(chosen, quality, self.options)
        return boxes, best, label, near if quality is None else quality

    def _responsible(self, output: DenseOutput) -> tuple[Tensor, Tensor]:
        """How far from a box's centre a point may lie, [P], and between which distances its farthest side, [P, 2].

        The latter is 4 to 8 strides, open below at stride 8 and above at 128.
        """
        reach = output.anchors.new_empty(len(output.anchors))
        ranges = output.anchors.new_empty(len(output.anchors), 2)
        for stride, span in output.spans.items():
            reach[span] = stride * self.options.center_radius
            ranges[span, 0] = 0 if stride == STRIDES[0] else 4 * stride
            ranges[span, 1] = math.inf if stride == STRIDES[-1] else 8 * stride
        return reach, ranges
