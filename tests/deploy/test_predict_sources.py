"""Everything `predict` takes becomes the same pixels, under a name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ssod.data.image import ImageError, read_image
from ssod.deploy.sources import is_live, pictures
from ssod.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 255, (30, 20, 3), dtype=np.uint8)


def test_files_and_what_is_in_memory_mix_in_their_order(tmp_path: Path) -> None:
    for name in ("b.png", "a.png"):
        Image.fromarray(PIXELS).save(tmp_path / name)
    found = list(pictures([PIXELS, tmp_path, (Image.fromarray(PIXELS), str(tmp_path / "b.png"))]))
    assert [p.path.name for p in found] == ["image0.jpg", "a.png", "b.png", "image3.jpg", "b.png"]
    for picture in found:
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
    assert picture.read().shape == (20, 30, 3)
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
        ([PIXELS, 3.0], "source is a float"),
        (True, "source is a bool"),
        (torch.zeros(3, 3, 20, 30, dtype=torch.int64), r"tensor torch.int64; images are uint8 0 .. 255 or float"),
        (torch.zeros(30, 20, 3), r"tensor \[30, 20, 3\]; images are \[3, height, width\]"),
        (torch.full((3, 8, 8), 2.0), r"values 2 .. 2; float images are 0 .. 1"),
        (torch.full((3, 8, 8), torch.nan), r"values nan .. nan"),
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
        picture.read()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_a_tensor_gives_back_the_pixels_it_was_made_of(dtype: torch.dtype) -> None:
    every = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)  # all values there are
    planes = torch.from_numpy(every).permute(2, 0, 1)
    tensor = planes if dtype == torch.uint8 else planes.to(dtype) / 255
    for picture in pictures([tensor, torch.stack([tensor, tensor])]):
        np.testing.assert_array_equal(picture.read(), every)
    assert [p.path.name for p in pictures(torch.stack([tensor, tensor]))] == ["image0.jpg", "image1.jpg"]


def test_arrays_may_be_bgr_and_nothing_else_is(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "x.png")
    tensor = torch.from_numpy(PIXELS).permute(2, 0, 1)
    for picture in pictures([PIXELS[..., ::-1], tmp_path / "x.png", Image.fromarray(PIXELS), tensor], bgr=True):
        np.testing.assert_array_equal(picture.read(), PIXELS)


def test_an_iterator_is_taken_as_it_comes() -> None:
    given: list[int] = []

    def camera() -> Any:
        for number in range(5):
            given.append(number)
            yield PIXELS

    found = pictures(camera())
    next(found)
    assert given == [0]
    assert len(list(found)) == 4


def test_a_mistyped_name_in_a_list_is_told_before_the_first_picture(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "x.png")
    with pytest.raises(UserError, match=r"y\.png: no image there"):
        next(pictures([tmp_path / "x.png", tmp_path / "y.png"]))


def test_webcams_are_numbers() -> None:
    assert [is_live(s) for s in (0, [PIXELS, 1], True, "0", [PIXELS])] == [True, True, False, False, False]
