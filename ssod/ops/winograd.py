"""3x3 convolutions with a quarter of the products, forward and backward: Winograd's F(4x4, 3x3).

Four by four outputs of a 3x3 convolution take 6 x 6 products instead of 4 x 4 x 9: tile and kernel are seen as
polynomials and multiplied at six points of each axis (Winograd 1980; Lavin and Gray 2016, section 4). With C channels
in and K out that is 36 products of matrices, T tiles x C by C x K, between two small changes of basis. All of these are
linear, so the gradients take the same path back.

The points 0, +-3/4, +-3/2 and infinity lose half as much to rounding as the usual 0, +-1, +-2: a relative error of
2e-6, where a plain convolution of 256 channels has 0.3e-6.

Letters: B images, C channels in, K out, T tiles.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssod.ops.forms import plain, wide_vectors

TILE, TAPS = 4, 3
SIDE = TILE + TAPS - 1  # of the tile that is read
PRODUCTS = SIDE * SIDE
POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)  # and infinity

# Where it pays on a CPU, from tests/bench/bench_conv3x3.py (docs/performance.md).
LEAST_CHANNELS = 112  # harmonic mean of C and K
LEAST_PLACES = 1500  # B * h * w: fewer do not pay for the kernel's change of basis
PART = 1_200_000  # numbers in 36 x tiles x channels that are worked on at once: they should stay in the cache


def bases() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of one axis, float64: of the input [6, 6], of the kernel [6, 3] and of the output [4, 6]. For a tile d and a
    kernel g, output @ ((kernel @ g) * (input @ d)) are the four values of their correlation (Toom and Cook)."""
    points = np.array(POINTS)
    apart = np.array([np.prod(p - np.delete(points, i)) for i, p in enumerate(points)])

    def powers(count: int) -> np.ndarray:
        infinity = np.eye(1, count, count - 1)
        return np.concatenate([points[:, None] ** np.arange(count), infinity])

    others = [np.append(np.poly(np.delete(points, i))[::-1], 0) for i in range(len(points))]
    inputs = np.stack([*others, np.poly(points)[::-1]])
    return inputs, powers(TAPS) / np.append(apart, 1)[:, None], powers(TILE).T


