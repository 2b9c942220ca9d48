"""Geometric kernels on one uint8 image, each returning the matrix of what it did.

An image is a uint8 tensor [3, H, W], RGB, best in channels-last memory (a permuted HWC array): resizing is
2.5x faster there, and OpenCV takes it without a copy.
Pixels are unit squares: pixel i covers [i, i + 1) and its centre is i + 0.5. A matrix maps these continuous
coordinates, homogeneous column vectors, from the input image to the output image.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as nnf
from torchvision.transforms.v2 import functional as tvf

from ssod.data.sizes import Size, fitted, sides  # noqa: F401  who resizes looks for them here

try:
    import cv2
except ImportError:  # the `fast` extra is not installed
    cv2 = None  # type: ignore[assignment]

GREY = 114  # what lies outside an image: close to the ImageNet mean, so about 0 once normalised


def to_hwc(image: Tensor) -> np.ndarray:
    """uint8 [3, H, W] -> array [H, W, 3] over the same memory, contiguous when the image is channels-last."""
    return image.permute(1, 2, 0).numpy()


def from_hwc(array: np.ndarray) -> Tensor:
    """uint8 array [H, W, 3] -> tensor [3, H, W] over the same memory."""
    return torch.from_numpy(array).permute(2, 0, 1)


def laid_out(image: Tensor) -> Tensor:
    """The same pixels as the photometric kernels want them: planes for torch, channels-last for OpenCV."""
    return image if cv2 is not None else image.contiguous()


def resize(image: Tensor, long_side: int, short_side: int = 0) -> tuple[Tensor, np.ndarray]:
    """Resize to the limits of `fitted`, ratio kept up to the rounding of the sides; bilinear, antialiased.

    One kernel with and without the `fast` extra: an evaluation must not depend on what is installed.
    """
    h0, w0 = image.shape[1:]
    return resize_to(image, *fitted(h0, w0, long_side, short_side))


def resize_to(image: Tensor, h: int, w: int) -> tuple[Tensor, np.ndarray]:
    """Resize to h x w pixels as `resize` does."""
    h0, w0 = image.shape[1:]
    if (h, w) == (h0, w0):
        return image, np.eye(3)
    return tvf.resize(image, [h, w], antialias=True), np.diag([w / w0, h / h0, 1.0])


def flip(image: Tensor) -> tuple[Tensor, np.ndarray]:
    """Mirror left and right: x -> W - x."""
    w = image.shape[2]
    if cv2 is not None:
        mirrored = from_hwc(cv2.flip(to_hwc(image), 1))
    else:
        mirrored = image.flip(-1)
    return mirrored, np.array([[-1.0, 0, w], [0, 1, 0], [0, 0, 1]])


def crop(image: Tensor, top: int, left: int, height: int, width: int) -> tuple[Tensor, np.ndarray]:
    """Cut out a window that lies inside the image; a view on the same memory."""
    assert 0 <= top <= image.shape[1] - height
    assert 0 <= left <= image.shape[2] - width
    window = image[:, top : top + height, left : left + width]
    return window, translation(-left, -top)


def warp(image: Tensor, matrix: np.ndarray) -> Tensor:
    """Move the image by an affine matrix [3, 3] on the same canvas; bilinear, GREY from outside."""
    if cv2 is not None:
        # OpenCV counts from pixel centres: shift by half a pixel there and back.
        centred = translation(-0.5, -0.5) @ matrix @ translation(0.5, 0.5)
        h, w = image.shape[1:]
        moved = cv2.warpAffine(to_hwc(image), centred[:2], (w, h), borderValue=(GREY, GREY, GREY))
        return from_hwc(moved)
    return _warp_torch(image, matrix)


def _warp_torch(image: Tensor, matrix: np.ndarray) -> Tensor:
    h, w = image.shape[1:]
    # affine_grid wants, for every output place, the input place, both in [-1, 1] across the canvas.
    to_unit = np.array([[2 / w, 0, -1], [0, 2 / h, -1], [0, 0, 1]])
    theta = to_unit @ np.linalg.inv(matrix) @ np.linalg.inv(to_unit)
    grid = nnf.affine_grid(torch.tensor(theta[None, :2], dtype=torch.float32), [1, 3, h, w], align_corners=False)
    # grid_sample reads 0 outside: make 0 mean GREY.
    shifted = image.contiguous()[None].float() - GREY
    moved = nnf.grid_sample(shifted, grid, align_corners=False)[0] + (GREY + 0.5)
    return moved.to(torch.uint8)


def translation(x: float, y: float) -> np.ndarray:
    """Matrix [3, 3] that moves by (x, y) pixels."""
    return np.array([[1.0, 0, x], [0, 1, y], [0, 0, 1]])


def affine_matrix(
    height: int,
    width: int,
    rotate: float = 0.0,
    shear: tuple[float, float] = (0.0, 0.0),
    translate: tuple[float, float] = (0.0, 0.0),
    scale: float = 1.0,
) -> np.ndarray:
    """Matrix [3, 3] about the image centre: shear (x, y) and rotation in degrees, scale, then a shift in pixels.

    A positive rotation turns the image clockwise as seen, since y points down.
    """
    a = np.deg2rad(rotate)
    shear_x, shear_y = np.tan(np.deg2rad(shear))
    c, s = scale * np.cos(a), scale * np.sin(a)
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    slant = np.array([[1, shear_x, 0], [shear_y, 1, 0], [0, 0, 1]])
    x, y = width / 2, height / 2
    return translation(x + translate[0], y + translate[1]) @ turn @ slant @ translation(-x, -y)
