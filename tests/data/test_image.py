"""The decoder: right pixels from every kind of file, an ImageError from every broken one, no source changed."""

from __future__ import annotations

import errno
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssod.data import image as image_module
from ssod.data.image import ImageError, image_size, read_image

# 2 rows x 3 columns, so that no rotation or mirroring leaves it as it is
CORNERS = np.array([[[250, 0, 0], [0, 250, 0], [0, 0, 250]], [[90, 90, 0], [0, 90, 90], [90, 0, 90]]], np.uint8)

decoders = pytest.mark.parametrize("fast", [False, pytest.param(True, id="fast")])


def use(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    """With or without simplejpeg."""
    if fast:
        pytest.importorskip("simplejpeg")
    else:
        monkeypatch.setattr(image_module, "simplejpeg", None)


def blocks(pixels: np.ndarray, side: int = 16) -> np.ndarray:
    """Every pixel as a block, large enough to survive JPEG."""
    return pixels.repeat(side, axis=0).repeat(side, axis=1)


def centres(pixels: np.ndarray, side: int = 16) -> np.ndarray:
    return pixels[side // 2 :: side, side // 2 :: side].astype(int)


@decoders
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.fault(25)
def test_exif_rotation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, orientation: int, suffix: str, fast: bool
) -> None:
    use(monkeypatch, fast)
    # What EXIF says of each orientation: where row 0 and column 0 of the stored pixels are in the upright image.
    upright = {
        1: CORNERS,
        2: CORNERS[:, ::-1],
        3: CORNERS[::-1, ::-1],
        4: CORNERS[::-1],
        5: CORNERS.transpose(1, 0, 2),
        6: np.rot90(CORNERS, -1),
        7: CORNERS[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(CORNERS, 1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"rotated.{suffix}"
    Image.fromarray(blocks(CORNERS)).save(path, exif=exif, quality=95)
    if suffix == "jpg":  # the fault is there: Pillow alone hands out the pixels as they are stored
        assert np.asarray(Image.open(path)).shape == (32, 48, 3)

    pixels = read_image(path)
    assert pixels.flags.c_contiguous
    assert image_size(path) == pixels.shape[1::-1]
    assert np.abs(centres(pixels) - upright).max() <= 12


@decoders
@pytest.mark.fault(25)
def test_gray_jpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    use(monkeypatch, fast)
    path = tmp_path / "gray.jpg"
    Image.fromarray(np.full((20, 30), 77, np.uint8)).save(path)
    pixels = read_image(path)
    assert pixels.shape == (20, 30, 3)
    assert (pixels == 77).all()


def test_fast_decoder_gives_the_same_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, fast=True)
    path = tmp_path / "photo.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (61, 83, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, quality=80)
    fast = read_image(path)
    use(monkeypatch, fast=False)
    assert np.abs(fast.astype(int) - read_image(path)).max() <= 2  # two builds of one library


@pytest.mark.fault(25)
def test_16_bit_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 128, 129], [1000, 32768, 65535]], np.uint16)
    path = tmp_path / "deep.png"
    Image.fromarray(values).save(path)
    clipped = np.asarray(Image.open(path).convert("RGB"))[..., 0]
    assert (clipped[1] == 255).sum() > 1, "the fault is not there: Pillow used to clip at 255"
    assert read_image(path)[..., 0].tolist() == [[0, 0, 1], [4, 128, 255]]


