"""Text lists, globs and labels beside images: on the command line and in a data YAML."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_sets import YoloFolder, picture, refusal

from ssod.config import load_config
from ssod.data.annotations.found import list_images, walk_images
from ssod.data.annotations.listing import find_images, iter_images
from ssod.data.annotations.sources import load_data
from ssod.data.samples import IMAGE_MISSING, IMAGE_TWICE, NO_LABEL_FILE, count_problems
from ssod.engine.setup import build_data
from ssod.errors import UserError


def names_in(yaml: Path, split: str = "train") -> list[str]:
    return [s.path.name for s in load_data(yaml, split).samples]


def rewrite(folder: YoloFolder, value: str, split: str = "train") -> Path:
    folder.yaml.write_text(f"{split}: {value}\nnames: [carp, pike]\n")
    return folder.yaml


# ------------------------------------------------------------------------------------------ folders


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.text("ab-./Z é0", min_size=1, max_size=3), min_size=1, max_size=3), min_size=1, max_size=8))
def test_a_walk_is_in_the_order_of_whole_paths(
    tmp_path_factory: pytest.TempPathFactory, trees: list[list[str]]
) -> None:
    root = tmp_path_factory.mktemp("walk")
    wanted = set()
    for parts in trees:
        clean = [p.replace("/", "_").strip(" .") or "x" for p in parts]
        file = root.joinpath(*clean[:-1], f"{clean[-1]}.png")
        if any(parent.is_file() for parent in file.parents if parent != root.parent):
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.is_dir():
            file.touch()
            wanted.add(file)
    assert list(walk_images(root)) == sorted(wanted, key=lambda p: p.relative_to(root).as_posix())


def test_hidden_files_and_linked_folders_are_no_data(tmp_path: Path) -> None:
    picture(tmp_path / "real" / "a.png")
    picture(tmp_path / ".cache" / "b.png")
    picture(tmp_path / ".c.png")
    os.symlink(tmp_path / "real", tmp_path / "circle")
    os.symlink(tmp_path / "real" / "a.png", tmp_path / "link.png")
    assert [p.name for p in list_images(tmp_path)] == ["link.png", "a.png"]


# ------------------------------------------------------------------------------------------ the command line


def test_a_list_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (picture(tmp_path / "mes photos é" / f"{n}.png", seed=i) for i, n in enumerate("ab"))
    listed = tmp_path / "mes photos é" / "list.txt"
    listed.write_text(f"\ufeffb.png\r\n\n  {a}  \n./gone.jpg\n", encoding="utf-8")
    assert find_images(listed) == [b, a, listed.parent / "gone.jpg"], "order kept, absolute paths allowed"
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "lists" / "list.txt"
    other.parent.mkdir()
    other.write_text("mes photos é/a.png\n")
    assert find_images("lists/list.txt") == [Path("mes photos é/a.png")], "relative to the current folder"
    assert find_images(["lists/list.txt", "mes photos é/*.png"]) == [Path(f"mes photos é/{n}.png") for n in "aab"]


def test_a_list_that_is_none_is_refused(tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    for text, reason in (("", "no image there"), ("000139\n000285\n", "ImageSets/Main"), ("a\0b.jpg", "binary")):
        listed.write_text(text)
        with pytest.raises(UserError, match=reason):
            find_images(listed)


def test_sources_come_one_at_a_time(tmp_path: Path) -> None:
    """The first image is there although a later source does not exist."""
    picture(tmp_path / "a.png")
    stream = iter_images([tmp_path / "a.png", tmp_path / "none"])
    assert next(stream) == tmp_path / "a.png"
    with pytest.raises(UserError, match="none: no image there"):
        next(stream)


@pytest.mark.parametrize("kind", ["folder", "list", "glob"])
def test_training_takes_them_as_unlabelled_images(tiny: dict[str, Any], tmp_path: Path, kind: str) -> None:
    for i in range(3):
        picture(tmp_path / "pool" / f"{i}.png", seed=i)
    (tmp_path / "list.txt").write_text("".join(f"pool/{i}.png\n" for i in range(3)))
    source = {"folder": "pool", "list": "list.txt", "glob": "pool/*.png"}[kind]
    data = build_data(load_config("train", tiny | {"unlabeled": str(tmp_path / source)}))
    assert [s.path.name for s in data.unlabeled] == ["0.png", "1.png", "2.png"]
    assert not any(s.labeled for s in data.unlabeled)


# ------------------------------------------------------------------------------------------ in a data YAML


@pytest.mark.parametrize("prefix", ["images/train/", "./images/train/", "ABSOLUTE"])
@pytest.mark.parametrize("place", ["train.txt", "lists/train.txt"])
def test_a_list_finds_images_and_labels(yolo_folder: YoloFolder, prefix: str, place: str) -> None:
    before = {s.path.name: s.boxes.tolist() for s in load_data(yolo_folder.yaml, "train").samples}
    prefix = f"{yolo_folder.root}/images/train/" if prefix == "ABSOLUTE" else prefix
    listed = yolo_folder.root / place
    listed.parent.mkdir(exist_ok=True)
    listed.write_text(f"{prefix}c.png\n{prefix}a.png\n")
    data = load_data(rewrite(yolo_folder, place), "train")
    assert data.format == "YOLO list"
    assert {s.path.name: s.boxes.tolist() for s in data.samples} == {n: before[n] for n in ("c.png", "a.png")}
    assert [s.image_id for s in data.samples] == [1, 2]
    assert data.problems == []
    pool = load_data(rewrite(yolo_folder, place, "unlabeled"), "unlabeled")
    assert (pool.format, [s.labeled for s in pool.samples]) == ("list", [False, False])


def test_flaws_of_a_list_are_reported(yolo_folder: YoloFolder) -> None:
    (yolo_folder.root / "labels" / "train" / "b.txt").unlink()
    (yolo_folder.root / "train.txt").write_text("".join(f"images/train/{n}.png\n" for n in ("a", "b", "gone", "a")))
    data = load_data(rewrite(yolo_folder, "train.txt"), "train")
    assert [s.path.name for s in data.samples] == ["a.png", "b.png"]
    assert count_problems(data.problems) == {IMAGE_MISSING: 1, NO_LABEL_FILE: 1, IMAGE_TWICE: 1}
    assert "line 4" in str(next(p for p in data.problems if p.kind == IMAGE_TWICE))


@pytest.mark.parametrize("entry", ["../secret.png", "images/sub/secret.png", "OUTSIDE"])
@pytest.mark.fault(29)
def test_a_list_does_not_lead_out_of_the_data_folder(yolo_folder: YoloFolder, entry: str) -> None:
    secret = picture(yolo_folder.root.parent / "secret" / "secret.png")
    os.symlink(secret.parent, yolo_folder.root / "images" / "sub")
    entry = str(secret) if entry == "OUTSIDE" else entry
    (yolo_folder.root / "train.txt").write_text(f"images/train/a.png\n{entry}\n")
    message = refusal(rewrite(yolo_folder, "train.txt"))
    assert "train.txt, line 2" in message
    assert "out of the data folder" in message


def test_the_folder_images_may_be_a_link(yolo_folder: YoloFolder, tmp_path: Path) -> None:
    home = tmp_path / "labels only"
    home.mkdir()
    os.symlink(yolo_folder.root / "images", home / "images")
    os.symlink(yolo_folder.root / "labels", home / "labels")
    (home / "train.txt").write_text("./images/train/a.png\n")
    (home / "data.yaml").write_text("train: train.txt\nnames: [carp, pike]\n")
    (sample,) = load_data(home / "data.yaml", "train").samples
    assert len(sample.boxes) == 1


def test_a_glob(yolo_folder: YoloFolder) -> None:
    data = load_data(rewrite(yolo_folder, "images/*/[ac].png"), "train")
    assert (data.format, [s.path.name for s in data.samples]) == ("YOLO glob", ["a.png", "c.png"])
    assert [len(s.boxes) for s in data.samples] == [1, 1]
    assert names_in(rewrite(yolo_folder, "'**/*.png'", "unlabeled"), "unlabeled") == ["a.png", "b.png", "c.png"]
    assert "no usable image" in refusal(rewrite(yolo_folder, "images/*.tif"))


def test_labels_beside_the_images(tmp_path: Path) -> None:
    """Darknet and labelling programs keep a.txt next to a.jpg."""
    for i, n in enumerate("ab"):
        picture(tmp_path / "shots" / f"{n}.png", seed=i)
        (tmp_path / "shots" / f"{n}.txt").write_text(f"{i} 0.5 0.5 0.25 0.2\n")
    (tmp_path / "shots" / "README.txt").write_text("hello")
    (tmp_path / "shots.txt").write_text("shots/a.png\nshots/b.png\n")
    for value in ("shots", "shots.txt", "shots/*.png"):
        (tmp_path / "data.yaml").write_text(f"train: {value}\nnames: [carp, pike]\n")
        data = load_data(tmp_path / "data.yaml", "train")
        assert [s.labels.tolist() for s in data.samples] == [[0], [1]]
        assert data.problems == []
    (tmp_path / "data.yaml").write_text("train: shots.txt\n")
    assert "list the classes as 'names'" in refusal(tmp_path / "data.yaml")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=3, max_size=12))
def test_a_polygon_stands_for_the_box_around_it(
    tmp_path_factory: pytest.TempPathFactory, points: list[tuple[float, float]]
) -> None:
    folder = YoloFolder(tmp_path_factory.mktemp("polygon"))
    low, high = np.min(points, axis=0), np.max(points, axis=0)
    folder.label("a", "0 0.5 0.5 0.5 0.5\n1 " + " ".join(f"{x!r} {y!r}" for x, y in points))
    boxes = load_data(folder.yaml, "train").samples[0].boxes
    scale = np.array([40, 30])
    wanted = np.concatenate([low * scale, high * scale]).astype(np.float32)
    if (wanted[2:] > wanted[:2]).all():
        np.testing.assert_allclose(boxes[1], wanted, atol=1e-4)
    else:
        assert len(boxes) == 1, "a polygon without area is dropped"


def test_the_score_of_a_pseudo_label_is_not_used(yolo_folder: YoloFolder) -> None:
    plain = load_data(yolo_folder.yaml, "train").samples[1].boxes
    yolo_folder.label("b", "1 0.5 0.5 0.25 0.2 0.875\n")
    np.testing.assert_array_equal(load_data(yolo_folder.yaml, "train").samples[1].boxes, plain)
