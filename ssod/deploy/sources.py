"""Everything `predict` takes becomes pictures: a name each, and pixels once they are asked for. Needs no torch."""

from __future__ import annotations

import glob
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from PIL import Image, ImageOps

from ssod.data.annotations.listing import is_glob, iter_images
from ssod.data.image import ImageError, read_image
from ssod.deploy.url import check_url, fetch_image, is_url, name_of
from ssod.deploy.video import VideoFrame, is_video, read_video, read_webcam
from ssod.errors import UserError

if TYPE_CHECKING:
    import torch

Source: TypeAlias = "str | Path | int | np.ndarray | Image.Image | torch.Tensor | Sequence[Any] | Iterator[Any]"

_IN_PNG = ("1", "L", "LA", "I", "I;16", "P", "RGBA")  # what a PNG holds without loss, beside RGB
_TAKEN = (
    "a path, a folder, a glob, an https URL, a video, the number of a webcam, an array uint8 [height, width, 3], a "
    "tensor [3, height, width], a Pillow image, or a list of these"
)


@dataclass(frozen=True)
class Picture:
    """One image.

    path    the file, or a made-up name
    pixels  uint8 [H, W, 3] RGB of what is in memory, else None
    url     where it is to be had, of an image from the web
    frame   of a video's or webcam's image
    flaw    why there are no pixels, of what is known to be unreadable
    """

    path: Path
    pixels: np.ndarray | None = None
    url: str | None = None
    frame: VideoFrame | None = None
    flaw: str | None = None

    @property
    def name(self) -> str:
        """What the user calls it."""
        return self.url or str(self.path)

    @property
    def in_file(self) -> bool:
        """Whether its pixels can be read again at any time."""
        return self.pixels is None and self.url is None

    def read(self) -> np.ndarray:
        """uint8 [H, W, 3] RGB, upright. Raises ImageError."""
        if self.flaw is not None:
            raise ImageError(self.path, self.flaw)
        if self.pixels is not None:
            return self.pixels
        return read_image(self.path) if self.url is None else fetch_image(self.url)


def pictures(source: Source, bgr: bool = False) -> Iterator[Picture]:
    """Pictures of a source, one after the other, in its order.

    source  an image file, a folder of images, a text list, a glob; an https URL of an image; a video file, a glob of
            videos; a number: that webcam; an array uint8 [H, W, 3] RGB; a torch tensor [3, H, W] or [B, 3, H, W], RGB,
            uint8 or float 0..1; a Pillow image; a list, tuple or iterator of these
    bgr     arrays are BGR, as OpenCV reads them

    What is no more than a name is looked at only when its turn comes. A video is one picture a frame; where it cannot
    be read to its end, the last one has a `flaw`.
    Raises UserError for what is none of them and where a source holds no image.
    """
    if isinstance(source, list | tuple):
        for part in source:  # a mistyped name is told before anything is computed
            if isinstance(part, str | Path) and not is_url(str(part)) and not is_video(part):
                next(iter_images(part))
    number = -1
    for number, picture in enumerate(_pictures(source, bgr)):
        named = picture.pixels is None or picture.frame is not None
        yield picture if named else replace(picture, path=Path(f"image{number}.jpg"))
    if number < 0:
        raise UserError("source is an empty list. Give it an image.")


def is_live(source: Source) -> bool:
    """Whether the source is, or holds, the number of a webcam, which never ends."""
    if isinstance(source, list | tuple):
        return any(map(is_live, source))
    return isinstance(source, int) and not isinstance(source, bool)


def _pictures(source: Source, bgr: bool) -> Iterator[Picture]:
    torch = sys.modules.get("torch")  # who has a tensor has loaded it
    if isinstance(source, str | Path):
        yield from _named(source)
    elif isinstance(source, int) and is_live(source):
        yield from _framed(Path(f"webcam{source}"), read_webcam(source))
    elif isinstance(source, np.ndarray):
        checked = _checked(source)
        yield Picture(Path(), np.ascontiguousarray(checked[..., ::-1]) if bgr else checked)
    elif isinstance(source, Image.Image):
        yield Picture(Path(), _of_pillow(source))
    elif torch is not None and isinstance(source, torch.Tensor):
        for pixels in _of_tensor(source):
            yield Picture(Path(), pixels)
    elif isinstance(source, list | tuple | Iterator):
        for part in source:
            yield from _pictures(part, bgr)
    else:
        raise UserError(f"source is a {type(source).__name__}. Give {_TAKEN}.")


def _named(source: str | Path) -> Iterator[Picture]:
    if is_url(str(source)):
        check_url(str(source))
        yield Picture(Path(name_of(str(source))), url=str(source))
    elif is_video(source):
        path = Path(source).expanduser()
        several = is_glob(str(path)) and not path.exists()
        found = sorted(map(Path, glob.glob(str(path), recursive=True))) if several else [path]
        if not found:
            raise UserError(f"{source}: no video there.")
        for video in found:
            yield from _framed(video, read_video(video))
    else:
        for path in iter_images(source):
            yield Picture(path)


def _framed(path: Path, frames: Iterator[tuple[VideoFrame, np.ndarray]]) -> Iterator[Picture]:
    try:
        for frame, pixels in frames:
            yield Picture(path, pixels, frame=frame)
    except ImageError as error:
        yield Picture(path, flaw=error.reason)


def _checked(array: np.ndarray) -> np.ndarray:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        way_out = " Give several images as a list." if array.ndim == 4 else ""
        raise UserError(
            f"source is an array {array.dtype} {list(array.shape)}; an image is uint8 [height, width, 3], RGB.{way_out}"
        )
    return array


def _of_tensor(tensor: torch.Tensor) -> Iterator[np.ndarray]:
    """uint8 [H, W, 3] of each image of a tensor: exactly the pixels that were divided by 255 to make it."""
    import torch

    images = tensor.detach() if tensor.dim() == 4 else tensor.detach()[None]
    if images.dim() != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise UserError(
            f"source is a tensor {list(tensor.shape)}; images are [3, height, width] or [batch, 3, height, width], RGB."
        )
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise UserError(f"source is a tensor {tensor.dtype}; images are uint8 0 .. 255 or float 0 .. 1.")
    for image in images:
        if image.is_floating_point():
            low, high = image.aminmax()
            if not (low >= 0 and high <= 1):
                raise UserError(
                    f"source is a tensor with values {low:g} .. {high:g}; float images are 0 .. 1, not normalised."
                )
            image = (image.float() * 255).round().to(torch.uint8)
        yield np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy())


def _of_pillow(image: Image.Image) -> np.ndarray:
    """Pixels as `read_image` would give them of the file this image came from."""
    image = ImageOps.exif_transpose(image)
    if image.mode in _IN_PNG:  # the one decoder knows what to do about transparency and 16 bit
        file = BytesIO()
        image.save(file, "PNG", compress_level=1)
        return read_image("the Pillow image", stream=file)
    return np.asarray(image.convert("RGB"))