def test_16_bit_colour(tmp_path: Path) -> None:
    """Pillow cannot write such a PNG, so it is written by hand: one pixel (65535, 32768, 256)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    row = b"\0" + struct.pack(">HHH", 65535, 32768, 256)
    path = tmp_path / "deep.png"
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    assert read_image(path)[0, 0].tolist() == [255, 128, 1]


def test_float_pixels_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "float.tiff"
    Image.fromarray(np.full((3, 3), 0.5, np.float32)).save(path)
    with pytest.raises(ImageError, match="no known range"):
        read_image(path)


@decoders
@pytest.mark.fault(25)
def test_cmyk_jpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    use(monkeypatch, fast)
    path = tmp_path / "print.jpg"
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(path, quality=95)
    assert Image.open(path).mode == "CMYK"
    assert np.abs(read_image(path).astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.fault(25)
def test_transparency_lies_over_white(tmp_path: Path) -> None:
    path = tmp_path / "glass.png"
    Image.fromarray(np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [0, 0, 0, 51]]], np.uint8)).save(path)
    assert read_image(path)[0].tolist() == [[200, 0, 0], [255, 255, 255], [204, 204, 204]]

    path = tmp_path / "gray_glass.png"
    Image.fromarray(np.array([[[90, 255], [90, 0]]], np.uint8)).save(path)
    assert Image.open(path).mode == "LA"
    assert read_image(path)[0].tolist() == [[90, 90, 90], [255, 255, 255]]


@pytest.mark.fault(25)
def test_palette(tmp_path: Path) -> None:
    indices = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
    indices.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    indices.save(tmp_path / "palette.png")
    indices.save(tmp_path / "hole.png", transparency=1)
    assert Image.open(tmp_path / "palette.png").mode == "P"
    assert read_image(tmp_path / "palette.png")[0].tolist() == [[10, 20, 30], [40, 50, 60], [70, 80, 90]]
    assert read_image(tmp_path / "hole.png")[0].tolist() == [[10, 20, 30], [255, 255, 255], [70, 80, 90]]


def test_black_and_white(tmp_path: Path) -> None:
    path = tmp_path / "fax.png"
    Image.fromarray(np.array([[True, False]])).save(path)
    assert Image.open(path).mode == "1"
    assert read_image(path)[0].tolist() == [[255, 255, 255], [0, 0, 0]]


@decoders
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tiff", "gif"])
@pytest.mark.fault(4)
def test_truncated_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, fast: bool) -> None:
    use(monkeypatch, fast)
    path = tmp_path / f"cut.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Exception):  # noqa: B017 - the fault is there, whatever Pillow makes of it
        Image.open(path).load()
    before = path.read_bytes()

    with pytest.raises(ImageError) as caught:
        read_image(path)
    assert caught.value.path == path
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"<html>404</html>", "not an image"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "not an image|corrupt"),
    ],
)
def test_not_an_image(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "page.jpg"
    path.write_bytes(content)
    for read in (read_image, image_size):
        with pytest.raises(ImageError, match=reason):
            read(path)
    assert path.read_bytes() == content


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's remarks on broken metadata
@pytest.mark.fault(4)
def test_flipped_bits_are_an_image_error_or_pixels(tmp_path: Path) -> None:
    """Whatever the damage: either an ImageError or an image, and nothing else escapes."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    refused = 0
    for suffix in ("jpg", "png", "webp", "bmp", "tiff", "gif"):
        path = tmp_path / f"bits.{suffix}"
        Image.fromarray(noise).save(path)
        whole = path.read_bytes()
        for _ in range(60):
            spoilt = bytearray(whole)
            for place in rng.integers(0, len(whole), 4):
                spoilt[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(spoilt)
            try:
                assert read_image(path, max_pixels=1_000_000).dtype == np.uint8
            except ImageError:
                refused += 1
    assert refused > 50


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="No such file"):
        read_image(tmp_path / "gone.jpg")
    with pytest.raises(ImageError):
        read_image(tmp_path)


def test_too_many_open_files_is_not_the_images_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_handle_left(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Image, "open", no_handle_left)
    with pytest.raises(OSError, match="Too many") as caught:
        read_image(tmp_path / "good.jpg")
    assert not isinstance(caught.value, ImageError)


def giant_png(path: Path, side: int) -> Path:
    """Some hundred bytes whose header announces side x side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", header), (b"IDAT", data), (b"IEND", b"")):
        content += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("side", [14_000, 60_000])  # Pillow warns of the one and refuses the other
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.fault(26)
def test_gigantic_image_is_refused_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: int) -> None:
    path = giant_png(tmp_path / "bomb.png", side)
    assert path.stat().st_size < 1000

    def decode(self: Image.Image) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    for read in (read_image, image_size):
        with pytest.raises(ImageError, match="its header says"):
            read(path)


def test_limit_can_be_changed(tmp_path: Path) -> None:
    path = tmp_path / "small.png"
    Image.new("RGB", (10, 10)).save(path)
    assert read_image(path, max_pixels=100).shape == (10, 10, 3)
    with pytest.raises(ImageError, match="10x10 pixels, more than the limit of 99"):
        read_image(path, max_pixels=99)


def test_size_needs_no_pixels(tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    assert image_size(path) == (300, 200)


def test_broken_exif_does_not_spoil_the_image(tmp_path: Path) -> None:
    path = tmp_path / "exif.jpg"
    Image.new("RGB", (30, 20), (9, 9, 9)).save(path, exif=b"Exif\0\0" + b"\xff" * 30)
    assert image_size(path) == (30, 20)
    assert read_image(path).shape == (20, 30, 3)


def test_error_survives_the_way_from_a_worker() -> None:
    error = pickle.loads(pickle.dumps(ImageError("a b/ö.jpg", "cut")))
    assert (error.path, error.reason, str(error)) == (Path("a b/ö.jpg"), "cut", "a b/ö.jpg: cut")


@pytest.mark.fault(24)
def test_spaces_and_unicode_in_the_path(tmp_path: Path) -> None:
    path = tmp_path / "ein Bild" / "рыба 魚.png"
    path.parent.mkdir()
    Image.fromarray(CORNERS).save(path)
    assert (read_image(path) == CORNERS).all()
    assert (read_image(str(path)) == CORNERS).all()
