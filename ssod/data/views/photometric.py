"""Operations that change pixels and leave every box where it is.

A `Painting` draws first what to do, from the generator and the image's size alone, and then does it. So the draws
of a whole batch can be made on the host and its pixels painted on the device (`ssod.data.views.device`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np
import torch
from torchvision.transforms.v2 import functional as tvf

from ssod.data.views import geometry, pixels
from ssod.data.views.operations import Frame, Operation, Range, Rng

Rectangle = tuple[int, int, int, int]  # top, left, height, width


@dataclass(frozen=True)
class Color(Operation):
    """With probability `p`, brightness, contrast, saturation (factors 1 +- value) and hue (+- value of the
    circle) in random order; then, with probability `gray`, grayscale. One matrix product, see `pixels`."""

    name: ClassVar[str] = "color"
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    p: float = 0.8
    gray: float = 0.0

    @classmethod
    def limits(cls) -> dict[str, Range]:
        return {name: (0, 0.5 if name == "hue" else 1) for name in (f.name for f in fields(cls))}

    def draw(self, rng: Rng) -> np.ndarray | None:
        """A colour matrix [3, 6] (see `pixels`), or None for no change."""
        jitter, gray = rng.random() < self.p, rng.random() < self.gray
        if not (jitter or gray):
            return None
        matrix = pixels.UNCHANGED
        if jitter:
            light, blend, rich, turn = rng.uniform(-1, 1, 4)
            changes = (
                pixels.brightness(1 + light * self.brightness),
                pixels.contrast(1 + blend * self.contrast),
                pixels.saturation(1 + rich * self.saturation),
                pixels.hue(turn * self.hue),
            )
            for step in rng.permutation(4):
                matrix = pixels.then(matrix, changes[step])
        return pixels.then(matrix, pixels.saturation(0)) if gray else matrix

    def __call__(self, frame: Frame, rng: Rng) -> Frame:
        matrix = self.draw(rng)
        return frame if matrix is None else frame.painted(pixels.recolour(frame.image, matrix))


@dataclass(frozen=True)
class OneColor(Operation):
    """One of: nothing, autocontrast, equalize, solarize, saturation, contrast, brightness, sharpness, posterize.

    The colour list of Soft Teacher; the strengths are those of RandAugment (Cubuk et al., 2020): factors
    0.1 .. 1.9, solarize from level 0 .. 256, posterize to 4 .. 8 bits. `p` is the chance to do anything.
    """

    name: ClassVar[str] = "one_color"
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
            return frame.painted(pixels.recolour(image, pixels.contrast(factor)))
        if kind == 6:
            return frame.painted(pixels.recolour(image, pixels.brightness(factor)))
        if kind == 7:
            return frame.painted(tvf.adjust_sharpness(image, factor))
        return frame.painted(tvf.posterize(image, 4 + int(amount * 5)))


@dataclass(frozen=True)
class Blur(Operation):
    """Gaussian blur with probability `p`, sigma in pixels drawn from `sigma`."""

    name: ClassVar[str] = "blur"
    sigma: Range = (0.1, 2.0)
    p: float = 0.5

    @classmethod
    def limits(cls) -> dict[str, Range]:
        return {"sigma": (0.01, 50), "p": (0, 1)}

    def draw(self, rng: Rng) -> float | None:
        """A sigma, or None for no blur."""
        sigma = rng.uniform(*self.sigma)
        return sigma if rng.random() < self.p else None

    def __call__(self, frame: Frame, rng: Rng) -> Frame:
        sigma = self.draw(rng)
        return frame if sigma is None else frame.painted(pixels.blur(frame.image, sigma))


@dataclass(frozen=True)
class Erase(Operation):
    """With probability `p`, noise over one rectangle: `area` share of the image, `ratio` height over width.

    Random erasing (Zhong et al., AAAI 2020). A rectangle that does not fit is drawn again, ten times at most.
    Boxes under it stay targets.
    """

    name: ClassVar[str] = "erase"
    p: float = 0.5
    area: Range = (0.02, 0.2)
    ratio: Range = (0.3, 3.3)

    @classmethod
    def limits(cls) -> dict[str, Range]:
        return {"p": (0, 1), "area": (0.0001, 1), "ratio": (0.01, 100)}

    def draw(self, rng: Rng, height: int, width: int) -> list[Rectangle]:
        """One rectangle or none."""
        if rng.random() >= self.p:
            return []
        for _ in range(10):
            area = rng.uniform(*self.area) * height * width
            ratio = np.exp(rng.uniform(*np.log(self.ratio)))
            h, w = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
            if 0 < h < height and 0 < w < width:
                return [(int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w)]
        return []

    def __call__(self, frame: Frame, rng: Rng) -> Frame:
        image = frame.image
        for top, left, h, w in self.draw(rng, *image.shape[1:]):
            noise = np.frombuffer(bytearray(rng.bytes(3 * h * w)), np.uint8).reshape(h, w, 3)
            image = pixels.erase(image, top, left, geometry.from_hwc(noise))
        return frame.painted(image)


@dataclass(frozen=True)
class Cutout(Operation):
    """A number of grey rectangles drawn from `count`, each side up to a share `side` of the image's."""

    name: ClassVar[str] = "cutout"
    count: Range = (1, 4)
    side: float = 0.2

    @classmethod
    def limits(cls) -> dict[str, Range]:
        return {"count": (0, 100), "side": (0.001, 1)}

    def draw(self, rng: Rng, height: int, width: int) -> list[Rectangle]:
        """All rectangles."""
        rectangles = []
        for _ in range(rng.integers(int(self.count[0]), int(self.count[1]) + 1)):
            h, w = (round(side * rng.uniform(0, self.side)) for side in (height, width))
            rectangles.append((int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w))
        return rectangles

    def __call__(self, frame: Frame, rng: Rng) -> Frame:
        image = frame.image
        for top, left, h, w in self.draw(rng, *image.shape[1:]):
            image = pixels.erase(image, top, left, torch.tensor(geometry.GREY, dtype=torch.uint8).expand(3, h, w))
        return frame.painted(image)


# What `ssod.data.views.device` can do batched.
Painting = Color | Blur | Erase | Cutout
