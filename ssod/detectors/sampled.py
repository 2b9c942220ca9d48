"""Anchors and regions that a two-stage loss looks at, of all images in one row."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ssod.ops.host import true_rows


@dataclass
class Sampled:
    """Anchors or regions of all images that a loss looks at; S are drawn, and after `settle` M are left.

    what        int64 [S] anchors, or float32 [S, 4] boxes
    image       int64 [S]
    matched     int64 [S]  target, -1 = background
    use         bool [S]   False where there were too few to draw
    stride      int64 [S]  of regions the map that each is cut from, of anchors none
    foreground  int64 [F]  those with a target, after `settle`
    of_stride   int64 [n] each, those of each of `strides`, after `settle`; fg_of_stride: likewise, among `foreground`
    """

    what: Tensor
    image: Tensor
    matched: Tensor
    use: Tensor
    stride: Tensor | None = None
    foreground: Tensor = field(init=False)
    of_stride: list[Tensor] = field(init=False)
    fg_of_stride: list[Tensor] = field(init=False)

    def settle(self, other: Sampled, strides: list[int]) -> None:
        """Drop what is not used, here and there: a GPU is waited for once for both."""
        both = (self, other)
        found = iter(true_rows([mask for s in both for mask in s._masks(strides)]))
        for samples in both:
            own = [] if samples.stride is None else strides
            place, fg_place = (mask.cumsum(0) - 1 for mask in (samples.use, samples._fg()))  # [S] where each is then
            rows, fg = next(found), next(found)
            samples.foreground = place[fg]
            samples.of_stride = [place[next(found)] for _ in own]
            samples.fg_of_stride = [fg_place[next(found)] for _ in own]
            samples.what, samples.image, samples.matched = (
                t[rows] for t in (samples.what, samples.image, samples.matched)
            )

    def _masks(self, strides: list[int]) -> list[Tensor]:
        of_stride = [] if self.stride is None else [self.stride == s for s in strides]
        return [self.use, self._fg(), *(self.use & s for s in of_stride), *(self._fg() & s for s in of_stride)]

    def _fg(self) -> Tensor:
        return self.use & (self.matched >= 0)
