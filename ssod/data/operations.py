"""The operations a view is made of. Each is a small frozen record of its ranges, called with a frame and a
generator; the class docstring is its entry in the manual, its first field is what `{name: value}` sets.

All draws come from the generator that is passed in, so a view depends on nothing but its seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from ssod.data import geometry, pixels
from ssod.errors import UserError

Range = tuple[float, float]
Rng = np.random.Generator


@dataclass(frozen=True)
class Frame:
    """One image on its way. Operations make new frames and never write into one.

    image   uint8 [3, H, W], RGB
    matrix  float64 [3, 3], source image pixels -> pixels of `image`
    """

    image: Tensor
    matrix: np.ndarray

    def moved(self, image: Tensor, matrix: np.ndarray) -> Frame:
        return Frame(image, matrix @ self.matrix)

    def painted(self, image: Tensor) -> Frame:
        return Frame(image, self.matrix)


@dataclass(frozen=True)
class Operation:
    """Base of all operations: checks its fields when it is made, from `limits`: {field: (lowest, highest)}."""

    def __call__(self, frame: Frame, rng: Rng) -> Frame:
        raise NotImplementedError

    @classmethod
    def limits(cls) -> dict[str, Range]:
        raise NotImplementedError

    def __post_init__(self) -> None:
        name = NAMES[type(self)]
        for field in fields(self):
            value, (low, high) = getattr(self, field.name), self.limits()[field.name]
            numbers = value if isinstance(value, tuple) else (value,)
            if isinstance(field.default, tuple) and (len(numbers) != 2 or not isinstance(value, tuple)):
                raise UserError(f"{name}.{field.name} must be a range [low, high], got {value!r}.")
            if not isinstance(field.default, tuple) and isinstance(value, tuple):
                raise UserError(f"{name}.{field.name} must be one number, got {list(value)}.")
            if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in numbers):
                raise UserError(f"{name}.{field.name} must be a number, got {value!r}.")
            if not all(low <= v <= high for v in numbers) or list(numbers) != sorted(numbers):
                raise UserError(f"{name}.{field.name} must lie in {low:g} .. {high:g}, got {value!r}.")


# ---------------------------------------------------------------- geometry


@dataclass(frozen=True)
class Resize(Operation):
    """Keep-ratio resize to a long side of `imgsz` pixels times a factor drawn from `scale`."""

    scale: Range = (1.0, 1.0)
    imgsz: int = 640

    @classmethod
    def limits(cls) -> dict[str, Range]:
        return {"scale": (0.05, 8.0), "imgsz": (16, 16384)}

    @property
    def longest(self) -> int:
        return round(self.imgsz * self.scale[1])

    def __call__(self, frame: Frame, rng: Rng) -> Frame:
        return frame.moved(*geometry.resize(frame.image, round(self.imgsz * rng.uniform(*self.scale))))


@dataclass(frozen=True)
class Flip(Operation):
    """Mirror left and right with probability `p`."""

    p: float = 0.5

    @classmethod
    def limits(cls) -> dict[str, Range]:
        return {"p": (0, 1)}

    def __call__(self, frame: Frame, rng: Rng) -> Frame:
        return frame.moved(*geometry.flip(frame.image)) if rng.random() < self.p else frame


@dataclass(frozen=True)
class Crop(Operation):
    """Keep a window at a random place, each of its sides a share of the image's drawn from `keep`."""

    keep: Range = (0.6, 1.0)

    @classmethod
    def limits(cls) -> dict[str, Range]:
        return {"keep": (0.05, 1)}

    def __call__(self, frame: Frame, rng: Rng) -> Frame:
        h0, w0 = frame.image.shape[1:]
        h, w = (max(1, round(side * rng.uniform(*self.keep))) for side in (h0, w0))
        top, left = int(rng.integers(h0 - h + 1)), int(rng.integers(w0 - w + 1))
        return frame.moved(*geometry.crop(frame.image, top, left, h, w))


@dataclass(frozen=True)
class Affine(Operation):
    """All of: rotate +-degrees, shear +-degrees per axis, translate +-share of each side, zoom by `scale`."""

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
    """One of: translate along x or y (share of the side), rotate, shear along x or y (degrees).

    The geometric list of Soft Teacher (Xu et al., ICCV 2021).
    """

    translate: float = 0.1
    rotate: float = 30.0
    shear: float = 30.0

    @classmethod
    def limits(cls) -> dict[str, Range]:
        return {"translate": (0, 0.9), "rotate": (0, 180), "shear": (0, 60)}

    def __call__(self, frame: Frame, rng: Rng) -> Frame:
        h, w = frame.image.shape[1:]
        kind, amount = rng.integers(5), rng.uniform(-1, 1)
        if kind == 0:
            matrix = geometry.translation(amount * self.translate * w, 0)
        elif kind == 1:
            matrix = geometry.translation(0, amount * self.translate * h)
        elif kind == 2:
            matrix = geometry.affine_matrix(h, w, rotate=amount * self.rotate)
        elif kind == 3:
            matrix = geometry.affine_matrix(h, w, shear=(amount * self.shear, 0))
        else:
            matrix = geometry.affine_matrix(h, w, shear=(0, amount * self.shear))
        return frame.moved(geometry.warp(frame.image, matrix), matrix)


# ---------------------------------------------------------------- pixels


