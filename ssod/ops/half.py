"""Images at half their size, for the networks' second look at a picture."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssod.structures import View


def half_size(view: View) -> tuple[Tensor, Tensor]:
    """A view's images at half size, as `features(images, sizes, shift=1)` takes them.

    Returns uint8 [B, 3, ceil(H / 2), ceil(W / 2)], each pixel the mean of the 2 x 2 it covers, halves rounded up, and
    valid sizes int64 [B, 2], (h, w) of the view halved and rounded up. Where a valid side is odd, the last pixel
    covers what is valid only: padding does not bleed into the picture.
    """
    height, width = view.images.shape[-2:]
    x = F.pad(view.images, (0, width % 2, 0, height % 2)) if height % 2 or width % 2 else view.images.clone()
    batch = torch.arange(len(x), device=x.device)
    h, w = view.sizes.to(x.device).unbind(1)  # [B] each
    # The last valid row and column once more, where the side is odd; where it is even the write changes nothing.
    row, column = h - 1 + h % 2, w - 1 + w % 2
    x[batch, :, row] = x[batch, :, h - 1]
    x[batch, :, :, column] = x[batch, :, :, w - 1]

    pairs = x[:, :, 0::2].short() + x[:, :, 1::2]  # [B, 3, ceil(H / 2), W]
    mean = (pairs[..., 0::2] + pairs[..., 1::2] + 2) >> 2
    return mean.to(torch.uint8), (view.sizes + 1) // 2
