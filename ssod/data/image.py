"""The one decoder: a file becomes uint8 RGB pixels, the same for training, evaluation and prediction.

What a file may hold, and what comes out:
- EXIF orientation is applied, so width and height are those a viewer shows; annotations refer to that frame.
- Transparency (RGBA, LA, a transparent palette colour) is laid over white, as most viewers show it.
- 16-bit pixels are scaled from the full range 0..65535 to 0..255, never clipped.
- Of an animation or a multi-page file, the first frame.
- A truncated or corrupt file is an ImageError; no gray filler is ever invented for the missing part.
Files are only read, never written.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from ssod.errors import UserError

try:  # five times as fast on JPEG; part of the extra `fast`
    import simplejpeg
except ImportError:
    simplejpeg = None

MAX_PIXELS = 178_000_000  # 534 MB as RGB, and just below the size at which Pillow itself refuses

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})

# Only these decoders may run: Pillow has others that start programs (EPS) or read rare, little tested formats.
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")

_ORIENTATION_TAG = 0x0112
_SWAPS_SIDES = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
_SYSTEM_TROUBLE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # not the image's fault: never blamed on it


class ImageError(UserError):
    """An image that cannot be used: `path` says which, `reason` why."""

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(f"{os.fspath(path)}: {reason}")
        self.path = Path(path)
        self.reason = reason

    def __reduce__(self) -> tuple[type[ImageError], tuple[Path, str]]:
        # Loader workers send it to the main process; the default would call ImageError with the message alone.
        return ImageError, (self.path, self.reason)


def read_image(
    path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS, stream: BinaryIO | None = None
) -> np.ndarray:
    """Decode an image file into uint8 [H, W, 3], RGB, upright (EXIF orientation applied), C-contiguous.

    Raises ImageError when the file is missing, truncated, corrupt, of an unsupported kind, or when its header
    announces more than `max_pixels` pixels; that is decided before any pixel is decoded.
    With `stream` its bytes are decoded, and `path` only says which image they are of.
    """
    with _opened(path, max_pixels, stream) as image:
        orientation = _orientation(image)
        pixels = _decode_jpeg_fast(image)
        if pixels is None:
            image.load()
            if image.format == "TIFF":  # Pillow turns TIFF by itself; what is left to do is known after loading
                orientation = _orientation(image)
            pixels = _to_rgb(image)
    return np.ascontiguousarray(_upright(pixels, orientation))


def image_size(
    path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS, stream: BinaryIO | None = None
) -> tuple[int, int]:
    """(width, height) in pixels after EXIF rotation, from the header alone; raises ImageError like `read_image`.

    A file whose header is sound but whose pixels are cut off passes here and fails in `read_image`.
    """
    with _opened(path, max_pixels, stream) as image:
        width, height = image.size
        if image.format == "TIFF":  # for these, what `size` means under a rotation depends on Pillow's version
            width, height = image.tag_v2[256], image.tag_v2[257]  # type: ignore[attr-defined]
        if _orientation(image) in _SWAPS_SIDES:
            width, height = height, width
    return width, height


def image_traits(path: str | os.PathLike[str], stream: BinaryIO | None = None) -> list[str]:
    """What is out of the ordinary about an image file, from its header: any of "EXIF rotation", "gray", "16-bit",
    "CMYK", "palette", "transparency", "several frames". Raises ImageError like `read_image`."""
    with _opened(path, MAX_PIXELS, stream) as image:
        deep = image.mode in ("I", "F") or image.mode.startswith("I;16")
        told = {
            "EXIF rotation": _orientation(image) != 1,
            "16-bit": deep,
            "gray": image.mode in ("1", "L", "LA"),
            "CMYK": image.mode == "CMYK",
            "palette": image.mode in ("P", "PA"),
            "transparency": image.has_transparency_data,
            "several frames": image.format in ("GIF", "PNG", "WEBP", "TIFF") and getattr(image, "is_animated", False),
        }
    return [trait for trait, present in told.items() if present]


@contextmanager
def _opened(path: str | os.PathLike[str], max_pixels: int, stream: BinaryIO | None = None) -> Iterator[Image.Image]:
    """A Pillow image with only its header read, size checked; every failure inside becomes an ImageError."""
    try:
        with Image.open(path if stream is None else stream, formats=_FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(path, f"its header says {width}x{height} pixels, more than the limit of {max_pixels}")
            yield image
    except (ImageError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(path, f"its header says more pixels than the limit of {max_pixels}") from error
    except Image.UnidentifiedImageError as error:
        empty = (os.path.getsize(path) if stream is None else stream.seek(0, os.SEEK_END)) == 0
        reason = "the file is empty" if empty else "not an image, or of an unsupported kind"
        raise ImageError(path, reason) from error
    except OSError as error:
        if error.errno in _SYSTEM_TROUBLE:
            raise
        raise ImageError(path, error.strerror or str(error)) from error
    except Exception as error:  # on broken bytes Pillow's decoders raise nearly anything (struct.error, KeyError, ...)
        raise ImageError(path, f"corrupt image ({type(error).__name__}: {error})") from error


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8; 1 when absent or unreadable: a damaged EXIF block does not make good pixels bad."""
    try:
        # Not image.getexif(): for PNG it would decode all pixels to search for EXIF behind them.
        value = Image.Image.getexif(image).get(_ORIENTATION_TAG, 1)
    except Exception:  # the EXIF parser, too, raises nearly anything on broken bytes
        return 1
    return value if value in range(1, 9) else 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn and mirror [H, W, 3] as the EXIF orientation asks."""
    if orientation in _SWAPS_SIDES:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _decode_jpeg_fast(image: Image.Image) -> np.ndarray | None:
    """RGB pixels of an ordinary JPEG through libjpeg-turbo, or None: then Pillow decides, also whether it is broken."""
    if simplejpeg is None or image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
        return None
    file = image.fp  # type: ignore[attr-defined]
    here = file.tell()
    file.seek(0)
    data = file.read()
    file.seek(here)
    try:
        return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=False, fastupsample=False)
    except ValueError:
        return None


def _to_rgb(image: Image.Image) -> np.ndarray:
    """Pixels of a loaded image of any mode as uint8 [H, W, 3]."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        gray = _scale_16_bit(np.asarray(image))
        return np.repeat(gray[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return np.asarray(image.convert("RGB"))


def _scale_16_bit(values: np.ndarray) -> np.ndarray:
    """0..65535 -> 0..255, rounded. Deeper pixels (float, 32-bit) have no agreed range, so they are refused."""
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"{values.dtype} pixels have no known range; convert the image to 8 or 16 bit")
    return ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
