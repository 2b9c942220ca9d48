"""Pixels of an image become what an exported model takes, and its boxes those of the image. Numpy and Pillow only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from ssod.data.sizes import Fit


class Prepared(NamedTuple):
    """image: float32 [3, H, W], RGB 0 .. 1, padded; size: (h, w) of its valid part; shape: (height, width) before."""

    image: np.ndarray
    size: tuple[int, int]
    shape: tuple[int, int]


def prepare(pixels: np.ndarray, fit: Fit, mean: Sequence[float]) -> Prepared:
    """Resize uint8 [height, width, 3] RGB as `fit` says, put it into the upper left corner, fill the rest with `mean`.

    Sides and positions are those of validation during training; Pillow's antialiased bilinear kernel differs from
    torchvision's by two grey levels of 255 at most.
    """
    height, width = pixels.shape[:2]
    h, w = fit.resized(height, width)
    if (h, w) != (height, width):
        pixels = np.asarray(Image.fromarray(pixels).resize((w, h), Image.Resampling.BILINEAR))
    canvas = np.empty((3, *fit.padded(h, w)), np.float32)
    np.divide(pixels.transpose(2, 0, 1), np.float32(255), out=canvas[:, :h, :w])
    fill = np.asarray(mean, np.float32)[:, None, None]
    canvas[:, h:] = fill
    canvas[:, :h, w:] = fill
    return Prepared(canvas, (h, w), (height, width))


def to_source(boxes: np.ndarray, prepared: Prepared) -> np.ndarray:
    """Boxes [N, 4] xyxy pixels of the prepared image -> pixels of the image before, clipped to it."""
    (h, w), (height, width) = prepared.size, prepared.shape
    scale = np.array([width / w, height / h] * 2)
    return np.clip(boxes * scale, 0, [width, height] * 2).astype(np.float32)
