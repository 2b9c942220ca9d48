"""Near-duplicates against a brute-force search, and what the looks of an image survive."""

from __future__ import annotations

import io
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from ssod.data.check.duplicates import NEAR, Fingerprint, find_overlaps, fingerprint, nearest
from ssod.data.shapes import draw_image


def looks(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, (count, 4), dtype=np.uint64)


def flipped(look: np.ndarray, bits: int, rng: np.random.Generator) -> np.ndarray:
    unpacked = np.unpackbits(look.view(np.uint8))
    unpacked[rng.choice(256, bits, replace=False)] ^= 1
    return np.packbits(unpacked).view(np.uint64)


def brute(hashes: np.ndarray, member: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    apart = np.bitwise_count(hashes[:, None] ^ hashes[None]).sum(axis=2, dtype=np.int64)
    np.fill_diagonal(apart, 999)
    distance, other = np.full(member.shape, 257), np.full(member.shape, -1)
    for s in range(member.shape[1]):
        inside = np.flatnonzero(member[:, s])
        best = inside[apart[:, inside].argmin(axis=1)]
        close = apart[np.arange(len(hashes)), best] <= NEAR
        distance[close, s], other[close, s] = apart[np.arange(len(hashes)), best][close], best[close]
    return distance, other


def test_the_bands_find_what_comparing_all_with_all_finds() -> None:
    rng = np.random.default_rng(0)
    hashes = looks(600, seed=1)
    for k in range(0, 500, 2):
        hashes[k + 1] = flipped(hashes[k], rng.integers(0, 21), rng)  # below 21 bits no pair may be missed
    hashes[500:503] = hashes[499]
    member = rng.random((600, 2)) < 0.7
    for got, wanted in zip(nearest(hashes, member), brute(hashes, member), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_pairs_at_the_limit_are_rarely_missed_and_none_beyond_is_told() -> None:
    rng = np.random.default_rng(2)
    base = looks(2000, seed=3)
    everyone = np.ones((4000, 1), np.bool_)
    at_limit = np.concatenate([base, np.stack([flipped(b, NEAR, rng) for b in base])])
    found = nearest(at_limit, everyone)[0][:2000, 0] == NEAR
    assert found.mean() > 0.98
    beyond = np.concatenate([base, np.stack([flipped(b, NEAR + 1, rng) for b in base])])
    assert (nearest(beyond, everyone)[1] == -1).all()


def test_a_hundred_thousand_images_take_seconds() -> None:
    """Comparing all with all would be 5 billion pairs."""
    hashes = looks(100_000, seed=6)
    hashes[99_999] = flipped(hashes[0], 10, np.random.default_rng(7))
    start = time.process_time()
    distance, other = nearest(hashes, np.ones((100_000, 1), np.bool_))
    assert time.process_time() - start < 20
    assert (distance[0, 0], other[0, 0], other[99_999, 0]) == (10, 99_999, 0)
    assert (other >= 0).sum() == 2


def test_a_film_of_a_still_scene_is_bounded_and_every_frame_finds_another() -> None:
    rng = np.random.default_rng(8)
    frames = np.stack([flipped(looks(1, seed=9)[0], 2, rng) for _ in range(2500)])
    distance, other = nearest(frames, np.ones((2500, 1), np.bool_))
    assert (distance <= 4).all()
    assert (other != np.arange(2500)[:, None]).all()


def scene(seed: int) -> Image.Image:
    return Image.fromarray(draw_image(np.random.default_rng(seed))[0]).resize((320, 320), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def bits(a: Image.Image, b: Image.Image) -> int:
    prints = [fingerprint(np.asarray(image.convert("RGB")), looks=True) for image in (a, b)]
    assert prints[0].content != prints[1].content
    assert prints[0].looks is not None
    assert prints[1].looks is not None
    return int(np.bitwise_count(prints[0].looks ^ prints[1].looks).sum())


@pytest.mark.parametrize("seed", range(5))
def test_looks_survive_saving_shrinking_and_blur_but_tell_scenes_apart(seed: int) -> None:
    image = scene(seed)
    for other in (
        jpeg(image, 40),
        image.resize((150, 170)),
        image.filter(ImageFilter.GaussianBlur(2)),
        image.convert("L"),
    ):
        assert bits(image, other) <= NEAR
    assert bits(image, scene(seed + 100)) > 2 * NEAR


def test_overlaps_between_and_inside_of_splits() -> None:
    rng = np.random.default_rng(4)
    a, b, c, d = looks(4, seed=5)

    def entry(name: str, look: np.ndarray, content: str) -> tuple[Path, Fingerprint]:
        return Path(name), Fingerprint(content.encode(), look)

    splits = {
        "train": [entry("t1", a, "a"), entry("t2", b, "b"), entry("t3", a, "a")],
        "unlabeled": [entry("u1", flipped(b, 5, rng), "b'"), entry("u2", b, "b")],
        "val": [entry("v1", a, "a"), entry("v2", flipped(b, 9, rng), "b''"), entry("v3", c, "c")],
        "test": [entry("x1", d, "d")],
    }
    found = {(o.a, o.b, o.near): sorted((x.name, y.name) for x, y in o.pairs) for o in find_overlaps(splits)}
    assert found == {
        ("train", "train", False): [("t1", "t3")],
        ("train", "unlabeled", False): [("t2", "u2")],
        ("train", "val", False): [("t1", "v1")],
        ("train", "unlabeled", True): [("t2", "u1")],
        ("unlabeled", "unlabeled", True): [("u2", "u1")],
        ("train", "val", True): [("t2", "v2")],
        ("unlabeled", "val", True): [("u2", "v2")],
    }
    spoilt = {(o.a, o.b) for o in find_overlaps(splits) if o.spoils}
    assert spoilt == {("train", "val"), ("unlabeled", "val")}
