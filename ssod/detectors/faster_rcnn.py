"""Faster R-CNN (Ren et al., 2015) on a feature pyramid (Lin et al., 2017).

Letters: B images, K classes, A anchors per cell, P anchors of one image over all levels, R regions of one image,
M regions or sampled anchors of the whole batch, D numbers per box code.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ssod import dist
from ssod.detectors.base import RegionOutput, candidate_weights, check_targets, full_precision
from ssod.detectors.proposals import Proposer, RpnOutput
from ssod.detectors.pyramid import BoxOptions, PyramidDetector, anchor_codec, ranked
from ssod.detectors.sampled import Sampled
from ssod.errors import UserError
from ssod.nn.backbone import Backbone, MakeBackbone, MissingStrides
from ssod.nn.conv import LinearOfMaps
from ssod.nn.dense_head import per_anchor
from ssod.nn.fpn import FPN, PoolLevels
from ssod.ops.anchors import AnchorGrid, ratio_cells
from ssod.ops.assign import IGNORED, PaddedTargets, assign_iou, pad_targets, sample_balanced
from ssod.ops.boxes import clip, not_smaller
from ssod.ops.codecs import L1Codec
from ssod.ops.fixed import NEVER, Detections, best_of, fixed_detections, take_boxes
from ssod.ops.host import on_device, owners
from ssod.ops.losses import weighted_sum
from ssod.ops.roi import roi_features, roi_strides, rows_by_stride
from ssod.ops.suppression import nms_batch
from ssod.structures import Candidates, DenseOutput, Instances, Pyramid, Weigh

LEVELS = 5
SMALLEST_ANCHOR = 32  # pixels
RATIOS = (0.5, 1.0, 2.0)
ROI_SIZE = 7
FIXED_CANDIDATES = 3000  # pairs of region and class that a graph looks at: TensorRT sorts at most 3840


class FasterRCNNOptions(BoxOptions):
    bucket_scale: float = Field(1.7, ge=1, description="codec bucket: segments reach to the proposal scaled by this")
    class_agnostic: bool | None = Field(
        None, description="one box per proposal instead of one per class; default: only with codec bucket"
    )
    lowest_stride: Literal[4, 8] = Field(4, description="stride of the lowest of the five levels")
    fpn_channels: int = Field(256, ge=8, le=1024, description="width of the pyramid and of the RPN")
    box_head_width: int = Field(
        1024, ge=8, le=8192, description="width of the two fully connected layers of the RoI head"
    )
    anchor_scale: float | None = Field(
        None, gt=0, description="side of the square anchor in strides; default: what gives 32 .. 512 pixels"
    )
    rpn_samples: int = Field(256, ge=1, description="anchors per image in the RPN's loss")
    rpn_positive: float = Field(0.5, gt=0, le=1, description="largest share of positives among them")
    rpn_nms: float = Field(0.7, gt=0, le=1, description="IoU above which a proposal suppresses another")
    train_pre_nms: int = Field(2000, ge=1, description="best anchors per level that enter the RPN's NMS in the loss")
    train_proposals: int = Field(2000, ge=1, description="proposals per image in the loss")
    test_pre_nms: int = Field(1000, ge=1, description="best anchors per level that enter the RPN's NMS elsewhere")
    test_proposals: int = Field(1000, ge=1, description="proposals per image elsewhere")
    pseudo_proposals: int = Field(
        300, ge=1, description="of those, the best that are looked at where detections are to teach"
    )
    roi_samples: int = Field(512, ge=1, description="proposals per image in the RoI head's loss")
    roi_positive: float = Field(0.25, gt=0, le=1, description="largest share of foreground among them")
    roi_foreground: float = Field(0.5, ge=0, le=1, description="IoU from which a proposal is foreground")
    roi_focal_gamma: float = Field(
        0.0, ge=0, description="class loss times (1 - p)^gamma, without alpha; Unbiased Teacher: 1.5"
    )


class FasterRCNN(PyramidDetector):
    """Two stages: an RPN proposes regions (`head`), a RoI head classifies and refines them (`loss`, `decode`).

    The output of `head` is the RPN's, with K = 1: everything later needs boxes, which exist only after decoding it.

    num_classes  K >= 1
    body         makes the backbone; its maps of strides 4 (or 8) to 32 are used, what is above them is pooled
    """

    Options = FasterRCNNOptions
    options: FasterRCNNOptions
    classifier = ("roi_logits",)

    def __init__(self, num_classes: int, body: MakeBackbone, options: FasterRCNNOptions) -> None:
        super().__init__(num_classes, options)
        self.strides = tuple(options.lowest_stride * 2**i for i in range(LEVELS))
        self.codec = L1Codec()  # of what `dense` gives
        self.propose = Proposer(self.codec, options.rpn_nms)
        self.roi_codec = anchor_codec(options, (10, 10, 5, 5), 1 / 9)
        # A bucket code has 8 K numbers: of each class, it would be most of the network's weights.
        agnostic = options.codec == "bucket" if options.class_agnostic is None else options.class_agnostic
        self.box_classes = 1 if agnostic else num_classes
        scale = options.anchor_scale or SMALLEST_ANCHOR / options.lowest_stride
        self.anchors = AnchorGrid(ratio_cells({s: [s * scale] for s in self.strides}, RATIOS))
        self.backbone = _body(body, options)
        self.fpn = FPN(self.backbone.channels, options.fpn_channels, PoolLevels())

        width, anchors = options.fpn_channels, self.anchors.per_cell
        self.rpn_conv = nn.Conv2d(width, width, 3, padding=1)
        self.rpn_logits = nn.Conv2d(width, anchors, 1)
        self.rpn_codes = nn.Conv2d(width, anchors * self.codec.dim, 1)

        self.fc1 = LinearOfMaps(width * ROI_SIZE**2, options.box_head_width)
        self.fc2 = nn.Linear(options.box_head_width, options.box_head_width)
        self.roi_logits = nn.Linear(options.box_head_width, num_classes + 1)
        self.roi_codes = nn.Linear(options.box_head_width, self.box_classes * self.roi_codec.dim)
        self._init_heads()

    def _init_heads(self) -> None:
        for module in (self.rpn_conv, self.rpn_logits, self.rpn_codes, self.roi_logits):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.roi_codes.weight, std=0.001)  # first boxes = the proposals themselves
        self.roi_codes.bias.data.copy_(self.roi_codec.start().repeat(self.box_classes))

    # ---- the four verbs

    def head(self, pyramid: Pyramid) -> DenseOutput:
        """The RPN: objectness logits [B, P, 1] and codes [B, P, D]."""
        logits, codes = [], []
        for x in pyramid.maps.values():
            hidden = self.rpn_conv(x).relu_()
            logits.append(per_anchor(self.rpn_logits(hidden), 1))
            codes.append(per_anchor(self.rpn_codes(hidden), self.codec.dim))
        anchors, spans = self._places(pyramid)
        return RpnOutput(torch.cat(logits, dim=1), torch.cat(codes, dim=1), anchors, spans, pyramid)

    def loss(self, output: DenseOutput, targets: list[Instances], weigh: Weigh | None = None) -> dict[str, Tensor]:
        """Objectness and box loss of the RPN, class and box loss of the RoI head.

        Each is a weighted sum divided by the number of sampled candidates; weights change the numerators only.
        """
        check_targets(targets, len(output.logits))
        with full_precision(output.logits):
            padded = pad_targets(targets)
            anchors = self._sample_anchors(output, targets)
            regions = self._sample_regions(output, padded)
            anchors.settle(regions, list(self._roi_maps(output.pyramid)))
            return self._rpn_loss(output, anchors, padded, weigh) | self._roi_loss(output, regions, padded, weigh)

    def decode(self, output: DenseOutput, conf: float = 0.05, iou: float = 0.6, max_det: int = 100) -> list[Instances]:
        """Every region may become one detection per class; score = class probability.

        With `rank_by_quality`, score = sqrt(class probability * the codec's quality).
        """
        return self._decode(output, self.proposals(output), conf, iou, max_det)

    def pseudo(self, output: DenseOutput, conf: float, iou: float, max_det: int) -> list[Instances]:
        best = [regions[: self.options.pseudo_proposals] for regions in self.proposals(output)]
        return self._decode(output, best, conf, iou, max_det)

    def _decode(
        self, output: DenseOutput, regions: list[Tensor], conf: float, iou: float, max_det: int
    ) -> list[Instances]:
        with full_precision(output.logits):
            image = _image_of(regions)
            logits, codes = self._region_head(output.pyramid, torch.cat(regions), image)
            anchors = torch.cat(regions).unsqueeze(1)  # [M, 1, 4]
            all_boxes, all_quality = self.roi_codec.decode(codes, anchors)  # [M, K or 1, 4]
            probability = logits.softmax(dim=1)[:, :-1]  # [M, K]
            scores = ranked(probability, all_quality, self.options)
            all_boxes = all_boxes.expand(-1, self.num_classes, 4)
            all_quality = None if all_quality is None else all_quality.expand(-1, self.num_classes)
            all_boxes = clip(all_boxes, output.pyramid.sizes[image, None])
            solid = (scores > conf) & not_smaller(all_boxes, 0.01)  # [M, K]
            counts = [len(r) for r in regions]

            def by_image(values: Tensor) -> Tensor:
                """[M, K, ...] -> [B, R * K, ...], shorter images filled up with 0."""
                return pad_sequence(list(values.split(counts)), batch_first=True).flatten(1, 2)

            boxes, scores, valid = by_image(all_boxes), by_image(scores), by_image(solid)
            quality = None if all_quality is None else by_image(all_quality)
            label = torch.arange(self.num_classes, device=boxes.device).repeat(max(counts)).expand(scores.shape)
            kept = nms_batch(boxes, scores, label, valid, iou, max_det)
            return [
                Instances(boxes[b, k], label[b, k], scores[b, k], None if quality is None else quality[b, k])
                for b, k in enumerate(kept)
            ]

    def fixed(self, output: DenseOutput, conf: float = 0.05, iou: float = 0.6, max_det: int = 100) -> Detections:
        """See `Detector.fixed`."""
        with full_precision(output.logits):
            limits = self.options.test_pre_nms, self.options.test_proposals
            regions, real = self.propose.fixed(output, *limits)  # [B, R, 4], [B, R]
            batch, count = real.shape
            image = torch.arange(batch, device=real.device).unsqueeze(1).expand(-1, count).flatten()
            logits, codes = self._region_head(output.pyramid, regions.flatten(0, 1), image)
            boxes, quality = self.roi_codec.decode(codes, regions.flatten(0, 1).unsqueeze(1))  # [M, K or 1, 4]
            scores = ranked(logits.softmax(dim=1)[:, :-1], quality, self.options)  # [M, K]
            boxes = boxes.expand(-1, self.num_classes, 4).reshape(batch, -1, 4)  # [B, R * K, 4]
            boxes = clip(boxes, output.pyramid.sizes[:, None])
            solid = not_smaller(boxes, 0.01) & real.repeat_interleave(self.num_classes, dim=1)
            best, index = best_of(scores.reshape(batch, -1).where(solid, NEVER), FIXED_CANDIDATES)
            label = index % self.num_classes
            return fixed_detections(take_boxes(boxes, index), best, label, self.num_classes, conf, iou, max_det)

    # ---- HasRegions

    def proposals(self, output: DenseOutput) -> list[Tensor]:
        """The regions that `decode` looks at: B tensors [R, 4] xyxy pixels, by descending objectness, no gradient."""
        return self.propose(output, self.options.test_pre_nms, self.options.test_proposals)

    def read(
        self,
        output: DenseOutput,
        boxes: list[Tensor],
        labels: list[Tensor] | None = None,
        wanted: Tensor | None = None,
    ) -> RegionOutput:
        """What the RoI head says of given boxes, B tensors [R, 4], corrected for given classes or for the best one; of
        wanted ones only, where bool [M] says which."""
        with full_precision(output.logits):
            every, image = torch.cat(boxes), _image_of(boxes)
            of_class = None if labels is None else torch.cat(labels)
            rows = of_stride = None
            if wanted is not None:
                rows, of_stride = rows_by_stride(every, wanted, list(self._roi_maps(output.pyramid)))
                every, image = every[rows], image[rows]
                of_class = None if of_class is None else of_class[rows]
            logits, codes = self._region_head(output.pyramid, every, image, of_stride)
            of_class = logits[:, :-1].argmax(dim=1) if of_class is None else of_class  # [M]
            corrected, quality = self.roi_codec.decode(self._codes_for(codes, of_class), every)
            return RegionOutput(logits, of_class, corrected, quality, rows)

    def classify(self, output: DenseOutput, boxes: list[Tensor]) -> list[Tensor]:
        """Class probabilities of given boxes: B tensors [R, 4] -> B tensors [R, K + 1], background last."""
        return list(self.read(output, boxes).logits.softmax(dim=1).split([len(b) for b in boxes]))

    def refine(self, output: DenseOutput, boxes: list[Tensor], labels: list[Tensor] | None = None) -> list[Instances]:
        """Given boxes as the RoI head corrects them for given classes, or for their best class: as many, in the same
        order, clipped."""
        said = self.read(output, boxes, labels)
        scores = said.logits.softmax(dim=1).gather(1, said.labels.unsqueeze(1)).squeeze(1)
        corrected = clip(said.boxes, output.pyramid.sizes[_image_of(boxes)])
        every = Instances(corrected, said.labels, scores, said.quality)
        counts = [len(b) for b in boxes]
        starts = [sum(counts[:i]) for i in range(len(counts))]
        return [every[s : s + n] for s, n in zip(starts, counts, strict=True)]

    # ---- HasDense

    def dense(self, output: DenseOutput) -> DenseOutput:
        """What `HasDense` asks for: the RPN's objectness and boxes, K = 1."""
        return output

    # ---- inside

    def _sample_anchors(self, output: DenseOutput, targets: list[Instances]) -> Sampled:
        # Image by image: [B, P, N] overlaps of all anchors would be gigabytes for large images.
        matched = torch.stack([assign_iou(output.anchors, t.boxes.float(), 0.3, 0.7, True) for t in targets])  # [B, P]
        take, use = sample_balanced(matched, self.options.rpn_samples, self.options.rpn_positive)
        image = torch.arange(len(take), device=take.device)[:, None].expand(take.shape)
        return Sampled(take.flatten(), image.flatten(), matched.gather(1, take).flatten(), use.flatten())

    def _sample_regions(self, output: DenseOutput, padded: PaddedTargets) -> Sampled:
        threshold = self.options.roi_foreground
        proposals = self.propose(output, self.options.train_pre_nms, self.options.train_proposals)
        counts = on_device([len(r) for r in proposals], padded.boxes.device)
        regions = pad_sequence(proposals, batch_first=True)  # [B, R, 4]
        there = torch.arange(regions.shape[1], device=counts.device) < counts[:, None]
        regions = torch.cat([regions, padded.boxes], dim=1)  # the targets themselves: foreground from step one
        there = torch.cat([there, padded.valid], dim=1)
        found = assign_iou(regions, padded.boxes, threshold, threshold, False, padded.valid).where(there, IGNORED)
        take, use = sample_balanced(found, self.options.roi_samples, self.options.roi_positive)  # [B, S]
        every = take_boxes(regions, take).flatten(0, 1)
        image = torch.arange(len(take), device=take.device)[:, None].expand(take.shape).flatten()
        strides = roi_strides(every, list(self._roi_maps(output.pyramid)))
        return Sampled(every, image, found.gather(1, take).flatten(), use.flatten(), strides)

    def _rpn_loss(
        self, output: DenseOutput, samples: Sampled, padded: PaddedTargets, weigh: Weigh | None
    ) -> dict[str, Tensor]:
        anchor, image, fg = samples.what, samples.image, samples.foreground
        candidates = self._candidates(output.anchors[anchor], image, samples.matched, padded, "rpn")
        weights = candidate_weights(candidates, padded, weigh)

        is_object = (candidates.matched >= 0).float()
        logits = output.logits[image, anchor, 0].float()
        objectness = F.binary_cross_entropy_with_logits(logits, is_object, reduction="none")
        codes = output.codes[image[fg], anchor[fg]].float()
        boxes = padded.boxes[image[fg], candidates.matched[fg]]
        box_weight = None if weights.box is None else weights.box[fg]
        return {
            "rpn_cls": weighted_sum(objectness, weights.cls) / candidates.divisor,
            "rpn_box": self.codec.loss(codes, candidates.boxes[fg], boxes, box_weight) / candidates.divisor,
        }

    def _roi_loss(
        self, output: DenseOutput, samples: Sampled, padded: PaddedTargets, weigh: Weigh | None
    ) -> dict[str, Tensor]:
        fg = samples.foreground
        candidates = self._candidates(samples.what, samples.image, samples.matched, padded, "roi")
        weights = candidate_weights(candidates, padded, weigh)
        if weights.learn_classes:
            logits, codes = self._region_head(output.pyramid, samples.what, samples.image, samples.of_stride)
            cls = weighted_sum(self._class_loss(logits, candidates.labels), weights.cls)
            codes = codes[fg]
        else:  # background has no box: three quarters of the work and more are saved
            logits, codes = self._region_head(output.pyramid, samples.what[fg], samples.image[fg], samples.fg_of_stride)
            cls = 0 * logits.sum()

        boxes = padded.boxes[candidates.image[fg], candidates.matched[fg]]
        box_weight = None if weights.box is None else weights.box[fg]
        own_codes = self._codes_for(codes, candidates.labels[fg])  # [F, D], of the class each is assigned
        box = self.roi_codec.loss(own_codes, candidates.boxes[fg], boxes, box_weight, weights.learn_quality)
        return {
            "cls": cls / candidates.divisor,
            "box": box * self.options.box_loss_weight / candidates.divisor,
        }

    def _class_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy, times (1 - p)^gamma of the right class's probability: [M, K + 1], int64 [M] -> [M]."""
        surprise = F.cross_entropy(logits, labels, reduction="none")
        gamma = self.options.roi_focal_gamma
        # Not quite 0: the derivative of x^gamma there is infinite for gamma below 1.
        return surprise * (-torch.expm1(-surprise)).clamp(min=1e-9) ** gamma if gamma else surprise

    def _candidates(
        self, boxes: Tensor, image: Tensor, matched: Tensor, padded: PaddedTargets, stage: str
    ) -> Candidates:
        labels = padded.labels[image, matched.clamp(min=0)].where(matched >= 0, self.num_classes)
        divisor = dist.shared(boxes.new_full((), len(boxes)))
        return Candidates(boxes, image, labels, matched, stage, divisor)

    def _roi_maps(self, pyramid: Pyramid) -> dict[int, Tensor]:
        return {s: m for s, m in pyramid.maps.items() if s in self.strides[:-1]}  # the top level serves the RPN only

    def _region_head(
        self, pyramid: Pyramid, boxes: Tensor, image: Tensor, of_stride: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Boxes [M, 4] and the image of each, int64 [M] -> logits [M, K + 1] and codes [M, K, D] in float32
        ([M, 1, D] if class-agnostic). of_stride: see `roi_features`."""
        maps = self._roi_maps(pyramid)
        like = next(iter(maps.values()))
        pooled = roi_features(maps, boxes, image, ROI_SIZE, of_stride)  # [M, C, 7, 7]
        # The wide layers compute in the precision of the features, whatever the caller's autocast is by now.
        with torch.autocast(like.device.type, like.dtype, enabled=like.dtype != torch.float32):
            hidden = self.fc2(self.fc1(pooled).relu()).relu()
            logits, codes = self.roi_logits(hidden), self.roi_codes(hidden)
        return logits.float(), codes.float().unflatten(1, (self.box_classes, self.roi_codec.dim))

    def _codes_for(self, codes: Tensor, labels: Tensor) -> Tensor:
        """The codes of one class each: [M, K or 1, D] and int64 [M] -> [M, D]."""
        return codes[torch.arange(len(codes), device=codes.device), labels if self.box_classes > 1 else 0 * labels]


def _body(body: MakeBackbone, options: FasterRCNNOptions) -> Backbone:
    """The backbone with maps from `lowest_stride` to 32, and one below it for images of half the size."""
    lowest = options.lowest_stride // 2 if options.half_scale else options.lowest_stride
    try:
        return body([s for s in (2, 4, 8, 16, 32) if s >= lowest])
    except MissingStrides as error:
        if lowest > 2:
            raise
        raise UserError(
            "detector.half_scale=true needs a map of stride 2 and this backbone has none; set "
            "detector.lowest_stride=8, or choose another backbone, e.g. 'resnet50'."
        ) from error


def _image_of(boxes: list[Tensor]) -> Tensor:
    """B tensors [R, 4] -> int64 [M]: the image of each row of their concatenation."""
    return owners([len(b) for b in boxes], boxes[0].device)
