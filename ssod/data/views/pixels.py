"""Photometric kernels on one uint8 image [3, H, W]; none changes its input.

OpenCV does the heavy ones when the `fast` extra is installed; the torch forms agree with it within one level
of 255 (tested), so a run is bit-equal only under the same set of installed packages.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as nnf

from ssod.data.views.geometry import cv2, from_hwc, to_hwc

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as Pillow and torchvision use it


# Colour: a chain of brightness, contrast, saturation, hue and grayscale is one affine map of RGB, whose offset is
# itself linear in the image's mean colour (contrast blends with the mean luma). A colour matrix [3, 6] = [P | Q]
# means y = P x + Q mean(x); each function below returns one, `then` composes them, `recolour` touches the pixels
# once. So a chain can be drawn before its image is seen.
# Two approximations against the usual chain: values are clipped at the end only, and hue turns RGB space about
# its gray axis. That keeps the mean of R, G and B where HSV keeps the largest of them; both agree at thirds of
# the circle. On photographs it is nearer to HSV than a rotation in YIQ: 0.65-0.75 against 1.0-1.2 of the mean
# change that a turn of 0.1 makes.

_EYE, _NONE, _LUMA_ROWS = np.eye(3), np.zeros((3, 3)), np.tile(LUMA, (3, 1))
_ACROSS = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)  # cross product with the gray axis
UNCHANGED = np.hstack((_EYE, _NONE))


def brightness(factor: float) -> np.ndarray:
    """x -> factor * x."""
    return np.hstack((_EYE * factor, _NONE))


def contrast(factor: float) -> np.ndarray:
    """Blend with the mean luma of the image."""
    return np.hstack((_EYE * factor, _LUMA_ROWS * (1 - factor)))


def saturation(factor: float) -> np.ndarray:
    """Blend every pixel with its own luma; 0 gives grayscale."""
    return np.hstack((_EYE * factor + (1 - factor) * LUMA, _NONE))


def hue(turn: float) -> np.ndarray:
    """Turn the colours by a share of the full circle, -0.5 .. 0.5; positive goes red -> green -> blue."""
    angle = 2 * np.pi * turn
    rotation = np.cos(angle) * _EYE + np.sin(angle) * _ACROSS + (1 - np.cos(angle)) / 3
    return np.hstack((rotation, _NONE))


def then(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The colour matrix that does `first`, then `second`; after `first` the mean is (P + Q) mean."""
    both = second[:, :3] @ first
    both[:, 3:] += second[:, 3:] @ (first[:, :3] + first[:, 3:])
    return both


def mean_colour(image: Tensor) -> np.ndarray:
    """Mean RGB [3] of every eighth pixel of every eighth row: within a level or two of the true mean."""
    return to_hwc(image)[::8, ::8].reshape(-1, 3).mean(0, dtype=np.float64)


def recolour(image: Tensor, matrix: np.ndarray) -> Tensor:
    """Apply a colour matrix [3, 6] to every pixel, rounded and clipped to 0 .. 255."""
    shift = matrix[:, 3:]
    affine = np.empty((3, 4), np.float32)
    affine[:, :3] = matrix[:, :3]
    affine[:, 3] = shift @ mean_colour(image) if shift.any() else 0
    if cv2 is not None:
        return from_hwc(cv2.transform(to_hwc(image), affine))
    mix, offset = torch.from_numpy(affine).split((3, 1), dim=1)
    flat = image.contiguous().reshape(3, -1).float()  # [3, H * W]
    mixed = torch.addmm(offset + 0.5, mix, flat).clamp_(0, 255)
    # Through numpy, which turns floats into bytes four times as fast.
    return torch.from_numpy(mixed.numpy().astype(np.uint8)).view(image.shape)


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
        np.copyto(out.numpy(), wide.add_(0.5).numpy(), casting="unsafe")  # faster than torch's own
    return blurred


def erase(image: Tensor, top: int, left: int, fill: Tensor) -> Tensor:
    """A copy with `fill`, uint8 [3, h, w], laid over the window whose corner is (top, left)."""
    erased = image.clone()
    erased[:, top : top + fill.shape[1], left : left + fill.shape[2]] = fill
    return erased
