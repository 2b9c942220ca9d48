"""Everything `predict` takes becomes pictures: a name each, and pixels once they are asked for. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ssod.data.annotations.listing import iter_images
from ssod.data.image import image_size, read_image
from ssod.errors import UserError

Source = str | Path | np.ndarray | Image.Image | Sequence[Any]

_IN_PNG = ("1", "L", "LA", "I", "I;16", "P", "RGBA")  # what a PNG holds without loss, beside RGB


@dataclass(frozen=True)
class Picture:
    """One image. path: the file, or a made-up name of one in memory; pixels: uint8 [H, W, 3] RGB, None of a file."""

    path: Path
    pixels: np.ndarray | None = None

    def shape(self) -> tuple[int, int]:
        """(height, width) upright, of a file from its header alone. Raises ImageError."""
        if self.pixels is not None:
            return self.pixels.shape[0], self.pixels.shape[1]
        width, height = image_size(self.path)
        return height, width

    def read(self) -> np.ndarray:
        """uint8 [H, W, 3] RGB, upright. Raises ImageError."""
        return read_image(self.path) if self.pixels is None else self.pixels


def pictures(source: Source) -> Iterator[Picture]:
    """Pictures of an image file, a folder, a text list, a glob, an array uint8 [H, W, 3] RGB, a Pillow image, or of a
    list of these, in their order.

    Raises UserError for what is none of them and where a source holds no image.
    """
    number = -1
    for number, picture in enumerate(_pictures(source)):
        yield picture if picture.pixels is None else Picture(Path(f"image{number}.jpg"), picture.pixels)
    if number < 0:
        raise UserError("source is an empty list. Give it an image.")


def _pictures(source: Source) -> Iterator[Picture]:
    if isinstance(source, str | Path):
        for path in iter_images(source):
            yield Picture(path)
    elif isinstance(source, np.ndarray):
        yield Picture(Path(), _checked(source))
    elif isinstance(source, Image.Image):
        yield Picture(Path(), _of_pillow(source))
    elif isinstance(source, list | tuple):
        for part in source:
            yield from _pictures(part)
    else:
        raise UserError(
            f"source is a {type(source).__name__}. Give a path, a folder, a glob, an array uint8 [height, width, 3] "
            "RGB, a Pillow image, or a list of these."
        )


def _checked(array: np.ndarray) -> np.ndarray:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        way_out = " Give several images as a list." if array.ndim == 4 else ""
        raise UserError(
            f"source is an array {array.dtype} {list(array.shape)}; an image is uint8 [height, width, 3], RGB.{way_out}"
        )
    return array


def _of_pillow(image: Image.Image) -> np.ndarray:
    """Pixels as `read_image` would give them of the file this image came from."""
    image = ImageOps.exif_transpose(image)
    if image.mode in _IN_PNG:  # the one decoder knows what to do about transparency and 16 bit
        file = BytesIO()
        image.save(file, "PNG", compress_level=1)
        return read_image("the Pillow image", stream=file)
    return np.asarray(image.convert("RGB"))