def pays(x: Tensor, weight: Tensor) -> bool:
    """Whether `conv3x3` is the faster way to convolve x [B, C, h, w] with weight [K, C, 3, 3]: float32 on an x86 CPU
    (elsewhere nobody has measured) without 512-bit vectors, wide, and on large maps. With such vectors oneDNN's
    convolutions are as fast as its products, or faster. Never while a graph is made, which has forms of its own.
    """
    if plain() or wide_vectors() or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    k, c = weight.shape[:2]
    wide = 2 * c * k >= LEAST_CHANNELS * (c + k)
    return (
        wide
        and x.shape[0] * x.shape[2] * x.shape[3] >= LEAST_PLACES
        and x.dtype == weight.dtype == torch.float32
        and platform.machine() in ("x86_64", "AMD64")
    )


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The convolution of stride 1 with one pixel of padding, differentiable once.

    x [B, C, h, w] of any layout, weight [K, C, 3, 3], bias [K], all float32 on a CPU.
    Returns [B, K, h, w], channels last.
    """
    result: Tensor = _Conv3x3.apply(x, weight, bias)
    return result


class _Conv3x3(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        b, c, h, w = x.shape
        k = weight.shape[0]
        down, across = -(-h // TILE), -(-w // TILE)
        to_points, _, from_points = _bases()
        kernel = _kernel(weight)
        out = torch.empty((b, k, TILE * down, TILE * across), memory_format=torch.channels_last)
        blocks = _blocks(out)
        for images, rows, tiles in _parts(x, max(c, k)):
            points = (to_points @ tiles).view(PRODUCTS, -1, c)
            place = blocks[:, :, images, rows]
            found = (from_points @ torch.bmm(points, kernel).view(PRODUCTS, -1)).view(place.shape)
            if bias is None:
                place.copy_(found)
            else:
                torch.add(found, bias, out=place)
        fits = (TILE * down, TILE * across) == (h, w)
        return out if fits else out[:, :, :h, :w].contiguous(memory_format=torch.channels_last)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        b, c, h, w = x.shape
        k = weight.shape[0]
        down, across = -(-h // TILE), -(-w // TILE)
        to_points, of_kernel, from_points = _bases()
        kernel = _kernel(weight).transpose(1, 2)
        sums = x.new_zeros(PRODUCTS, k, c)
        fits = not (h % TILE or w % TILE)
        blocks = _blocks(grad if fits else F.pad(grad, (0, TILE * across - w, 0, TILE * down - h)))
        back = torch.zeros(b, TILE * (down + 1), TILE * (across + 1), c) if of_x else None
        for images, rows, tiles in _parts(x, max(c, k)):
            products = (from_points.t() @ blocks[:, :, images, rows].reshape(TILE * TILE, -1)).view(PRODUCTS, -1, k)
            if of_weight:
                sums.baddbmm_(products.transpose(1, 2), (to_points @ tiles).view(PRODUCTS, -1, c))
            if back is not None:
                tiles = to_points.t() @ torch.bmm(products, kernel).view(PRODUCTS, -1)
                _add_tiles(back[images], tiles.view(SIDE, SIDE, -1, rows.stop - rows.start, across, c), rows)
        x_grad = None if back is None else back[:, 1 : h + 1, 1 : w + 1].permute(0, 3, 1, 2)
        weight_grad = None
        if of_weight:
            taps = (of_kernel.t() @ sums.view(PRODUCTS, -1)).view(TAPS, TAPS, k, c)
            weight_grad = taps.permute(2, 3, 0, 1).contiguous()
        return x_grad, weight_grad, grad.sum((0, 2, 3)) if of_bias else None


@cache
def _bases() -> tuple[Tensor, Tensor, Tensor]:
    """Those of both axes, float32: [36, 36], [36, 9] and [16, 36]."""
    inputs, kernel, outputs = (torch.tensor(np.kron(m, m), dtype=torch.float32) for m in bases())
    return inputs, kernel, outputs


def _kernel(weight: Tensor) -> Tensor:
    """[K, C, 3, 3] -> [36, C, K]."""
    k, c = weight.shape[:2]
    return (_bases()[1] @ weight.reshape(-1, TAPS * TAPS).t()).view(PRODUCTS, k, c).transpose(1, 2)


def _bordered(x: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, 4 * down + 2, 4 * across + 2, C], zero around it."""
    return F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1 + -x.shape[3] % TILE, 1, 1 + -x.shape[2] % TILE))


def _blocks(x: Tensor) -> Tensor:
    """[B, K, 4 * down, 4 * across] as a view [4, 4, B, down, across, K]."""
    return x.unflatten(3, (-1, TILE)).unflatten(2, (-1, TILE)).permute(3, 5, 0, 2, 4, 1)


def _parts(x: Tensor, channels: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """What is worked on at once, several images or some rows of tiles of one: which, and the tiles [36, T * C]."""
    b, _, h, w = x.shape
    down, across = -(-h // TILE), -(-w // TILE)
    step = max(1, PART // (PRODUCTS * across * channels))
    for images in _slices(b, max(1, step // down)):
        pixels = _bordered(x[images])
        for rows in _slices(down, step):
            yield images, rows, _tiles(pixels, rows)


def _slices(count: int, step: int) -> Iterator[slice]:
    for first in range(0, count, step):
        yield slice(first, min(first + step, count))


def _tiles(pixels: Tensor, rows: slice) -> Tensor:
    """[36, T * C] of these rows of tiles, each 6 x 6 pixels, two of which it shares with the next."""
    cut = pixels.unfold(1, SIDE, TILE)[:, rows].unfold(2, SIDE, TILE)  # [B, rows, across, C, 6, 6]
    return cut.permute(4, 5, 0, 1, 2, 3).reshape(PRODUCTS, -1)


def _add_tiles(pixels: Tensor, tiles: Tensor, rows: slice) -> None:
    """Add tiles [6, 6, B, rows, across, C] where `_tiles` takes them from, in [B, 4 * down + 4, 4 * across + 4, C]."""
    across = tiles.shape[4]
    blocks = _blocks(pixels.permute(0, 3, 1, 2))
    for (i, of_i), (j, of_j) in product(enumerate((slice(TILE), slice(TILE, SIDE))), repeat=2):
        part = tiles[of_i, of_j]
        place = blocks[: part.shape[0], : part.shape[1], :, rows.start + i : rows.stop + i, j : across + j]
        place += part
