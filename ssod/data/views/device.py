"""Colour, blur and erasing of the strong view, batched on the device instead of image by image in the workers.

The draws are those of the workers' operations, made on the host from (seed, position in the stream); only the
pixels are touched elsewhere, with the same rounding to uint8 after every operation. So both places give the same
distribution, and a resumed run the same bits. Letters: B images, b of them that an operation touches, H x W padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast, get_args

import numpy as np
import torch
from torch import Tensor

from ssod.data.streams import generator
from ssod.data.views.geometry import GREY
from ssod.data.views.photometric import Blur, Color, Erase, Painting, Rectangle
from ssod.data.views.transforms import Chain, Views
from ssod.structures import View

PAINT = 2  # the number of these draws among the streams of the loader


def divide(views: Views) -> tuple[Views, tuple[Painting, ...]]:
    """One view as what the workers do and what the device does: its last operations, as far as they are `Painting`s.

    What stands before an operation that the device cannot do (geometry, `one_color`) stays with the workers too,
    for the order of a view is part of it.
    """
    if len(views.chains) != 1:
        return views, ()  # refused by `build_loader`, in a sentence
    (chain,) = views.chains
    cut = len(chain.operations)
    while cut and isinstance(chain.operations[cut - 1], get_args(Painting)):
        cut -= 1
    rest = Views((Chain(chain.operations[:cut], chain.from_weak, chain.mixing),), views.preset)
    return rest, cast(tuple[Painting, ...], chain.operations[cut:])


class Painter:
    """Paints a batch: the operations of `divide`, drawn per image.

    seed, rank, world  as in `build_loader`: an image at a position of the stream is drawn for alike on any number of
                       ranks, only the noise of an erasing is that of its batch
    """

    def __init__(self, operations: Sequence[Painting], seed: int, rank: int = 0, world: int = 1) -> None:
        self.operations, self.seed, self.rank, self.world = operations, seed, rank, world

    @torch.no_grad()
    def __call__(self, view: View, sizes: Tensor, step: int) -> View:
        """A painted copy of `view`; `sizes` [B, 2] are its own, on the host; `step` is that of the loader."""
        first = (step * self.world + self.rank) * len(view)
        rngs = [generator(self.seed, PAINT, first + i, 0, 0) for i in range(len(view))]
        noise = torch.Generator(view.images.device)
        noise.manual_seed(int(generator(self.seed, PAINT, first, 0, 1).integers(2**62)))
        shapes = sizes.tolist()
        images = view.images.clone()
        for operation in self.operations:
            if isinstance(operation, Color):
                _recolour(images, [operation.draw(rng) for rng in rngs], view.sizes)
            elif isinstance(operation, Blur):
                _blur(images, [operation.draw(rng) for rng in rngs], shapes, view.sizes)
            else:
                drawn = [operation.draw(rng, *shape) for rng, shape in zip(rngs, shapes, strict=True)]
                images = _cover(images, drawn, noise if isinstance(operation, Erase) else None)
        inside = _inside(view.sizes, *images.shape[2:])
        return replace(view, images=images.masked_fill_(~inside[:, None], GREY))


def _inside(sizes: Tensor, height: int, width: int) -> Tensor:
    """bool [B, H, W]: pixels of the valid area."""
    y, x = torch.arange(height, device=sizes.device), torch.arange(width, device=sizes.device)
    return (y < sizes[:, :1])[:, :, None] & (x < sizes[:, 1:])[:, None, :]


def _recolour(images: Tensor, matrices: list[np.ndarray | None], sizes: Tensor) -> None:
    """Apply colour matrices [3, 6] (see `pixels`) in place, as `pixels.recolour` does."""
    rows = [i for i, m in enumerate(matrices) if m is not None]
    if not rows:
        return
    at = torch.tensor(rows, device=images.device)
    matrix = torch.tensor(np.stack([m for m in matrices if m is not None]), dtype=torch.float32, device=images.device)
    picked = images[at]  # [b, 3, H, W]
    sample = picked[:, :, ::8, ::8].float()
    inside = _inside((sizes[at] + 7) // 8, *sample.shape[2:])[:, None]  # [b, 1, H / 8, W / 8]
    mean = (sample * inside).sum((2, 3)) / inside.sum((2, 3))  # [b, 3]
    offset = (matrix[:, :, 3:] * mean[:, None]).sum(2)  # [b, 3]
    planes = picked.float().unbind(1)  # 3 x [b, H, W]
    for channel in range(3):
        mix = matrix[:, channel, :3, None, None].unbind(1)  # 3 x [b, 1, 1]
        mixed = sum(m * plane for m, plane in zip(mix, planes, strict=True)) + (offset[:, channel, None, None] + 0.5)
        picked[:, channel] = mixed.clamp_(0, 255).to(torch.uint8)
    images[at] = picked


def _blur(images: Tensor, sigmas: list[float | None], shapes: list[list[int]], sizes: Tensor) -> None:
    """Gaussian blur in place, each image with its own sigma, mirrored at its own border, as `pixels.blur` does."""
    rows, kernels = [], []
    for i, (sigma, (h, w)) in enumerate(zip(sigmas, shapes, strict=True)):
        if sigma is not None and (radius := min(round(3 * sigma), h - 1, w - 1)):
            rows.append(i)
            taps = np.exp(-0.5 * (np.arange(radius + 1) / sigma) ** 2)
            kernels.append(taps / (taps[0] + 2 * taps[1:].sum()))
    if not rows:
        return
    widest = max(map(len, kernels))
    weights = torch.tensor(np.stack([np.pad(k, (0, widest - len(k))) for k in kernels]), dtype=torch.float32)
    weights = weights.to(images.device)[:, :, None, None, None]  # [b, taps, 1, 1, 1]
    at = torch.tensor(rows, device=images.device)
    blurred = images[at].float()  # [b, 3, H, W]
    for axis in (2, 3):
        blurred = _smooth(blurred, weights, sizes[at, axis - 2], axis)
    images[at] = blurred.add_(0.5).to(torch.uint8)


def _smooth(x: Tensor, weights: Tensor, length: Tensor, axis: int) -> Tensor:
    """Weighted sum of x [b, 3, H, W] shifted along one axis; `length` [b] is where each image ends."""
    radius, side = weights.shape[1] - 1, x.shape[axis]
    place = torch.arange(-radius, side + radius, device=x.device)
    last = length[:, None] - 1
    mirrored = (last - (last - place.abs()).abs()).clamp(0, side - 1)  # [b, side + 2 radius]
    shape = [len(x), 1, 1, 1]
    shape[axis] = -1
    size = list(x.shape)
    size[axis] = side + 2 * radius
    padded = x.gather(axis, mirrored.view(shape).expand(size))
    out = padded.narrow(axis, radius, side) * weights[:, 0]
    for i in range(1, radius + 1):
        out.addcmul_(padded.narrow(axis, radius - i, side) + padded.narrow(axis, radius + i, side), weights[:, i])
    return out


def _cover(images: Tensor, rectangles: list[list[Rectangle]], noise: torch.Generator | None) -> Tensor:
    """Images with uniform noise, or grey, over rectangles (any number an image)."""
    most = max(map(len, rectangles))
    if not most:
        return images
    padded = [r + [(0, 0, 0, 0)] * (most - len(r)) for r in rectangles]
    top, left, h, w = torch.tensor(padded, device=images.device)[..., None].unbind(2)  # each [B, R, 1]
    y, x = (torch.arange(side, device=images.device) for side in images.shape[2:])
    tall = ((y >= top) & (y < top + h)).float()  # [B, R, H]
    wide = ((x >= left) & (x < left + w)).float()  # [B, R, W]
    covered = (tall.transpose(1, 2) @ wide > 0)[:, None]  # [B, 1, H, W]
    if noise is None:
        return images.masked_fill_(covered, GREY)
    fill = torch.randint(0, 256, images.shape, generator=noise, device=images.device, dtype=torch.uint8)
    return torch.where(covered, fill, images)
