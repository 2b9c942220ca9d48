"""What every operation of a view has in common: the frame it works on, its ranges, its draws.

An operation is a small frozen record of its ranges; the class docstring is its entry in the manual, its first
field is what `{name: value}` sets. The kinds: `geometric` (moves pixels and the matrix), `photometric` (changes
pixels only), `mixing` (makes one source image of several). All draws come from the generator that is passed in,
so a view depends on nothing but its seed.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np
from torch import Tensor

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
class Ranged:
    """A record that checks its fields when it is made, from `limits`: {field: (lowest, highest)}."""

    name: ClassVar[str]

    @classmethod
    def limits(cls) -> dict[str, Range]:
        raise NotImplementedError

    def __post_init__(self) -> None:
        for field in fields(self):
            value, (low, high) = getattr(self, field.name), self.limits()[field.name]
            numbers = value if isinstance(value, tuple) else (value,)
            key = f"{self.name}.{field.name}"
            if isinstance(field.default, tuple) and (len(numbers) != 2 or not isinstance(value, tuple)):
                raise UserError(f"{key} must be a range [low, high], got {value!r}.")
            if not isinstance(field.default, tuple) and isinstance(value, tuple):
                raise UserError(f"{key} must be one number, got {list(value)}.")
            if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in numbers):
                raise UserError(f"{key} must be a number, got {value!r}.")
            if not all(low <= v <= high for v in numbers) or list(numbers) != sorted(numbers):
                raise UserError(f"{key} must lie in {low:g} .. {high:g}, got {value!r}.")


@dataclass(frozen=True)
class Operation(Ranged):
    """Base of what turns one frame into another."""

    def __call__(self, frame: Frame, rng: Rng) -> Frame:
        raise NotImplementedError
