"""Operations that move pixels, each carrying its matrix along."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ssod.data.views import geometry
from ssod.data.views.operations import Frame, Operation, Range, Rng


@dataclass(frozen=True)
class Resize(Operation):
    """Keep-ratio resize to a long side of `imgsz` pixels times a factor drawn from `scale`.

    short  where it is not 0, the short side is at most this, times the same factor (`imgsz=[short, long]`)
    """

    name: ClassVar[str] = "resize"
    scale: Range = (1.0, 1.0)
    imgsz: int = 640
    short: int = 0

    @classmethod
    def limits(cls) -> dict[str, Range]:
        return {"scale": (0.05, 8.0), "imgsz": (16, 16384), "short": (0, 16384)}

    @property
    def longest(self) -> int:
        return round(self.imgsz * self.scale[1])

    def __call__(self, frame: Frame, rng: Rng) -> Frame:
        factor = rng.uniform(*self.scale)
        return frame.moved(*geometry.resize(frame.image, round(self.imgsz * factor), round(self.short * factor)))


@dataclass(frozen=True)
class Flip(Operation):
    """Mirror left and right with probability `p`."""

    name: ClassVar[str] = "flip"
    p: float = 0.5

    @classmethod
    def limits(cls) -> dict[str, Range]:
        return {"p": (0, 1)}

    def __call__(self, frame: Frame, rng: Rng) -> Frame:
        return frame.moved(*geometry.flip(frame.image)) if rng.random() < self.p else frame


@dataclass(frozen=True)
class Crop(Operation):
    """Keep a window at a random place, each of its sides a share of the image's drawn from `keep`."""

    name: ClassVar[str] = "crop"
    keep: Range = (0.6, 1.0)

    @classmethod
    def limits(cls) -> dict[str, Range]:
        return {"keep": (0.05, 1)}

    def __call__(self, frame: Frame, rng: Rng) -> Frame:
        h0, w0 = frame.image.shape[1:]
        h, w = (max(1, round(side * rng.uniform(*self.keep))) for side in (h0, w0))
        return _random_window(frame, h, w, rng)


@dataclass(frozen=True)
class Window(Operation):
    """Keep a window of at most `imgsz` x `imgsz` pixels at a random place; a smaller side stays whole.

    After `{resize: {scale: [0.1, 2.0]}}` this is large-scale jitter (Ghiasi et al., CVPR 2021): what is missing
    to the fixed size is padding, which the batch adds.
    """

    name: ClassVar[str] = "window"
    imgsz: int = 640

    @classmethod
    def limits(cls) -> dict[str, Range]:
        return {"imgsz": (16, 16384)}

    def __call__(self, frame: Frame, rng: Rng) -> Frame:
        h0, w0 = frame.image.shape[1:]
        return _random_window(frame, min(h0, self.imgsz), min(w0, self.imgsz), rng)


def _random_window(frame: Frame, h: int, w: int, rng: Rng) -> Frame:
    h0, w0 = frame.image.shape[1:]
    top, left = int(rng.integers(h0 - h + 1)), int(rng.integers(w0 - w + 1))
    return frame.moved(*geometry.crop(frame.image, top, left, h, w))


@dataclass(frozen=True)
class Affine(Operation):
    """All of: rotate +-degrees, shear +-degrees per axis, translate +-share of each side, zoom by `scale`."""

    name: ClassVar[str] = "affine"
    rotate: float = 0.0
    shear: float = 0.0
    translate: float = 0.0
    scale: Range = (1.0, 1.0)
    p: float = 1.0

    @classmethod
    def limits(cls) -> dict[str, Range]:
        return {"rotate": (0, 180), "shear": (0, 60), "translate": (0, 0.9), "scale": (0.1, 10), "p": (0, 1)}

    def __call__(self, frame: Frame, rng: Rng) -> Frame:
        if rng.random() >= self.p:
            return frame
        h, w = frame.image.shape[1:]
        rotate, shear_x, shear_y, x, y = rng.uniform(-1, 1, 5)
        matrix = geometry.affine_matrix(
            h,
            w,
            rotate * self.rotate,
            (shear_x * self.shear, shear_y * self.shear),
            (x * self.translate * w, y * self.translate * h),
            rng.uniform(*self.scale),
        )
        return frame.moved(geometry.warp(frame.image, matrix), matrix)


@dataclass(frozen=True)
class OneAffine(Operation):
    """One of four, equally likely: translate along x, along y (share of the side), rotate, shear x and y (degrees).

    The geometric list of Soft Teacher (Xu et al., ICCV 2021); as in the authors' code, shearing acts on both axes.
    """

    name: ClassVar[str] = "one_affine"
    translate: float = 0.1
    rotate: float = 30.0
    shear: float = 30.0

    @classmethod
    def limits(cls) -> dict[str, Range]:
        return {"translate": (0, 0.9), "rotate": (0, 180), "shear": (0, 60)}

    def __call__(self, frame: Frame, rng: Rng) -> Frame:
        h, w = frame.image.shape[1:]
        kind, (amount, other) = rng.integers(4), rng.uniform(-1, 1, 2)
        if kind == 0:
            matrix = geometry.translation(amount * self.translate * w, 0)
        elif kind == 1:
            matrix = geometry.translation(0, amount * self.translate * h)
        elif kind == 2:
            matrix = geometry.affine_matrix(h, w, rotate=amount * self.rotate)
        else:
            matrix = geometry.affine_matrix(h, w, shear=(amount * self.shear, other * self.shear))
        return frame.moved(geometry.warp(frame.image, matrix), matrix)
