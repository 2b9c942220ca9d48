"""Every container that crosses a room.

Letters in shape comments, here and everywhere: B images, N boxes of one image, K classes,
P candidates of one image (anchors, points, proposals or queries), D numbers per box code,
H x W padded frame in pixels. Boxes are float32 xyxy pixels, 0 <= x1 <= x2 <= W, 0 <= y1 <= y2 <= H.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Instances:
    """Objects of one image: annotations, pseudo boxes or detections.

    boxes       float32 [N, 4]  xyxy pixels of the view they belong to
    labels      int64   [N]     0 .. K-1
    scores      float32 [N]     0 .. 1, None for annotations
    quality     float32 [N]     0 .. 1, how well the box sits (centerness, v, s_loc), None where unknown
    cls_weight  float32 [N]     >= 0, weight of a target in the class loss, None = 1
    box_weight  float32 [N]     >= 0, weight of a target in the box loss, None = 1
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor | None = None
    quality: Tensor | None = None
    cls_weight: Tensor | None = None
    box_weight: Tensor | None = None

    def __len__(self) -> int:
        return self.boxes.shape[0]

    def __getitem__(self, index: Tensor | slice) -> Instances:
        return self._apply(lambda t: t[index])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Instances:
        return self._apply(lambda t: t.to(device, non_blocking=non_blocking))

    def detach(self) -> Instances:
        return self._apply(torch.Tensor.detach)

    def with_boxes(self, boxes: Tensor) -> Instances:
        """The same objects at other places: boxes [N, 4]."""
        return replace(self, boxes=boxes)

    def _apply(self, fn: Callable[[Tensor], Tensor]) -> Instances:
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: None if v is None else fn(v) for k, v in values.items()}
        return Instances(**moved)

    def split(self, counts: list[int]) -> list[Instances]:
        """The first objects, the next ones and so on, `counts` of them each."""
        starts = [sum(counts[:i]) for i in range(len(counts))]
        return [self[start : start + count] for start, count in zip(starts, counts, strict=True)]

    @staticmethod
    def empty(device: torch.device | str = "cpu") -> Instances:
        return Instances(torch.zeros(0, 4, device=device), torch.zeros(0, dtype=torch.int64, device=device))

    @staticmethod
    def cat(parts: Sequence[Instances]) -> Instances:
        """Objects of several lists of one image; a field is kept only where every part has it."""
        out: dict[str, Any] = {}
        for f in fields(Instances):
            values = [getattr(p, f.name) for p in parts]
            out[f.name] = None if any(v is None for v in values) else torch.cat(values)
        return Instances(**out)


