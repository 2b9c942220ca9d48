"""Everything `predict` takes becomes the same pixels, under a name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ssod.data.image import ImageError, read_image
from ssod.deploy.sources import pictures
from ssod.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 255, (30, 20, 3), dtype=np.uint8)


def test_files_and_what_is_in_memory_mix_in_their_order(tmp_path: Path) -> None:
    for name in ("b.png", "a.png"):
        Image.fromarray(PIXELS).save(tmp_path / name)
    found = list(pictures([PIXELS, tmp_path, (Image.fromarray(PIXELS), str(tmp_path / "b.png"))]))
    assert [p.path.name for p in found] == ["image0.jpg", "a.png", "b.png", "image3.jpg", "b.png"]
    for picture in found:
        assert picture.shape() == (30, 20)
        np.testing.assert_array_equal(picture.read(), PIXELS)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16", "CMYK"])
def test_a_pillow_image_is_what_its_file_would_be(mode: str, tmp_path: Path) -> None:
    image = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 200) if mode == "I;16" else Image.fromarray(PIXELS)
    image = image if mode == "I;16" else image.convert(mode)
    if mode == "RGBA":
        image.putalpha(100)
    file = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image.save(file)
    (picture,) = pictures(image)
    np.testing.assert_array_equal(picture.read(), read_image(file))


def test_a_pillow_image_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS).save(tmp_path / "x.png", exif=exif)
    (picture,) = pictures(Image.open(tmp_path / "x.png"))
    assert picture.shape() == (20, 30)
    np.testing.assert_array_equal(picture.read(), read_image(tmp_path / "x.png"))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (PIXELS / 255, r"float64 \[30, 20, 3\]; an image is uint8 \[height, width, 3\], RGB\.$"),
        (PIXELS[..., 0], r"uint8 \[30, 20\]"),
        (PIXELS[:0], r"uint8 \[0, 20, 3\]"),
        (PIXELS[None], "Give several images as a list"),
        ([], "empty list"),
        (None, "source is a NoneType"),
        ([PIXELS, 3], "source is a int"),
        ("nowhere/*.jpg", "no image there"),
    ],
)
def test_what_is_no_image(source: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        list(pictures(source))


def test_a_broken_file_is_found_out_when_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"nothing of the kind")
    (picture,) = pictures(tmp_path / "x.png")
    with pytest.raises(ImageError, match="not an image"):
        picture.shape()
