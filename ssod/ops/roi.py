"""Features of regions, cut out of a pyramid."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import roi_align

from ssod.ops.boxes import area

CANONICAL_SIZE, CANONICAL_STRIDE = 224, 16  # a box of 224 px is cut from the map of stride 16 (FPN, Eq. 1)


def roi_strides(boxes: Tensor, strides: list[int]) -> Tensor:
    """The stride whose map each box [M, 4] is cut from: int64 [M], one of `strides` (ascending powers of two)."""
    level = torch.floor(torch.log2(area(boxes).clamp(min=0).sqrt() / CANONICAL_SIZE) + 1e-6)
    wanted = CANONICAL_STRIDE * torch.exp2(level)
    return wanted.clamp(strides[0], strides[-1]).long()


def roi_features(maps: dict[int, Tensor], boxes: Tensor, image: Tensor, size: int, sampling: int = 2) -> Tensor:
    """RoIAlign (He et al., Mask R-CNN, 2017, section 3) over several maps.

    maps      {stride: [B, C, h, w]}
    boxes     [M, 4] xyxy pixels, image int64 [M] the image of each
    size      cells per side of the result, each the mean of sampling x sampling bilinear samples

    Returns float32 [M, C, size, size].
    """
    rois = torch.cat([image.to(boxes.dtype).unsqueeze(1), boxes], dim=1)  # [M, 5]
    stride_of = roi_strides(boxes, list(maps))
    channels = next(iter(maps.values())).shape[1]
    out = boxes.new_zeros(len(boxes), channels, size, size)
    for stride, x in maps.items():
        index = (stride_of == stride).nonzero().squeeze(1)
        pooled = roi_align(x.float(), rois[index], size, spatial_scale=1 / stride, sampling_ratio=sampling)
        out = out.index_copy(0, index, pooled)
    return out
