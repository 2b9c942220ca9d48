"""The drawn demo set: the same bytes everywhere, long-tailed, sizes as promised, boxes where the shapes are."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import numpy as np
import pytest

from ssod.data import shapes
from ssod.data.annotations.sources import load_data
from ssod.data.shapes import NAMES, SIZE, draw_image, shapes_yaml


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "COUNTS", {"train": 6, "val": 3})


def digest(folder: Path) -> str:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return hashlib.sha256(b"".join(p.name.encode() + p.read_bytes() for p in files)).hexdigest()


def test_drawing_is_seeded_and_done_once(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = shapes_yaml(tmp_path / "a"), shapes_yaml(tmp_path / "b")
    assert digest(a.parent) == digest(b.parent)
    assert list((tmp_path / "a").iterdir()) == [a.parent], "nothing else is left in the cache"
    monkeypatch.setattr(shapes, "draw_image", None)  # a second call that drew again would fail
    assert shapes_yaml(tmp_path / "a") == a
    assert [len(load_data(a, split)) for split in ("train", "val")] == [6, 3]
    assert load_data(a, "train").names == list(NAMES)


def test_two_processes_at_once_and_an_interrupted_one(small: None, tmp_path: Path) -> None:
    (tmp_path / f"shapes-{shapes.VERSION}").mkdir()  # what a foreign or interrupted writer left: no shapes.yaml in it
    (tmp_path / f"shapes-{shapes.VERSION}" / "rest").write_text("x")
    first = shapes_yaml(tmp_path)
    assert first.is_file()
    threads = [threading.Thread(target=shapes_yaml, args=(tmp_path / "both",)) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert digest(tmp_path / "both" / f"shapes-{shapes.VERSION}") == digest(first.parent)


def test_classes_have_a_long_tail_and_sizes_span_what_is_promised() -> None:
    counts, sides = np.zeros(len(NAMES)), []
    for index in range(300):
        picture, boxes, labels = draw_image(np.random.default_rng([5, index]))
        assert picture.shape == (SIZE, SIZE, 3)
        assert (boxes >= 0).all()
        assert (boxes <= SIZE).all()
        counts += np.bincount(labels, minlength=len(NAMES))
        sides += (boxes[:, 2:] - boxes[:, :2]).max(1).tolist()
    assert (np.diff(counts[[0, 1, 2, 3, 5]]) < 0).all(), counts  # 12 % and 8 % are close
    assert counts[0] > 6 * counts[-1] > 0
    share = np.array(sides) / SIZE
    assert 0.03 <= share.min() < 0.07
    assert 0.45 < share.max() <= 0.66
    assert 0.1 < np.median(share) < 0.3


def test_boxes_hold_their_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Painted white on black, without noise, clutter and background, every white pixel lies in a box and touches it."""
    monkeypatch.setattr(shapes, "_background", lambda rng, side: np.zeros((side, side, 3), np.uint8))
    monkeypatch.setattr(shapes, "_clutter", lambda rng, picture: np.zeros(picture.shape[:2], bool))
    monkeypatch.setattr(shapes, "HIDDEN", 1.0)

    def white(rng: np.random.Generator, picture: np.ndarray, mask: np.ndarray, label: int) -> None:
        picture[mask] = 255

    monkeypatch.setattr(shapes, "_paint", white)
    for index in range(20):
        picture, boxes, _ = draw_image(np.random.default_rng([6, index]))
        inside = np.zeros((SIZE, SIZE), bool)
        for x1, y1, x2, y2 in boxes:
            inside[int(y1) : int(np.ceil(y2)), int(x1) : int(np.ceil(x2))] = True
        outside = (picture.max(2) > 128) & ~inside
        assert outside.sum() <= 20, "only specks below 3 % of the side may be white outside the boxes"
        assert (picture.max(2) > 128)[inside].mean() > 0.2
