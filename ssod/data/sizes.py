"""Which size an image is brought to before a network sees it. Needs no torch: exported models use it, too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Size = int | Sequence[int]  # what `imgsz=` says: a long side, or (short, long)


def sides(imgsz: Size) -> tuple[int, int]:
    """(long, short) limits in pixels of what `imgsz=` says: 640, or [800, 1333] for short and long; 0 = no limit."""
    return (imgsz, 0) if isinstance(imgsz, int) else (imgsz[-1], imgsz[0] if len(imgsz) == 2 else 0)


def fitted(height: int, width: int, long_side: int, short_side: int = 0) -> tuple[int, int]:
    """(h, w) of an image resized, ratio kept, to the largest size whose sides keep the limits; 0 = no limit."""
    ratio = long_side / max(height, width)
    if short_side:
        ratio = min(ratio, short_side / min(height, width))
    return scaled(height, width, ratio)


def scaled(height: int, width: int, ratio: float) -> tuple[int, int]:
    return max(1, round(height * ratio)), max(1, round(width * ratio))


@dataclass(frozen=True)
class Fit:
    """How images are resized, ratio kept, and padded.

    imgsz     long side in pixels, or [short, long]
    multiple  what the sides of the padded image are multiples of
    frame     (H, W) pixels where the input is fixed: images become as large as fits in it; imgsz says nothing then
    """

    imgsz: Size
    multiple: int = 32
    frame: tuple[int, int] | None = None

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) that an image of height x width is resized to."""
        if self.frame is not None:
            return scaled(height, width, min(self.frame[0] / height, self.frame[1] / width))
        return fitted(height, width, *sides(self.imgsz))

    def padded(self, height: int, width: int) -> tuple[int, int]:
        """(H, W) that a resized image of height x width is padded to."""
        if self.frame is not None:
            return self.frame
        return -(-height // self.multiple) * self.multiple, -(-width // self.multiple) * self.multiple