@dataclass
class View:
    """A batch of images under one augmentation.

    images    uint8 [B, 3, H, W]  RGB, padded at the right and the bottom
    sizes     int64 [B, 2]        (h, w) of the valid area, h <= H, w <= W
    matrices  float64 [B, 3, 3]   source image pixels -> pixels of this view (homogeneous, column vectors)
    targets   B Instances         annotations in this view's pixels; empty for unlabelled images, always
    indices   B ints              position of each image in its sample list
    complete  B bools             False where objects may be without annotation; None: all images are complete
    """

    images: Tensor
    sizes: Tensor
    matrices: Tensor
    targets: list[Instances]
    indices: list[int]
    complete: list[bool] | None = None

    def __len__(self) -> int:
        return self.images.shape[0]

    @staticmethod
    def cat(views: Sequence[View]) -> View:
        """The images of several views in one batch, padded to the largest; `complete` only where all have it."""
        height, width = (max(v.images.shape[side] for v in views) for side in (2, 3))
        padded = [F.pad(v.images, (0, width - v.images.shape[3], 0, height - v.images.shape[2])) for v in views]
        complete = [each for v in views if v.complete is not None for each in v.complete]
        return View(
            torch.cat(padded),
            torch.cat([v.sizes for v in views]),
            torch.cat([v.matrices for v in views]),
            [t for v in views for t in v.targets],
            [i for v in views for i in v.indices],
            complete if all(v.complete is not None for v in views) else None,
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> View:
        return View(
            self.images.to(device, non_blocking=non_blocking),
            self.sizes.to(device, non_blocking=non_blocking),
            self.matrices.to(device, non_blocking=non_blocking) if str(device) != "mps" else self.matrices,
            [t.to(device, non_blocking) for t in self.targets],
            self.indices,
            self.complete,
        )

    def pin_memory(self) -> View:
        return replace(self, images=self.images.pin_memory())


@dataclass
class SemiBatch:
    """What one training step gets. `weak` and `strong` show the same unlabelled images in the same order.

    labeled: with two views of labelled images (`augment.labeled: [weak, strong]`) all images in the first view, then
    all in the second
    bad: (path, reason) of images that could not be read and were replaced by others in this batch.
    """

    labeled: View
    weak: View | None = None
    strong: View | None = None
    bad: list[tuple[str, str]] = field(default_factory=list)
    _aligned: bool | None = field(default=None, repr=False)

    def aligned(self) -> bool:
        """Whether weak and strong pixels lie at the same places. A batch is asked before it goes to a device, which
        would be waited for."""
        if self._aligned is None:
            assert self.weak is not None
            assert self.strong is not None
            self._aligned = torch.equal(self.weak.matrices, self.strong.matrices)
        return self._aligned

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SemiBatch:
        return self._each(lambda view: view.to(device, non_blocking))

    def pin_memory(self) -> SemiBatch:
        return self._each(View.pin_memory)

    def _each(self, fn: Callable[[View], View]) -> SemiBatch:
        weak, strong = (None if v is None else fn(v) for v in (self.weak, self.strong))
        aligned = self.aligned() if weak is not None and strong is not None else None
        return SemiBatch(fn(self.labeled), weak, strong, self.bad, aligned)


@dataclass
class Pyramid:
    """Feature maps, looked up by stride in the full-size frame, never by index.

    maps   {stride: [B, C, ceil(H / stride), ceil(W / stride)]}, ascending strides
    frame  (H, W) of the padded batch, pixels of the full-size frame
    sizes  int64 [B, 2] valid (h, w) of each image, pixels of the full-size frame
    """

    maps: dict[int, Tensor]
    frame: tuple[int, int]
    sizes: Tensor

    def split(self, counts: list[int]) -> list[Pyramid]:
        """The first images, the next ones and so on, `counts` of them each."""
        # The gradients of what `split` gives come back in one copy; slices would each fill a tensor of all images.
        maps = zip(*(m.split(counts) for m in self.maps.values()), strict=True)
        pieces = zip(maps, self.sizes.split(counts), strict=True)
        return [Pyramid(dict(zip(self.maps, own, strict=True)), self.frame, sizes) for own, sizes in pieces]


@dataclass
class DenseOutput:
    """Raw predictions of every candidate of a dense head, levels concatenated in ascending stride.

    logits   [B, P, K]       before the sigmoid
    codes    [B, P, D]       what the codec decodes into boxes
    anchors  [P, 4]          xyxy pixels, the box a code refers to
    spans    {stride: slice} the candidates of each level
    quality  [B, P] or None  logit of the localisation quality (FCOS: centerness)
    pyramid  what the head saw (frame and valid sizes)
    """

    logits: Tensor
    codes: Tensor
    anchors: Tensor
    spans: dict[int, slice]
    pyramid: Pyramid
    quality: Tensor | None = None

    def split(self, counts: list[int]) -> list[DenseOutput]:
        """What was predicted of the first images, the next ones and so on, `counts` of them each."""
        quality = [None] * len(counts) if self.quality is None else self.quality.split(counts)
        pieces = zip(
            self.logits.split(counts), self.codes.split(counts), self.pyramid.split(counts), quality, strict=True
        )
        return [replace(self, logits=a, codes=c, pyramid=p, quality=q) for a, c, p, q in pieces]


@dataclass
class SlotOutput:
    """Raw predictions of Q queries per image, of every decoder layer, first to last (L of them).

    logits      [L, B, Q, K]  before the sigmoid
    boxes       [L, B, Q, 4]  cxcywh, 0 .. 1 of each image's valid area
    embeddings  [B, Q, C]     what the last layer's logits and boxes are computed from
    dense       the encoder's own proposals (two-stage), or None; raw, see the detector's `head` and `dense`
    pyramid     what the decoder looked at (frame and valid sizes)
    """

    logits: Tensor
    boxes: Tensor
    embeddings: Tensor
    pyramid: Pyramid
    dense: DenseOutput | None = None

    def split(self, counts: list[int]) -> list[SlotOutput]:
        """What was predicted of the first images, the next ones and so on, `counts` of them each."""
        pieces = zip(
            self.logits.split(counts, dim=1),
            self.boxes.split(counts, dim=1),
            self.embeddings.split(counts),
            self.pyramid.split(counts),
            [None] * len(counts) if self.dense is None else self.dense.split(counts),
            strict=True,
        )
        return [SlotOutput(*piece) for piece in pieces]


@dataclass
class Candidates:
    """What `weigh` sees after assignment: M candidates of the whole batch.

    boxes    [M, 4]  xyxy pixels of the student's view (anchors, points' cells, proposals or what queries predict)
    image    int64 [M]  which image of the batch, 0 .. B-1
    labels   int64 [M]  assigned class, K = background, -1 = ignored
    matched  int64 [M]  index of the matched target in that image's Instances, -1 = none
    stage    "dense"; "rpn", "roi"; "query" (all B * Q of the last decoder layer, in order), "aux" (those of the
             layers before it, layer by layer), "encoder" (the proposals of all cells, B * S)
    divisor  what the losses, weighted sums over these candidates, are divided by: "dense" the foreground, a number or
             one a candidate [M]; "rpn" and "roi" all M; "query", "aux" and "encoder" the targets of the batch.
             Weights do not change it: who wants another mean multiplies them by divisor / count.
    """

    boxes: Tensor
    image: Tensor
    labels: Tensor
    matched: Tensor
    stage: str
    divisor: Tensor | float = 1.0


@dataclass
class Weights:
    """Per-candidate weights [M] of the class and the box loss; None = 1.

    learn_quality  False: these boxes teach where sides lie, and nothing about how certain that is. See `Codec.loss`.
    learn_classes  False: `cls` is 0 everywhere, and a detector need not find out what it would think of background
    """

    cls: Tensor | None = None
    box: Tensor | None = None
    learn_quality: bool = True
    learn_classes: bool = True


Weigh = Callable[[Candidates], Weights]
