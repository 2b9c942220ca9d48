"""Faster R-CNN (Ren et al., 2015) on a feature pyramid (Lin et al., 2017).

Letters: B images, K classes, A anchors per cell, P anchors of one image over all levels, R regions of one image,
M regions or sampled anchors of the whole batch, D numbers per box code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ssod.detectors.base import Detector, DetectorOptions, candidate_weights, full_precision, pyramid_of
from ssod.nn.backbone import MakeBackbone
from ssod.nn.fpn import FPN, PoolLevel
from ssod.ops.anchors import AnchorGrid, ratio_cells
from ssod.ops.assign import PaddedTargets, assign_iou, pad_targets, sample_balanced
from ssod.ops.boxes import clip, nms, not_smaller
from ssod.ops.codecs import L1Codec
from ssod.ops.losses import weighted_sum
from ssod.ops.roi import roi_features
from ssod.structures import Candidates, DenseOutput, Instances, Pyramid, Weigh

STRIDES = (4, 8, 16, 32, 64)
ROI_STRIDES = STRIDES[:-1]  # the pooled top level serves the RPN only
RATIOS = (0.5, 1.0, 2.0)
ROI_SIZE = 7


class FasterRCNNOptions(DetectorOptions):
    fpn_channels: int = Field(256, ge=8, description="width of the pyramid and of the RPN")
    box_head_width: int = Field(1024, ge=8, description="width of the two fully connected layers of the RoI head")
    anchor_scale: float = Field(8.0, gt=0, description="side of the square anchor in strides: 8 gives 32 .. 512 pixels")
    rpn_samples: int = Field(256, ge=1, description="anchors per image in the RPN's loss")
    rpn_positive: float = Field(0.5, gt=0, le=1, description="largest share of positives among them")
    rpn_nms: float = Field(0.7, gt=0, le=1, description="IoU above which a proposal suppresses another")
    train_pre_nms: int = Field(2000, ge=1, description="best anchors per level that enter the RPN's NMS in the loss")
    train_proposals: int = Field(2000, ge=1, description="proposals per image in the loss")
    test_pre_nms: int = Field(1000, ge=1, description="best anchors per level that enter the RPN's NMS elsewhere")
    test_proposals: int = Field(1000, ge=1, description="proposals per image elsewhere")
    roi_samples: int = Field(512, ge=1, description="proposals per image in the RoI head's loss")
    roi_positive: float = Field(0.25, gt=0, le=1, description="largest share of foreground among them")
    roi_foreground: float = Field(0.5, ge=0, le=1, description="IoU from which a proposal is foreground")


class FasterRCNN(Detector):
    """Two stages: an RPN proposes regions (`head`), a RoI head classifies and refines them (`loss`, `decode`).

    The output of `head` is the RPN's, with K = 1: everything later needs boxes, which exist only after decoding it.

    num_classes  K >= 1
    body         makes the backbone; its maps of strides 4, 8, 16, 32 are used, stride 64 is pooled
    """

    Options = FasterRCNNOptions

    def __init__(self, num_classes: int, body: MakeBackbone, options: FasterRCNNOptions) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.options = options
        self.rpn_codec = L1Codec()
        self.roi_codec = L1Codec(weights=(10, 10, 5, 5))
        self.anchors = AnchorGrid(ratio_cells({s: s * options.anchor_scale for s in STRIDES}, RATIOS))
        self.backbone = body(ROI_STRIDES)
        self.fpn = FPN(self.backbone.channels, options.fpn_channels, PoolLevel())

        width, anchors = options.fpn_channels, self.anchors.per_cell
        self.rpn_conv = nn.Conv2d(width, width, 3, padding=1)
        self.rpn_logits = nn.Conv2d(width, anchors, 1)
        self.rpn_codes = nn.Conv2d(width, anchors * self.rpn_codec.dim, 1)

        self.fc1 = nn.Linear(width * ROI_SIZE**2, options.box_head_width)
        self.fc2 = nn.Linear(options.box_head_width, options.box_head_width)
        self.roi_logits = nn.Linear(options.box_head_width, num_classes + 1)
        self.roi_codes = nn.Linear(options.box_head_width, num_classes * self.roi_codec.dim)
        self._init_heads()

    def _init_heads(self) -> None:
        for module in (self.rpn_conv, self.rpn_logits, self.rpn_codes, self.roi_logits):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.roi_codes.weight, std=0.001)  # first boxes = the proposals themselves
        nn.init.zeros_(self.roi_codes.bias)

    # ---- the four verbs

    def features(self, images: Tensor, sizes: Tensor | None = None, shift: int = 0) -> Pyramid:
        maps = self.fpn(self.backbone(self.backbone.normalize(images, sizes)))
        return pyramid_of(maps, images, sizes, shift)

    def head(self, pyramid: Pyramid) -> DenseOutput:
        """The RPN: objectness logits [B, P, 1] and codes [B, P, D]. Strides outside 4 .. 64 are dropped."""
        maps = {s: m for s, m in pyramid.maps.items() if s in STRIDES}
        logits, codes = [], []
        for x in maps.values():
            hidden = self.rpn_conv(x).relu_()
            logits.append(_per_anchor(self.rpn_logits(hidden), 1))
            codes.append(_per_anchor(self.rpn_codes(hidden), self.rpn_codec.dim))
        anchors, spans = self.anchors({s: m.shape[-2:] for s, m in maps.items()}, logits[0].device)
        return DenseOutput(torch.cat(logits, dim=1), torch.cat(codes, dim=1), anchors, spans, pyramid)

    def loss(self, output: DenseOutput, targets: list[Instances], weigh: Weigh | None = None) -> dict[str, Tensor]:
        """Objectness and box loss of the RPN, class and box loss of the RoI head.

        Each is a weighted sum divided by the number of sampled candidates; weights change the numerators only.
        """
        with full_precision(output.logits):
            padded = pad_targets(targets)
            rpn = self._rpn_loss(output, targets, padded, weigh)
            proposals = self._propose(output, self.options.train_pre_nms, self.options.train_proposals)
            return rpn | self._roi_loss(output, proposals, targets, padded, weigh)

    def decode(self, output: DenseOutput, conf: float = 0.05, iou: float = 0.6, max_det: int = 100) -> list[Instances]:
        """Every region may become one detection per class; score = class probability."""
        with full_precision(output.logits):
            regions = self.proposals(output)
            logits, codes = self._region_head(output.pyramid, regions)
            anchors = torch.cat(regions).unsqueeze(1)  # [M, 1, 4]
            all_boxes, all_quality = self.roi_codec.decode(codes, anchors)  # [M, K, 4]
            scores = logits.softmax(dim=1)[:, :-1]  # [M, K]

            found, start = [], 0
            for b, count in enumerate(len(r) for r in regions):
                rows = slice(start, start + count)
                start += count
                boxes = clip(all_boxes[rows], output.pyramid.sizes[b])
                region, label = ((scores[rows] > conf) & not_smaller(boxes, 0.01)).nonzero(as_tuple=True)
                score = scores[rows][region, label]
                keep = nms(boxes[region, label], score, label, iou)[:max_det]
                region, label = region[keep], label[keep]
                quality = None if all_quality is None else all_quality[rows][region, label]
                found.append(Instances(boxes[region, label], label, score[keep], quality))
            return found

    # ---- HasRegions

    def proposals(self, output: DenseOutput) -> list[Tensor]:
        """The regions that `decode` looks at: B tensors [R, 4] xyxy pixels, by descending objectness, no gradient."""
        return self._propose(output, self.options.test_pre_nms, self.options.test_proposals)

    def classify(self, output: DenseOutput, boxes: list[Tensor]) -> list[Tensor]:
        """Class probabilities of given boxes: B tensors [R, 4] -> B tensors [R, K + 1], background last."""
        with full_precision(output.logits):
            logits, _ = self._region_head(output.pyramid, boxes)
            return list(logits.softmax(dim=1).split([len(b) for b in boxes]))

    def refine(self, output: DenseOutput, boxes: list[Tensor]) -> list[Instances]:
        """Given boxes as the RoI head corrects them for their best class: as many, in the same order, clipped."""
        with full_precision(output.logits):
            logits, codes = self._region_head(output.pyramid, boxes)
            scores, labels = logits.softmax(dim=1)[:, :-1].max(dim=1)  # [M]
            best = codes[torch.arange(len(codes), device=codes.device), labels]  # [M, D]
            refined, quality = self.roi_codec.decode(best, torch.cat(boxes))
            counts = [len(b) for b in boxes]
            refined = clip(refined, output.pyramid.sizes[_image_of(boxes)])
            every = Instances(refined, labels, scores, quality)
            starts = [sum(counts[:i]) for i in range(len(counts))]
            return [every[s : s + n] for s, n in zip(starts, counts, strict=True)]

    # ---- inside

    @torch.no_grad()
    def _propose(self, output: DenseOutput, pre_nms: int, post_nms: int) -> list[Tensor]:
        scores = output.logits.squeeze(-1).float()  # [B, P]
        best, index, level = [], [], []
        for i, span in enumerate(output.spans.values()):
            value, where = scores[:, span].topk(min(pre_nms, span.stop - span.start), dim=1)
            best.append(value)
            index.append(where + span.start)
            level.append(torch.full_like(where[0], i))
        score, anchor, group = torch.cat(best, dim=1), torch.cat(index, dim=1), torch.cat(level)  # [B, T], [B, T], [T]
        codes = output.codes.float().gather(1, anchor.unsqueeze(-1).expand(-1, -1, self.rpn_codec.dim))
        boxes, _ = self.rpn_codec.decode(codes, output.anchors[anchor])
        boxes = clip(boxes, output.pyramid.sizes[:, None])

        proposals = []
        for b in range(len(boxes)):
            solid = not_smaller(boxes[b], 1e-3).nonzero().squeeze(1)
            keep = nms(boxes[b, solid], score[b, solid], group[solid], self.options.rpn_nms)[:post_nms]
            proposals.append(boxes[b, solid[keep]])
        return proposals

    def _rpn_loss(
        self, output: DenseOutput, targets: list[Instances], padded: PaddedTargets, weigh: Weigh | None
    ) -> dict[str, Tensor]:
        # Image by image: [B, P, N] overlaps of all anchors would be gigabytes for large images.
        matched = torch.stack([assign_iou(output.anchors, t.boxes.float(), 0.3, 0.7, True) for t in targets])  # [B, P]
        take, use = sample_balanced(matched, self.options.rpn_samples, self.options.rpn_positive)
        image, column = use.nonzero(as_tuple=True)  # [M]
        anchor = take[image, column]
        candidates = self._candidates(output.anchors[anchor], image, matched[image, anchor], padded, "rpn")
        weights = candidate_weights(candidates, padded, weigh)

        is_object = (candidates.matched >= 0).float()
        logits = output.logits[image, anchor, 0].float()
        objectness = F.binary_cross_entropy_with_logits(logits, is_object, reduction="none")
        fg = is_object.nonzero().squeeze(1)
        codes = output.codes[image[fg], anchor[fg]].float()
        boxes = padded.boxes[image[fg], candidates.matched[fg]]
        box_weight = None if weights.box is None else weights.box[fg]
        count = max(1, len(image))
        return {
            "rpn_cls": weighted_sum(objectness, weights.cls) / count,
            "rpn_box": self.rpn_codec.loss(codes, candidates.boxes[fg], boxes, box_weight) / count,
        }

    def _roi_loss(
        self,
        output: DenseOutput,
        proposals: list[Tensor],
        targets: list[Instances],
        padded: PaddedTargets,
        weigh: Weigh | None,
    ) -> dict[str, Tensor]:
        threshold = self.options.roi_foreground
        sampled, assigned = [], []
        for regions, target in zip(proposals, targets, strict=True):
            regions = torch.cat([regions, target.boxes.float()])  # the targets themselves: foreground from step one
            matched = assign_iou(regions, target.boxes.float(), threshold, threshold, False)
            take, use = sample_balanced(matched[None], self.options.roi_samples, self.options.roi_positive)
            chosen = take[0][use[0]]
            sampled.append(regions[chosen])
            assigned.append(matched[chosen])

        candidates = self._candidates(torch.cat(sampled), _image_of(sampled), torch.cat(assigned), padded, "roi")
        weights = candidate_weights(candidates, padded, weigh)
        logits, codes = self._region_head(output.pyramid, sampled)
        cls = F.cross_entropy(logits, candidates.labels, reduction="none")

        fg = (candidates.matched >= 0).nonzero().squeeze(1)
        boxes = padded.boxes[candidates.image[fg], candidates.matched[fg]]
        box_weight = None if weights.box is None else weights.box[fg]
        own_codes = codes[fg, candidates.labels[fg]]  # [F, D], of the class each is assigned
        count = max(1, len(logits))
        return {
            "cls": weighted_sum(cls, weights.cls) / count,
            "box": self.roi_codec.loss(own_codes, candidates.boxes[fg], boxes, box_weight) / count,
        }

    def _candidates(
        self, boxes: Tensor, image: Tensor, matched: Tensor, padded: PaddedTargets, stage: str
    ) -> Candidates:
        labels = padded.labels[image, matched.clamp(min=0)].where(matched >= 0, self.num_classes)
        return Candidates(boxes, image, labels, matched, stage)

    def _region_head(self, pyramid: Pyramid, boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Boxes of each image -> logits [M, K + 1] and codes [M, K, D] in float32."""
        maps = {s: m for s, m in pyramid.maps.items() if s in ROI_STRIDES}
        like = next(iter(maps.values()))
        pooled = roi_features(maps, torch.cat(boxes), _image_of(boxes), ROI_SIZE)  # [M, C, 7, 7]
        # The wide layers compute in the precision of the features, whatever the caller's autocast is by now.
        with torch.autocast(like.device.type, like.dtype, enabled=like.dtype != torch.float32):
            hidden = self.fc2(self.fc1(pooled.flatten(1)).relu()).relu()
            logits, codes = self.roi_logits(hidden), self.roi_codes(hidden)
        return logits.float(), codes.float().unflatten(1, (self.num_classes, self.roi_codec.dim))


def _per_anchor(x: Tensor, dim: int) -> Tensor:
    """[B, A * dim, h, w] -> [B, h * w * A, dim]."""
    return x.permute(0, 2, 3, 1).reshape(len(x), -1, dim)


def _image_of(boxes: list[Tensor]) -> Tensor:
    """B tensors [R, 4] -> int64 [M]: the image of each row of their concatenation."""
    device = boxes[0].device
    counts = torch.tensor([len(b) for b in boxes], device=device)
    return torch.arange(len(boxes), device=device).repeat_interleave(counts)
