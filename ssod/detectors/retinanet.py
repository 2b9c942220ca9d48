"""RetinaNet: dense detection with the focal loss (Lin et al., 2017).

Letters: B images, K classes, A = 9 anchors per cell, P anchors of one image over all levels, M = B * P candidates of
the batch, F of them foreground, D numbers per box code.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from ssod import dist
from ssod.detectors.base import candidate_weights, check_targets, full_precision
from ssod.detectors.pyramid import BoxOptions, PyramidDetector, anchor_codec, ranked
from ssod.nn.backbone import MakeBackbone
from ssod.nn.dense_head import per_anchor, start_convs, start_predictions, tower
from ssod.nn.fpn import FPN, ConvLevels
from ssod.ops.anchors import AnchorGrid, ratio_cells
from ssod.ops.assign import assign_iou, pad_targets
from ssod.ops.boxes import clip
from ssod.ops.dense import best_per_level, codes_of, dense_candidates, suppress
from ssod.ops.fixed import Detections, fixed_detections
from ssod.ops.losses import focal_loss
from ssod.structures import DenseOutput, Instances, Pyramid, Weigh

STRIDES = (8, 16, 32, 64, 128)
RATIOS = (0.5, 1.0, 2.0)
OCTAVES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
BACKGROUND_IOU, FOREGROUND_IOU = 0.4, 0.5  # section 4.1; between them an anchor is ignored


class RetinaNetOptions(BoxOptions):
    anchor_scale: float = Field(4.0, gt=0, description="side of the smallest square anchor of a level, in strides")
    fpn_channels: int = Field(256, ge=8, le=1024, description="width of the pyramid and of the head")
    head_convs: int = Field(4, ge=0, le=16, description="3x3 convolutions before each prediction")
    head_groups: int | None = Field(None, ge=1, description="groups of a group norm in the head; default: no norm")
    focal_alpha: float = Field(0.25, ge=0, le=1, description="weight of positives in the focal loss")
    focal_gamma: float = Field(2.0, ge=0, description="how strongly the focal loss turns from easy candidates")
    smooth_l1_beta: float = Field(0.1, ge=0, description="codec l1: where the box loss turns linear; 0 = plain L1")
    mean_of_images: bool = Field(
        False, description="divide each image's losses by its own foreground and average, not the batch's by all of it"
    )
    pre_nms: int = Field(1000, ge=1, description="best candidates of each level that enter the NMS")


class RetinaNet(PyramidDetector):
    """Dense detector: nine anchors per cell, of each a score per class and a box code.

    num_classes  K >= 1
    body         makes the backbone; its maps of strides 8, 16, 32 are used, two more are computed on top
    """

    Options = RetinaNetOptions
    options: RetinaNetOptions
    classifier = ("cls_tower", "cls_logits")
    strides = STRIDES

    def __init__(self, num_classes: int, body: MakeBackbone, options: RetinaNetOptions) -> None:
        super().__init__(num_classes, options)
        self.codec = anchor_codec(options, (1, 1, 1, 1), options.smooth_l1_beta)
        # sizes in whole pixels, as torchvision has them: its trained heads expect 40 and 50 above 32, not 40.3 and 50.8
        sizes = {s: [float(int(s * options.anchor_scale * octave)) for octave in OCTAVES] for s in STRIDES}
        self.anchors = AnchorGrid(ratio_cells(sizes, RATIOS))

        width, per_cell = options.fpn_channels, self.anchors.per_cell
        self.backbone = body((4, 8, 16, 32) if options.half_scale else (8, 16, 32))
        self.fpn = FPN(self.backbone.channels, width, ConvLevels(width))
        self.cls_tower = tower(width, options.head_convs, options.head_groups)
        self.box_tower = tower(width, options.head_convs, options.head_groups)
        self.cls_logits = nn.Conv2d(width, per_cell * num_classes, 3, padding=1)
        self.box_codes = nn.Conv2d(width, per_cell * self.codec.dim, 3, padding=1)
        start_convs(self.cls_tower, self.box_tower, self.cls_logits, self.box_codes)
        start_predictions(self.cls_logits, self.box_codes, self.codec.start())

    def head(self, pyramid: Pyramid) -> DenseOutput:
        """Every anchor of the pyramid's levels."""
        logits, codes = [], []
        for x in pyramid.maps.values():
            logits.append(per_anchor(self.cls_logits(self.cls_tower(x)), self.num_classes))
            codes.append(per_anchor(self.box_codes(self.box_tower(x)), self.codec.dim))
        anchors, spans = self._places(pyramid)
        return DenseOutput(torch.cat(logits, dim=1), torch.cat(codes, dim=1), anchors, spans, pyramid)

    def loss(self, output: DenseOutput, targets: list[Instances], weigh: Weigh | None = None) -> dict[str, Tensor]:
        """Focal and box loss, weighted sums divided by the number of foreground anchors of the batch.

        With the option `mean_of_images`, each image is divided by its own number and the images are averaged.
        The weights change the numerators only: halving all weights halves the loss.
        """
        check_targets(targets, len(output.logits))
        with full_precision(output.logits):
            padded = pad_targets(targets)
            # Image by image: [B, P, N] overlaps of all anchors would be gigabytes for large images.
            matched = torch.stack(
                [assign_iou(output.anchors, t.boxes.float(), BACKGROUND_IOU, FOREGROUND_IOU, True) for t in targets]
            )  # [B, P]
            divisor = self._divisor(matched)  # [B]
            candidates = dense_candidates(matched, output.anchors, padded, self.num_classes, divisor)
            weights = candidate_weights(candidates, padded, weigh)
            share = (1 / divisor)[candidates.image]  # [M]
            cls_weight = share if weights.cls is None else share * weights.cls
            box_weight = share if weights.box is None else share * weights.box

            fg = (candidates.matched >= 0).nonzero().squeeze(1)  # [F]
            boxes = padded.boxes[candidates.image[fg], candidates.matched[fg]]  # [F, 4]
            codes = output.codes.flatten(0, 1)[fg].float()
            box = self.codec.loss(codes, candidates.boxes[fg], boxes, box_weight[fg], weights.learn_quality)
            return {
                "cls": focal_loss(
                    output.logits.flatten(0, 1),
                    candidates.labels,
                    cls_weight,
                    self.options.focal_alpha,
                    self.options.focal_gamma,
                    fg,
                ),
                "box": box * self.options.box_loss_weight,
            }

    def decode(self, output: DenseOutput, conf: float = 0.05, iou: float = 0.6, max_det: int = 100) -> list[Instances]:
        """Score = class probability; with `rank_by_quality` its geometric mean with the codec's quality."""
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

    def _best(self, output: DenseOutput) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Boxes [B, T, 4], scores, labels and quality [B, T] of the best candidates of each level."""
        scores = output.logits.float().sigmoid()  # [B, P, K]
        best, anchor, label = best_per_level(scores, output.spans, self.options.pre_nms)  # [B, T] each
        boxes, quality = self.codec.decode(codes_of(output.codes, anchor), output.anchors[anchor])  # [B, T, 4]
        boxes = clip(boxes, output.pyramid.sizes[:, None])
        return boxes, ranked(best, quality, self.options), label, quality

    def _divisor(self, matched: Tensor) -> Tensor:
        """What the losses of each image's candidates are divided by, [B]."""
        foreground = (matched >= 0).sum(dim=1)  # [B]
        if self.options.mean_of_images:
            return foreground.clamp(min=1) * len(foreground)
        return dist.shared(foreground.sum()).expand(len(foreground))
