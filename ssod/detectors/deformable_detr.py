"""Deformable DETR (Zhu et al., 2021): queries that become boxes layer by layer, trained one-to-one with the targets.

Letters: B images, K classes, C width, S cells of all levels, Q queries, L decoder layers, N targets (padded).
Boxes inside are (cx, cy, w, h), 0 .. 1 of each image's valid area, as in the paper.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ssod.detectors.base import (
    Detector,
    DetectorOptions,
    check_batch,
    check_targets,
    full_precision,
    pyramid_of,
    touching,
)
from ssod.detectors.set_loss import SetLoss, valid_extent
from ssod.errors import UserError
from ssod.nn.backbone import MakeBackbone
from ssod.nn.deformable_transformer import DecoderLayer, EncoderLayer, Levels
from ssod.nn.position import sine, sine_grid
from ssod.ops.boxes import clip
from ssod.ops.codecs import L1Codec
from ssod.ops.dense import suppress
from ssod.ops.fixed import Detections, best_of, fill, fixed_detections, take_boxes
from ssod.ops.forms import extent
from ssod.ops.host import true_rows
from ssod.ops.set_matching import CostWeights, to_corners
from ssod.structures import DenseOutput, Instances, Pyramid, SlotOutput, Weigh

STRIDES = (8, 16, 32, 64, 128)
BACKBONE_TOP = 32  # strides above it are computed by convolutions
PROPOSAL_SIDE = 0.05  # of the image, at the lowest level; twice as much at each level above (appendix A.4)
NEVER = -20.0  # a logit that stands for probability 0 and keeps every loss finite


class DeformableDETROptions(DetectorOptions):
    levels: int = Field(4, ge=1, le=5, description="maps looked at: 1 = stride 32; 3, 4, 5 = strides 8 to 32, 64, 128")
    half_scale: bool = Field(
        False, description="one pyramid level below: a half-size image then has every stride of the full one"
    )
    width: int = Field(256, ge=16, le=1024, description="numbers per query and per cell")
    heads: int = Field(8, ge=1, le=64, description="attention heads")
    points: int = Field(4, ge=1, le=64, description="cells sampled per head and level")
    feed_forward: int = Field(1024, ge=8, le=8192, description="hidden width of the feed-forward layers")
    encoder_layers: int = Field(6, ge=0, le=24, description="layers of the encoder")
    decoder_layers: int = Field(6, ge=1, le=24, description="layers of the decoder")
    queries: int = Field(300, ge=1, le=10_000, description="most objects of one image")
    box_refine: bool = Field(True, description="each decoder layer starts from the boxes of the one before")
    two_stage: bool = Field(
        True, description="queries start from the encoder's best proposals, not from learned places"
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout of each residual branch while training")
    focal_alpha: float = Field(0.25, ge=0, le=1, description="weight of positives in the focal loss")
    cls_coef: float = Field(2.0, ge=0, description="coefficient of the class loss; transformers: 1")
    l1_coef: float = Field(5.0, ge=0, description="coefficient of the L1 box loss")
    giou_coef: float = Field(2.0, ge=0, description="coefficient of the GIoU box loss")
    aux_coef: float = Field(1.0, ge=0, description="coefficient of the earlier decoder layers' losses; transformers: 0")
    encoder_coef: float = Field(1.0, ge=0, description="coefficient of the proposals' losses; transformers: 0")
    cls_cost: float = Field(2.0, ge=0, description="how much the class counts in the matching; transformers: 1")
    l1_cost: float = Field(5.0, ge=0, description="how much the L1 distance counts in the matching")
    giou_cost: float = Field(2.0, ge=0, description="how much the GIoU counts in the matching")
    nms: bool = Field(False, description="suppress overlapping detections of one class; the paper needs none")


class DeformableDETR(Detector):
    """Encoder over the cells of all levels, decoder over the queries, a class and a box head per decoder layer.

    The defaults are the paper's strongest form (box refinement, two stages) and the coefficients of its published code.
    transformers differs: class coefficient and cost 1, earlier layers' losses only on request (`aux_coef`), and no
    loss for the proposals (`encoder_coef`), without which what ranks them never learns. Setting the options named
    restores each.

    num_classes  K >= 1
    body         makes the backbone; its maps of strides 8, 16, 32 are used (one level: 32 only; half_scale: one more
                 below), higher strides are computed on top
    Raises UserError for options that do not fit each other.
    """

    Options = DeformableDETROptions
    classifier = ("cls_heads",)

    def __init__(self, num_classes: int, body: MakeBackbone, options: DeformableDETROptions) -> None:
        super().__init__()
        _check(options)
        self.num_classes = num_classes
        self.options = options
        self.codec = L1Codec()  # of what `dense` gives
        self.strides = (BACKBONE_TOP,) if options.levels == 1 else STRIDES[: options.levels]
        below = (self.strides[0] // 2,) if options.half_scale else ()
        strides = (*below, *self.strides)
        self.backbone = body([s for s in strides if s <= BACKBONE_TOP])
        self.project = nn.ModuleDict({str(s): _projection(s, self.backbone.channels, options.width) for s in strides})
        self.level_embed = nn.ParameterDict({str(s): nn.Parameter(torch.randn(options.width)) for s in self.strides})

        o = options
        self.cost = CostWeights(o.cls_cost, o.l1_cost, o.giou_cost)
        coef = CostWeights(o.cls_coef, o.l1_coef, o.giou_coef)
        self.criterion = SetLoss(num_classes, self.cost, coef, o.aux_coef, o.encoder_coef, o.focal_alpha)
        shape = (o.width, o.heads, o.points, self.strides, o.feed_forward, o.dropout)
        self.encoder = nn.ModuleList(EncoderLayer(*shape) for _ in range(o.encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(*shape) for _ in range(o.decoder_layers))
        # Without refinement all layers share their heads; the encoder's are one more pair.
        count = o.decoder_layers + o.two_stage if o.box_refine else 1
        self.cls_heads = nn.ModuleList(nn.Linear(o.width, num_classes) for _ in range(count))
        self.box_heads = nn.ModuleList(_box_head(o.width) for _ in range(count))
        if o.two_stage:
            self.memory = nn.Sequential(nn.Linear(o.width, o.width), nn.LayerNorm(o.width))
            self.query = nn.Sequential(nn.Linear(2 * o.width, 2 * o.width), nn.LayerNorm(2 * o.width))
        else:
            self.query_embed = nn.Embedding(o.queries, 2 * o.width)  # position, then content
            self.reference = nn.Linear(o.width, 2)
        self._init_heads()

    def _init_heads(self) -> None:
        for head in self.cls_heads:
            # Every class starts at probability 0.01: else the many negatives swamp the first steps (focal loss, 3.3).
            nn.init.constant_(head.bias, -math.log((1 - 0.01) / 0.01))  # type: ignore[arg-type]
        for head in self.box_heads:
            nn.init.zeros_(head[-1].weight)  # type: ignore[index]
            nn.init.zeros_(head[-1].bias)  # type: ignore[index]
        starts = [*self.memory, *self.query] if self.options.two_stage else [self.reference]
        for layer in starts:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        if not self.options.two_stage:
            with torch.no_grad():  # what starts from a point starts with a side of sigmoid(-2) = 0.12 of the image
                self.box_heads[0][-1].bias[2:] = -2.0  # type: ignore[index]

    # ---- the four verbs

    def features(self, images: Tensor, sizes: Tensor | None = None, shift: int = 0) -> Pyramid:
        """The projected levels. A shifted image has those of its strides that are the detector's own.

        Without `half_scale`, a half-size image lacks the lowest stride. Raises UserError where no stride is left.
        """
        check_batch(images, sizes)
        maps = self.backbone(self.backbone.normalize(images, sizes))
        projected: dict[int, Tensor] = {}
        for key, layer in self.project.items():
            stride = int(key)
            if stride << shift in self.strides:
                below = maps[BACKBONE_TOP] if stride == 2 * BACKBONE_TOP else projected.get(stride // 2)
                projected[stride] = layer(maps.get(stride, below))
        if not projected:
            raise UserError(
                f"detector.levels={self.options.levels} leaves no map for an image of half size: "
                "set detector.half_scale=true."
            )
        if self.options.half_scale and shift == 0:
            first = min(projected)
            projected[first] = touching(projected[first], [self.project[str(first // 2)]])
        return pyramid_of(projected, images, sizes, shift)

    def head(self, pyramid: Pyramid) -> SlotOutput:
        """Encoder and decoder. Images with fewer cells than queries have as many queries as cells (two-stage).

        `dense` of the output is raw: logits [B, S, K], of which the first is the objectness, and codes [B, S, 4], the
        boxes before the sigmoid, infinite where there is no proposal. `DeformableDETR.dense` makes it comparable.
        """
        levels = Levels.of(pyramid, self.strides)
        x = torch.cat([pyramid.maps[s].flatten(2).transpose(1, 2) for s in levels.strides], dim=1)  # [B, S, C]
        grids = zip(levels.strides, levels.shapes, levels.counts.unbind(1), strict=True)
        position = torch.cat([sine_grid(shape, n, self.level_embed[str(s)]) for s, shape, n in grids], dim=1)
        reference = levels.places[:, :, None] * levels.ratios[:, None]  # [B, S, levels, 2]
        for layer in self.encoder:
            x = layer(x, position, reference, levels)

        if self.options.two_stage:
            dense = self._propose(x, levels, pyramid)
            _, best = best_of(dense.logits[..., 0], self.options.queries)  # [B, Q]
            start = take_boxes(dense.codes, best).detach().sigmoid()
            place, content = self.query(sine(start, self.options.width // 2).flatten(-2)).chunk(2, dim=-1)
            return self._refine(x, content, place, start, levels, pyramid, dense)
        place, content = self.query_embed.weight.expand(x.shape[0], -1, -1).chunk(2, dim=-1)
        with full_precision(x):
            start = self.reference(place).sigmoid()  # [B, Q, 2]
        return self._refine(x, content, place, start, levels, pyramid, None)

    def loss(self, output: SlotOutput, targets: list[Instances], weigh: Weigh | None = None) -> dict[str, Tensor]:
        """Focal ("cls"), L1 ("l1") and GIoU loss ("giou") of the last layer, all of them of the earlier layers ("aux")
        and of the encoder's proposals ("encoder", two-stage; every target is of one class there).

        Each layer is matched on its own. Sums are divided by the number of targets of the batch, at least 1, and
        multiplied by their coefficients; weights change the numerators only. `weigh` is asked once for each of the
        stages "query", "aux" and "encoder".
        """
        check_targets(targets, output.logits.shape[1])
        with full_precision(output.logits):
            return self.criterion(output, targets, weigh)

    def decode(self, output: SlotOutput, conf: float = 0.05, iou: float = 0.6, max_det: int = 100) -> list[Instances]:
        """The best `max_det` pairs of query and class: a query may give several detections of different classes.

        `iou` has no effect unless the option `nms` is set: one-to-one training leaves few duplicates.
        """
        with full_precision(output.logits):
            boxes, best, label = self._best(output, max_det)
            if self.options.nms:
                return suppress(boxes, best, label, None, conf, iou, max_det)
            kept = true_rows(list(best > conf))
            return [Instances(boxes[b, keep], label[b, keep], best[b, keep]) for b, keep in enumerate(kept)]

    def fixed(self, output: SlotOutput, conf: float = 0.05, iou: float = 0.6, max_det: int = 100) -> Detections:
        """See `Detector.fixed`."""
        with full_precision(output.logits):
            boxes, best, label = self._best(output, max_det)
            if self.options.nms:
                return fixed_detections(boxes, best, label, self.num_classes, conf, iou, max_det)
            return fill(boxes, best, label, conf, max_det)

    # ---- HasSlots, HasDense

    def slots(self, output: SlotOutput) -> SlotOutput:
        """What `HasSlots` asks for: the output is in slots already."""
        return output

    def dense(self, output: SlotOutput) -> DenseOutput:
        """The encoder's proposals: one logit (objectness) a cell, anchors of the level's size around each cell.

        Cells without a proposal (in the padding, or at the very border) have a logit near probability 0.
        Raises UserError for a detector without two stages.
        """
        if output.dense is None:
            raise UserError("This deformable_detr makes no dense proposals: train it with detector.two_stage=true.")
        with full_precision(output.logits):
            dense = output.dense
            nowhere = dense.codes.isinf().any(dim=-1, keepdim=True)  # [B, S, 1]
            logits = dense.logits[..., :1].float().masked_fill(nowhere, NEVER)
            boxes = to_corners(dense.codes.sigmoid()) * valid_extent(dense.pyramid)[:, None]
            return replace(dense, logits=logits, codes=self.codec.encode(boxes, dense.anchors))

    # ---- inside

    def _best(self, output: SlotOutput, max_det: int) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes [B, T, 4] clipped, scores and labels [B, T] of the best pairs of query and class."""
        scores = output.logits[-1].float().sigmoid().flatten(1)  # [B, Q * K]
        best, index = best_of(scores, scores.shape[1] if self.options.nms else max_det)
        boxes = to_corners(output.boxes[-1].float()) * valid_extent(output.pyramid)[:, None]  # [B, Q, 4]
        boxes = clip(boxes, output.pyramid.sizes[:, None])
        return take_boxes(boxes, index // self.num_classes), best, index % self.num_classes

    def _propose(self, x: Tensor, levels: Levels, pyramid: Pyramid) -> DenseOutput:
        """A class and a box from every cell of the encoder's output, [B, S, C] (appendix A.4)."""
        spans, anchors, sides, start = {}, [], [], 0
        height, width = pyramid.frame
        for stride, (h, w) in zip(levels.strides, levels.shapes, strict=True):
            spans[stride] = slice(start, start := start + h * w)
            side = PROPOSAL_SIDE * 2 ** self.strides.index(stride)
            sides.append(x.new_full((h * w,), side, dtype=torch.float32))
            cy, cx = torch.meshgrid(torch.arange(h, device=x.device), torch.arange(w, device=x.device), indexing="ij")
            place = (torch.stack([cx, cy], dim=-1).flatten(0, 1) + 0.5) * stride  # [h * w, 2] pixels
            half = extent(width, height, x.device) * side / 2
            anchors.append(torch.cat([place - half, place + half], dim=-1))

        side = torch.cat(sides).expand(x.shape[0], -1)  # [B, S]
        guess = torch.cat([levels.places, torch.stack([side, side], dim=-1)], dim=-1)  # [B, S, 4]
        usable = ((guess > 0.01) & (guess < 0.99)).all(dim=-1, keepdim=True) & ~levels.padding.unsqueeze(-1)
        guess = guess.logit().masked_fill(~usable, torch.inf)
        memory = self.memory(x.masked_fill(~usable, 0))
        codes = self.box_heads[-1](memory).float() + guess
        return DenseOutput(self.cls_heads[-1](memory), codes, torch.cat(anchors), spans, pyramid)

    def _refine(
        self,
        memory: Tensor,
        x: Tensor,
        place: Tensor,
        reference: Tensor,
        levels: Levels,
        pyramid: Pyramid,
        dense: DenseOutput | None,
    ) -> SlotOutput:
        """The decoder: memory [B, S, C], queries' content x and place [B, Q, C], reference points or boxes."""
        logits, boxes = [], []
        for i, layer in enumerate(self.decoder):
            head = i if self.options.box_refine else 0
            ratios = levels.ratios if reference.shape[-1] == 2 else levels.ratios.repeat(1, 1, 2)
            x = layer(x, place, reference[:, :, None] * ratios[:, None], memory, levels)
            change = self.box_heads[head](x).float()  # [B, Q, 4]
            known = F.pad(reference.logit(eps=1e-5), (0, 4 - reference.shape[-1]))  # a point says nothing of the size
            box = (change + known).sigmoid()
            logits.append(self.cls_heads[head](x))
            boxes.append(box)
            if self.options.box_refine:
                reference = box.detach()
        return SlotOutput(torch.stack(logits), torch.stack(boxes), x, pyramid, dense)


def _projection(stride: int, channels: dict[int, int], width: int) -> nn.Sequential:
    """One level to the common width: 1x1 for a map of the backbone, 3x3 of stride 2 from the map below otherwise."""
    if stride in channels:
        conv = nn.Conv2d(channels[stride], width, 1)
    else:
        below = channels[BACKBONE_TOP] if stride == 2 * BACKBONE_TOP else width
        conv = nn.Conv2d(below, width, 3, stride=2, padding=1)
    nn.init.xavier_uniform_(conv.weight)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return nn.Sequential(conv, nn.GroupNorm(_groups(width), width))


def _groups(width: int) -> int:
    """32 as published; fewer where that leaves one channel a group, which on a map of one cell is nothing to norm."""
    return 32 if width % 32 == 0 and width > 32 else math.gcd(width // 2, 32)


def _box_head(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))


def _check(options: DeformableDETROptions) -> None:
    if options.levels == 2:
        raise UserError("detector.levels=2 does not fit the backbone's three maps: choose 1, 3, 4 or 5.")
    if options.two_stage and not options.box_refine:
        raise UserError("detector.two_stage=true needs detector.box_refine=true: proposals are boxes to be refined.")
    if options.width % (4 * options.heads):
        raise UserError(
            f"detector.width={options.width} does not divide into {options.heads} heads of a multiple of 4 numbers; "
            f"choose e.g. detector.width={max(1, round(options.width / (4 * options.heads))) * 4 * options.heads}."
        )
