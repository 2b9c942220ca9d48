"""FCOS: fully convolutional one-stage detection (Tian et al., 2019), with centre sampling and normalised distances.

Letters: B images, K classes, P points of one image over all levels, N targets, M = B * P candidates of the batch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ssod.detectors.base import Detector, DetectorOptions, candidate_weights, full_precision, pyramid_of
from ssod.errors import UserError
from ssod.nn.backbone import MakeBackbone
from ssod.nn.fpn import FPN, ConvLevels
from ssod.ops.anchors import AnchorGrid, square_cells
from ssod.ops.assign import assign_points, pad_targets
from ssod.ops.boxes import clip, nms
from ssod.ops.codecs import GIoUCodec
from ssod.ops.losses import centerness, focal_loss, weighted_sum
from ssod.structures import Candidates, DenseOutput, Instances, Pyramid, Weigh

STRIDES = (8, 16, 32, 64, 128)


class FCOSOptions(DetectorOptions):
    fpn_channels: int = Field(256, ge=8, description="width of the pyramid and of the head")
    head_convs: int = Field(4, ge=0, description="3x3 convolutions before each prediction")
    head_groups: int | None = Field(
        None, ge=1, description="groups of the group norm in the head; default: 8 channels a group, at most 32 groups"
    )
    center_radius: float = Field(1.5, gt=0, description="points within radius * stride of a box centre learn the box")
    focal_alpha: float = Field(0.25, ge=0, le=1, description="weight of positives in the focal loss")
    focal_gamma: float = Field(2.0, ge=0, description="how strongly the focal loss turns from easy candidates")
    pre_nms: int = Field(1000, ge=1, description="best candidates of each level that enter the NMS")


class FCOS(Detector):
    """Dense detector: per point a class score per class, four distances and a centerness.

    num_classes  K >= 1
    body         makes the backbone; its maps of strides 8, 16, 32 are used, two more are computed on top
    """

    Options = FCOSOptions

    def __init__(self, num_classes: int, body: MakeBackbone, options: FCOSOptions) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.options = options
        self.codec = GIoUCodec()
        self.anchors = AnchorGrid(square_cells(STRIDES))
        self.backbone = body(STRIDES[:3])
        self.fpn = FPN(self.backbone.channels, options.fpn_channels, ConvLevels(options.fpn_channels))
        self.cls_tower = _tower(options)
        self.box_tower = _tower(options)
        self.cls_logits = nn.Conv2d(options.fpn_channels, num_classes, 3, padding=1)
        self.box_codes = nn.Conv2d(options.fpn_channels, self.codec.dim, 3, padding=1)
        self.centerness = nn.Conv2d(options.fpn_channels, 1, 3, padding=1)
        self._init_head()

    def _init_head(self) -> None:
        heads = (self.cls_tower, self.box_tower, self.cls_logits, self.box_codes, self.centerness)
        for module in (m for head in heads for m in head.modules()):
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        # Every class starts at probability 0.01: else the many negatives swamp the first steps (focal loss, 3.3).
        nn.init.constant_(self.cls_logits.bias, -math.log((1 - 0.01) / 0.01))  # type: ignore[arg-type]
        # Boxes start at one stride per side: around 0 half of the distances are negative and get no gradient.
        nn.init.ones_(self.box_codes.bias)  # type: ignore[arg-type]

    def features(self, images: Tensor, sizes: Tensor | None = None, shift: int = 0) -> Pyramid:
        maps = self.fpn(self.backbone(self.backbone.normalize(images, sizes)))
        return pyramid_of(maps, images, sizes, shift)

    def head(self, pyramid: Pyramid) -> DenseOutput:
        """Strides outside 8 .. 128 (of a shifted pyramid) have no place here and are dropped."""
        maps = {s: m for s, m in pyramid.maps.items() if s in STRIDES}
        logits, codes, quality = [], [], []
        for x in maps.values():
            cls, box = self.cls_tower(x), self.box_tower(x)
            logits.append(_flat(self.cls_logits(cls)))
            codes.append(_flat(self.box_codes(box)))
            quality.append(_flat(self.centerness(box)))
        anchors, spans = self.anchors({s: m.shape[-2:] for s, m in maps.items()}, logits[0].device)
        return DenseOutput(
            logits=torch.cat(logits, dim=1),  # [B, P, K]
            codes=torch.cat(codes, dim=1),  # [B, P, 4]
            anchors=anchors,
            spans=spans,
            pyramid=pyramid,
            quality=torch.cat(quality, dim=1).squeeze(-1),  # [B, P]
        )

    def loss(self, output: DenseOutput, targets: list[Instances], weigh: Weigh | None = None) -> dict[str, Tensor]:
        """Focal, GIoU and centerness loss, each a weighted sum divided by the number of foreground points.

        The weights change the numerators only: halving all weights halves the loss.
        """
        with full_precision(output.logits):
            padded = pad_targets(targets)
            matched = assign_points(
                output.anchors, self._ranges(output), padded.boxes, padded.valid, self.options.center_radius
            )  # [B, P]
            batch, points = matched.shape
            labels = padded.labels.gather(1, matched.clamp(min=0)).where(matched >= 0, self.num_classes)
            candidates = Candidates(
                boxes=output.anchors.expand(batch, points, 4).reshape(-1, 4),
                image=torch.arange(batch, device=matched.device).repeat_interleave(points),
                labels=labels.flatten(),
                matched=matched.flatten(),
                stage="dense",
            )
            weights = candidate_weights(candidates, padded, weigh)

            fg = (candidates.matched >= 0).nonzero().squeeze(1)  # [F]
            boxes = padded.boxes[candidates.image[fg], candidates.matched[fg]]  # [F, 4]
            anchors = candidates.boxes[fg]
            codes = output.codes.flatten(0, 1)[fg].float()
            box_weight = None if weights.box is None else weights.box[fg]
            assert output.quality is not None
            quality = F.binary_cross_entropy_with_logits(
                output.quality.flatten()[fg].float(), centerness(self.codec.encode(boxes, anchors)), reduction="none"
            )
            count = max(1, len(fg))
            focal = focal_loss(
                output.logits.flatten(0, 1).float(),
                candidates.labels,
                weights.cls,
                self.options.focal_alpha,
                self.options.focal_gamma,
            )
            return {
                "cls": focal / count,
                "box": self.codec.loss(codes, anchors, boxes, box_weight) / count,
                "centerness": weighted_sum(quality, box_weight) / count,
            }

    def decode(self, output: DenseOutput, conf: float = 0.05, iou: float = 0.6, max_det: int = 100) -> list[Instances]:
        """Score = sqrt(class probability * centerness); `quality` of a detection is its centerness."""
        with full_precision(output.logits):
            assert output.quality is not None
            centers = output.quality.float().sigmoid()  # [B, P]
            scores = (output.logits.float().sigmoid() * centers.unsqueeze(-1)).sqrt()  # [B, P, K]
            best, index = self._best_per_level(scores, output.spans)  # [B, T] each, index into P * K
            point, label = index // self.num_classes, index % self.num_classes
            codes = output.codes.float().gather(1, point.unsqueeze(-1).expand(-1, -1, self.codec.dim))
            boxes, _ = self.codec.decode(codes, output.anchors[point])  # [B, T, 4]
            boxes = clip(boxes, output.pyramid.sizes[:, None])
            quality = centers.gather(1, point)

            found = []
            for b in range(len(scores)):
                keep = (best[b] > conf).nonzero().squeeze(1)
                keep = keep[nms(boxes[b, keep], best[b, keep], label[b, keep], iou)[:max_det]]
                found.append(Instances(boxes[b, keep], label[b, keep], best[b, keep], quality[b, keep]))
            return found

    def dense(self, output: DenseOutput) -> DenseOutput:
        """What `HasDense` asks for: the output is dense already."""
        return output

    def _best_per_level(self, scores: Tensor, spans: dict[int, slice]) -> tuple[Tensor, Tensor]:
        values, indices = [], []
        for span in spans.values():
            level = scores[:, span].flatten(1)  # [B, P_level * K]
            value, index = level.topk(min(self.options.pre_nms, level.shape[1]), dim=1)
            values.append(value)
            indices.append(index + span.start * self.num_classes)
        return torch.cat(values, dim=1), torch.cat(indices, dim=1)

    def _ranges(self, output: DenseOutput) -> Tensor:
        """Farthest distances each point takes, [P, 2]: 4 to 8 strides, open below at stride 8 and above at 128."""
        ranges = output.anchors.new_empty(len(output.anchors), 2)
        for stride, span in output.spans.items():
            ranges[span, 0] = 0 if stride == STRIDES[0] else 4 * stride
            ranges[span, 1] = math.inf if stride == STRIDES[-1] else 8 * stride
        return ranges


def _tower(options: FCOSOptions) -> nn.Sequential:
    channels = options.fpn_channels
    groups = options.head_groups or max(1, min(32, channels // 8))
    if channels % groups or channels == groups:  # one channel a group leaves nothing to normalise on a 1 x 1 map
        raise UserError(
            f"detector.head_groups={groups} does not divide detector.fpn_channels={channels} into groups of two or "
            f"more; choose e.g. head_groups={math.gcd(channels // 2, 32)}."
        )
    layers: list[nn.Module] = []
    for _ in range(options.head_convs):
        layers += [
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(groups, channels),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


def _flat(x: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, h * w, C]."""
    return x.flatten(2).transpose(1, 2)