@dataclass(frozen=True)
class Color(Operation):
    """With probability `p`, brightness, contrast, saturation (factors 1 +- value) and hue (+- value of the
    circle) in random order; then, with probability `gray`, grayscale. One matrix product, see `pixels`."""

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    p: float = 0.8
    gray: float = 0.0

    @classmethod
    def limits(cls) -> dict[str, Range]:
        return {name: (0, 0.5 if name == "hue" else 1) for name in (f.name for f in fields(cls))}

    def __call__(self, frame: Frame, rng: Rng) -> Frame:
        jitter, gray = rng.random() < self.p, rng.random() < self.gray
        if not (jitter or gray):
            return frame
        matrix = np.eye(3, 4)
        if jitter:
            mean = pixels.mean_colour(frame.image)
            light, blend, rich, turn = rng.uniform(-1, 1, 4) * (
                self.brightness,
                self.contrast,
                self.saturation,
                self.hue,
            )
            for step in rng.permutation(4):
                if step == 0:
                    change = pixels.brightness(1 + light)
                elif step == 1:
                    change = pixels.contrast(1 + blend, matrix[:, :3] @ mean + matrix[:, 3])
                elif step == 2:
                    change = pixels.saturation(1 + rich)
                else:
                    change = pixels.hue(turn)
                matrix = pixels.then(matrix, change)
        if gray:
            matrix = pixels.then(matrix, pixels.saturation(0))
        return frame.painted(pixels.recolour(frame.image, matrix))


@dataclass(frozen=True)
class OneColor(Operation):
    """One of: nothing, autocontrast, equalize, solarize, saturation, contrast, brightness, sharpness, posterize.

    The colour list of Soft Teacher; the strengths are those of RandAugment (Cubuk et al., 2020): factors
    0.1 .. 1.9, solarize from level 0 .. 256, posterize to 4 .. 8 bits. `p` is the chance to do anything.
    """

    p: float = 1.0

    @classmethod
    def limits(cls) -> dict[str, Range]:
        return {"p": (0, 1)}

    def __call__(self, frame: Frame, rng: Rng) -> Frame:
        image, skip, kind, amount = frame.image, rng.random() >= self.p, rng.integers(9), rng.random()
        factor = 0.1 + 1.8 * amount
        if skip or kind == 0:
            return frame
        if kind == 1:
            return frame.painted(tvf.autocontrast(image))
        if kind == 2:
            return frame.painted(tvf.equalize(image))
        if kind == 3:
            return frame.painted(tvf.solarize(image, 256 * amount))
        if kind == 4:
            return frame.painted(pixels.recolour(image, pixels.saturation(factor)))
        if kind == 5:
            return frame.painted(pixels.recolour(image, pixels.contrast(factor, pixels.mean_colour(image))))
        if kind == 6:
            return frame.painted(pixels.recolour(image, pixels.brightness(factor)))
        if kind == 7:
            return frame.painted(tvf.adjust_sharpness(image, factor))
        return frame.painted(tvf.posterize(image, 4 + int(amount * 5)))


@dataclass(frozen=True)
class Blur(Operation):
    """Gaussian blur with probability `p`, sigma in pixels drawn from `sigma`."""

    sigma: Range = (0.1, 2.0)
    p: float = 0.5

    @classmethod
    def limits(cls) -> dict[str, Range]:
        return {"sigma": (0.01, 50), "p": (0, 1)}

    def __call__(self, frame: Frame, rng: Rng) -> Frame:
        sigma = rng.uniform(*self.sigma)
        return frame.painted(pixels.blur(frame.image, sigma)) if rng.random() < self.p else frame


@dataclass(frozen=True)
class Erase(Operation):
    """With probability `p`, noise over one rectangle: `area` share of the image, `ratio` height over width.

    Random erasing (Zhong et al., AAAI 2020). A rectangle that does not fit is drawn again, ten times at most.
    Boxes under it stay targets.
    """

    p: float = 0.5
    area: Range = (0.02, 0.2)
    ratio: Range = (0.3, 3.3)

    @classmethod
    def limits(cls) -> dict[str, Range]:
        return {"p": (0, 1), "area": (0.0001, 1), "ratio": (0.01, 100)}

    def __call__(self, frame: Frame, rng: Rng) -> Frame:
        if rng.random() >= self.p:
            return frame
        height, width = frame.image.shape[1:]
        for _ in range(10):
            area = rng.uniform(*self.area) * height * width
            ratio = np.exp(rng.uniform(*np.log(self.ratio)))
            h, w = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
            if 0 < h < height and 0 < w < width:
                top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
                noise = np.frombuffer(bytearray(rng.bytes(3 * h * w)), np.uint8).reshape(h, w, 3)
                return frame.painted(pixels.erase(frame.image, top, left, geometry.from_hwc(noise)))
        return frame


@dataclass(frozen=True)
class Cutout(Operation):
    """A number of grey rectangles drawn from `count`, each side up to a share `side` of the image's."""

    count: Range = (1, 4)
    side: float = 0.2

    @classmethod
    def limits(cls) -> dict[str, Range]:
        return {"count": (0, 100), "side": (0.001, 1)}

    def __call__(self, frame: Frame, rng: Rng) -> Frame:
        height, width = frame.image.shape[1:]
        image = frame.image
        for _ in range(rng.integers(int(self.count[0]), int(self.count[1]) + 1)):
            h, w = (round(side * rng.uniform(0, self.side)) for side in (height, width))
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            grey = torch.tensor(geometry.GREY, dtype=torch.uint8).expand(3, h, w)
            image = pixels.erase(image, top, left, grey)
        return frame.painted(image)


OPERATIONS: dict[str, Callable[..., Operation]] = {
    "resize": Resize,
    "flip": Flip,
    "crop": Crop,
    "affine": Affine,
    "one_affine": OneAffine,
    "color": Color,
    "one_color": OneColor,
    "blur": Blur,
    "erase": Erase,
    "cutout": Cutout,
}
NAMES: dict[type, str] = {cls: name for name, cls in OPERATIONS.items()}  # type: ignore[misc]
