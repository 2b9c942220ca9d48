"""`ssod check`: right numbers, every flaw named, overlaps found by content, nothing written to the data."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_sets import CocoFolder, YoloFolder, picture

from ssod.data.doctor import check_data, draw_samples
from ssod.data.draw import class_color
from ssod.data.samples import BOX_DROPPED, IMAGE_UNREADABLE, count_problems
from ssod.data.sources import load_data
from ssod.errors import UserError


@pytest.fixture
def three_splits(yolo_folder: YoloFolder) -> YoloFolder:
    """train a, b, c; val d; unlabeled e: all different images."""
    root = yolo_folder.root
    picture(root / "images" / "val" / "d.png", seed=10)
    (root / "labels" / "val").mkdir()
    (root / "labels" / "val" / "d.txt").write_text("0 0.5 0.5 0.5 0.5")
    picture(root / "pool" / "e.png", seed=11)
    yolo_folder.yaml.write_text("train: images/train\nval: images/val\nunlabeled: pool\nnames: [carp, pike]\n")
    return yolo_folder


@pytest.mark.parametrize("decode", [True, False])
def test_sound_data(three_splits: YoloFolder, decode: bool) -> None:
    before = {p: p.stat().st_mtime_ns for p in three_splits.root.rglob("*")}
    report = check_data(three_splits.yaml, decode=decode)
    assert report.ok
    assert report.names == ["carp", "pike"]
    assert {s: len(r.dataset) for s, r in report.splits.items()} == {"train": 3, "unlabeled": 1, "val": 1}
    assert report.splits["train"].counts.tolist() == [2, 1]
    assert np.allclose(report.splits["train"].sides, np.sqrt(10 * 6))
    text = report.text()
    assert "OK: " + ("5 of 5 images decoded" if decode else "headers of 5 images read") in text
    assert "no problem, no image in two splits" in text
    assert {p: p.stat().st_mtime_ns for p in three_splits.root.rglob("*")} == before


def test_numbers_in_the_text(three_splits: YoloFolder) -> None:
    lines = check_data(three_splits.yaml).text().splitlines()
    rows = {line.split("  ")[0]: line.split() for line in lines if line and not line.startswith(" ")}
    assert rows["images"] == ["images", "3", "1", "1"]
    assert rows["boxes"] == ["boxes", "3", "-", "1"]
    assert rows["0 carp"] == ["0", "carp", "2", "(67", "%)", "1", "(100", "%)"]
    table = [line for line in lines if line.startswith(("images", "boxes", "format"))]
    assert len({len(line) for line in table}) == 1, "columns are aligned"


def test_truncated_image_is_found_by_decoding_only(three_splits: YoloFolder) -> None:
    path = three_splits.root / "images" / "train" / "b.png"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert check_data(three_splits.yaml, decode=False).ok, "the header is sound"
    report = check_data(three_splits.yaml)
    assert not report.ok
    assert count_problems(report.splits["train"].problems) == {IMAGE_UNREADABLE: 1}
    text = report.text()
    assert "1 x image unreadable" in text
    assert "images/train/b.png" in text
    assert "NOT OK: 4 of 5 images decoded, 1 problem" in text
    assert path.read_bytes() == whole[: len(whole) // 2]


@pytest.mark.parametrize("split", ["train", "unlabeled"])
def test_validation_image_among_the_training_ones(three_splits: YoloFolder, split: str) -> None:
    target = "images/train/a.png" if split == "train" else "pool/other name.png"
    val = three_splits.root / "images" / "val" / "d.png"
    shutil.copy(val, three_splits.root / target)
    for decode in (True, False):
        report = check_data(three_splits.yaml, decode=decode)
        assert not report.ok
        (overlap,) = report.overlaps
        assert {overlap.a, overlap.b} == {split, "val"}
        assert val in overlap.pairs[0]
        assert "scores on them mean nothing" in report.text()
        assert "NOT OK" in report.text()


def test_the_same_pixels_in_another_file_format(three_splits: YoloFolder) -> None:
    """Only decoding can tell: the bytes differ."""
    with Image.open(three_splits.root / "images" / "val" / "d.png") as image:
        image.save(three_splits.root / "pool" / "e.bmp")
    assert check_data(three_splits.yaml, decode=False).ok
    assert not check_data(three_splits.yaml).ok


def test_repetition_within_a_split_is_a_remark(three_splits: YoloFolder) -> None:
    shutil.copy(three_splits.root / "pool" / "e.png", three_splits.root / "pool" / "f.png")
    report = check_data(three_splits.yaml)
    assert report.ok
    assert "unlabeled: 1 image repeats another of the same content" in report.text()


def test_mended_flaws_are_told_and_grouped(three_splits: YoloFolder) -> None:
    three_splits.label("a", "0 0.5 0.5 0.5 0.5\n" + "1 0.5 0.5 0 0\n" * 5)
    report = check_data(three_splits.yaml)
    assert report.ok
    assert count_problems(report.splits["train"].problems) == {BOX_DROPPED: 5}
    text = report.text()
    assert "train: 5 x box dropped" in text
    assert "labels/train/a.txt, line 2: [20, 15, 20, 15] has no area" in text
    assert "and 2 more" in text
    assert str(three_splits.root / "labels") not in text, "paths are short"


def test_a_split_that_cannot_be_used_does_not_hide_the_others(three_splits: YoloFolder) -> None:
    three_splits.label("b", "9 0.5 0.5 0.5 0.5")
    report = check_data(three_splits.yaml)
    assert not report.ok
    assert set(report.splits) == {"unlabeled", "val"}
    assert "unknown class 9" in report.errors["train"]
    assert "train: cannot be used" in report.text()


def test_only_the_split_asked_for(three_splits: YoloFolder) -> None:
    assert set(check_data(three_splits.yaml, splits=["val"]).splits) == {"val"}
    with pytest.raises(UserError, match="Data YAML not found"):
        check_data(three_splits.root / "gone.yaml")


def test_crowd_is_counted_apart(coco_folder: CocoFolder) -> None:
    coco_folder.content["annotations"][0]["iscrowd"] = 1
    report = check_data(coco_folder.write())
    assert report.splits["train"].crowd == 1
    assert report.splits["train"].counts.tolist() == [1, 0]
    assert "crowd, besides" in report.text()


@pytest.mark.parametrize("name", ["bccd", "aquarium", "garbage"])
def test_real_sets(real_data, name: str) -> None:
    yaml, folder = real_data(name)
    report = check_data(yaml, path=folder, splits=["val"])
    assert report.ok
    assert report.splits["val"].decoded == len(report.splits["val"].dataset)


def test_contact_sheet(coco_folder: CocoFolder, tmp_path: Path) -> None:
    data = load_data(coco_folder.write(), "train")
    sheets = [draw_samples(data, 2, tmp_path / "out" / f"{i}.png", seed=0) for i in range(2)]
    assert sheets[0].read_bytes() == sheets[1].read_bytes()
    pixels = np.asarray(Image.open(sheets[0])).astype(int)
    # In one image, upright and ten times as large, the box of a carp (class 0) must lie where the scale puts it.
    red = (np.abs(pixels - class_color(0)) <= 1).all(axis=2)
    ys, xs = np.nonzero(red)
    assert xs.max() - xs.min() == pytest.approx(10.5 * 10, abs=2)
    assert ys.max() - ys.min() == pytest.approx(10 * 10 + 13, abs=2)  # with its name above

    data.samples[0].path.write_bytes(b"")
    assert draw_samples(data, 2, tmp_path / "one.png").is_file()
    data.samples[1].path.write_bytes(b"")
    with pytest.raises(UserError, match="can be drawn"):
        draw_samples(data, 2, tmp_path / "none.png")


def test_starts_without_torch() -> None:
    """`ssod check` shall be quick: none of these rooms may need torch."""
    rooms = ["image", "sources", "splits", "doctor", "sheet"]
    script = (
        f"import sys; {'; '.join(f'import ssod.data.{r}' for r in rooms)}; print(json.dumps('torch' in sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", f"import json; {script}"], capture_output=True, text=True, check=True)
    assert json.loads(out.stdout) is False
