"""Photometric kernels on one uint8 image [3, H, W]; none changes its input.

OpenCV does the heavy ones when the `fast` extra is installed; the torch forms agree with it within one level
of 255 (tested), so a run is bit-equal only under the same set of installed packages.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as nnf

from ssod.data.geometry import cv2, from_hwc, to_hwc

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as Pillow and torchvision use it


# Colour: a chain of brightness, contrast, saturation, hue and grayscale is one affine map of RGB. Each function
# below returns its [3, 4] matrix (3x3 and an offset); `then` composes them; `recolour` touches the pixels once.
# Two approximations against the usual chain: values are clipped at the end only, and hue turns RGB space about
# its gray axis. That keeps the mean of R, G and B where HSV keeps the largest of them; both agree at thirds of
# the circle. On photographs it is nearer to HSV than a rotation in YIQ: 0.65-0.75 against 1.0-1.2 of the mean
# change that a turn of 0.1 makes.


def brightness(factor: float) -> np.ndarray:
    """x -> factor * x."""
    return np.hstack((np.eye(3) * factor, np.zeros((3, 1))))


def contrast(factor: float, mean: np.ndarray) -> np.ndarray:
    """Blend with the mean luma of the image, whose mean colour [3] is `mean` at this point of the chain."""
    return np.hstack((np.eye(3) * factor, np.full((3, 1), (1 - factor) * (LUMA @ mean))))


def saturation(factor: float) -> np.ndarray:
    """Blend every pixel with its own luma; 0 gives grayscale."""
    return np.hstack((np.eye(3) * factor + (1 - factor) * LUMA, np.zeros((3, 1))))


def hue(turn: float) -> np.ndarray:
    """Turn the colours by a share of the full circle, -0.5 .. 0.5; positive goes red -> green -> blue."""
    angle = 2 * np.pi * turn
    across = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)  # cross product with the gray axis
    rotation = np.cos(angle) * np.eye(3) + np.sin(angle) * across + (1 - np.cos(angle)) / 3
    return np.hstack((rotation, np.zeros((3, 1))))


def then(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The [3, 4] matrix that does `first`, then `second`."""
    both = second[:, :3] @ first
    both[:, 3] += second[:, 3]
    return both


def mean_colour(image: Tensor) -> np.ndarray:
    """Mean RGB [3] of every eighth pixel of every eighth row: within a level or two of the true mean."""
    return to_hwc(image)[::8, ::8].reshape(-1, 3).mean(0, dtype=np.float64)


def recolour(image: Tensor, matrix: np.ndarray) -> Tensor:
    """Apply a colour matrix [3, 4] to every pixel, rounded and clipped to 0 .. 255."""
    if cv2 is not None:
        return from_hwc(cv2.transform(to_hwc(image), matrix.astype(np.float32)))
    mix, offset = torch.tensor(matrix[:, :3], dtype=torch.float32), torch.tensor(matrix[:, 3:], dtype=torch.float32)
    flat = image.contiguous().reshape(3, -1).float()  # [3, H * W]
    mixed = torch.addmm(offset + 0.5, mix, flat).clamp_(0, 255)
    return mixed.to(torch.uint8).reshape(image.shape)


def blur(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur, sigma in pixels, cut at 3 sigma, mirrored at the border; below 1/6 pixel it does nothing."""
    h, w = image.shape[1:]
    radius = min(round(3 * sigma), h - 1, w - 1)
    if radius == 0:
        return image
    if cv2 is not None:
        size = 2 * radius + 1
        return from_hwc(cv2.GaussianBlur(to_hwc(image), (size, size), sigma, borderType=cv2.BORDER_REFLECT_101))
    return _blur_torch(image, sigma, radius)


def _blur_torch(image: Tensor, sigma: float, radius: int) -> Tensor:
    """Sums of shifted copies, plane by plane in buffers that stay in the cache: far cheaper than convolving."""
    taps = torch.exp(-0.5 * (torch.arange(radius + 1) / sigma) ** 2)
    weights = (taps / (taps[0] + 2 * taps[1:].sum())).tolist()
    h, w = image.shape[1:]
    tall, sum_tall = torch.empty(2, h, w + 2 * radius).unbind()
    wide, sum_wide = torch.empty(2, h, w).unbind()
    blurred = torch.empty(3, h, w, dtype=torch.uint8)
    for plane, out in zip(image, blurred, strict=True):
        padded = nnf.pad(plane[None].float(), [radius] * 4, mode="reflect")[0]  # [h + 2 radius, w + 2 radius]
        torch.mul(padded[radius : radius + h], weights[0], out=tall)
        for i in range(1, radius + 1):
            torch.add(padded[radius - i :][:h], padded[radius + i :][:h], out=sum_tall)
            tall.add_(sum_tall, alpha=weights[i])
        torch.mul(tall[:, radius : radius + w], weights[0], out=wide)
        for i in range(1, radius + 1):
            torch.add(tall[:, radius - i :][:, :w], tall[:, radius + i :][:, :w], out=sum_wide)
            wide.add_(sum_wide, alpha=weights[i])
        out.copy_(wide.add_(0.5))
    return blurred


def erase(image: Tensor, top: int, left: int, fill: Tensor) -> Tensor:
    """A copy with `fill`, uint8 [3, h, w], laid over the window whose corner is (top, left)."""
    erased = image.clone()
    erased[:, top : top + fill.shape[1], left : left + fill.shape[2]] = fill
    return erased
