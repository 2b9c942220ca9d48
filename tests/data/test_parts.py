"""A split of several paths: each found on its own, one order, unique ids, one class list, no image twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from small_sets import CocoFolder, VocFolder, YoloFolder, picture, refusal

from ssod.config import find_yaml
from ssod.data.annotations.sources import load_data, read_data_yaml


def two_voc_years(root: Path) -> Path:
    """VOC2007 (a, b) and VOC2012 (c) beside each other, as an unpacked VOCdevkit."""
    for year, names in (("VOC2007", "ab"), ("VOC2012", "ac")):
        folder = VocFolder(root / year)
        folder.yaml.unlink()
        for name in names:
            if not (folder.root / "JPEGImages" / f"{name}.png").exists():
                picture(folder.root / "JPEGImages" / f"{name}.png")
            folder.xml(name, [("carp" if name == "b" else "pike", 1, 1, 40, 30, 0), ("carp", 1, 1, 5, 5, 0)])
        folder.list.write_text("\n".join(names))
    file = root / "data.yaml"
    file.write_text("train: [VOC2007/ImageSets/Main/train.txt, VOC2012/ImageSets/Main/train.txt]\n")
    return file


def test_two_years_of_voc_are_one_split(tmp_path: Path) -> None:
    data = load_data(two_voc_years(tmp_path), "train")
    assert data.format == "VOC"
    assert data.names == ["carp", "pike"]
    shown = [(s.image_id, s.path.relative_to(tmp_path).parts[0], s.path.stem) for s in data.samples]
    assert shown == [(1, "VOC2007", "a"), (2, "VOC2007", "b"), (3, "VOC2012", "a"), (4, "VOC2012", "c")]
    assert [s.labels.tolist() for s in data.samples] == [[1, 0], [0, 0], [1, 0], [1, 0]]


def test_the_order_is_that_of_the_yaml(tmp_path: Path) -> None:
    file = two_voc_years(tmp_path)
    file.write_text("train: [VOC2012/ImageSets/Main/train.txt, VOC2007/ImageSets/Main/train.txt]\n")
    parts = [s.path.relative_to(tmp_path).parts[0] for s in load_data(file, "train").samples]
    assert parts == ["VOC2012", "VOC2012", "VOC2007", "VOC2007"]


def test_ids_that_are_unique_stay(coco_folder: CocoFolder) -> None:
    other = json.loads(json.dumps(coco_folder.content))
    other["images"] = [{"id": 100, "file_name": "c.png", "width": 40, "height": 30}]
    other["annotations"] = [{"id": 1, "image_id": 100, "category_id": 90, "bbox": [0, 0, 5, 5]}]
    picture(coco_folder.root / "images" / "train" / "c.png", seed=3)
    coco_folder.lines = ["train: [annotations/instances_train.json, annotations/more.json]"]
    coco_folder.write()
    (coco_folder.root / "annotations" / "more.json").write_text(json.dumps(other))
    assert [s.image_id for s in load_data(coco_folder.yaml, "train").samples] == [3, 7, 100]


def test_formats_may_differ(coco_folder: CocoFolder, yolo_folder: YoloFolder) -> None:
    coco_folder.write()
    yaml = coco_folder.root.parent / "both.yaml"
    yaml.write_text("train: [coco/annotations/instances_train.json, yolo/images/train]\nnames: [carp, pike]\n")
    data = load_data(yaml, "train")
    assert data.format == "COCO + YOLO"
    assert [s.image_id for s in data.samples] == [1, 2, 3, 4, 5]
    assert [s.labels.tolist() for s in data.samples] == [[0], [1], [0], [1], [0]]


def test_unlabelled_pools_add_up(tmp_path: Path) -> None:
    for folder, names in (("one", "ab"), ("two", "c")):
        for name in names:
            picture(tmp_path / folder / f"{name}.png")
    (tmp_path / "data.yaml").write_text("unlabeled: [one, two]\n")
    data = load_data(tmp_path / "data.yaml", "unlabeled")
    assert [(s.image_id, s.path.stem) for s in data.samples] == [(1, "a"), (2, "b"), (3, "c")]


def test_other_classes_are_refused(tmp_path: Path) -> None:
    file = two_voc_years(tmp_path)
    xml = tmp_path / "VOC2012" / "Annotations" / "c.xml"
    xml.write_text(xml.read_text().replace("pike", "perch"))
    message = refusal(file)
    assert "The class lists differ" in message
    assert "perch" in message
    assert "list 'names' in the YAML" in message


def test_an_image_in_two_paths_is_refused(yolo_folder: YoloFolder) -> None:
    yolo_folder.yaml.write_text("train: [images/train, images/train]\nnames: [carp, pike]\n")
    message = refusal(yolo_folder.yaml)
    assert str(yolo_folder.root / "images" / "train" / "a.png") in message
    assert "list every image once" in message


def test_a_path_without_images_is_refused_though_the_other_has_some(yolo_folder: YoloFolder) -> None:
    for kind in ("images", "labels"):
        (yolo_folder.root / kind / "more").mkdir(parents=True)
    yolo_folder.yaml.write_text("train: [images/train, images/more]\nnames: [carp, pike]\n")
    assert f"no usable image in {yolo_folder.root / 'labels' / 'more'}" in refusal(yolo_folder.yaml)


# ----------------------------------------------------------------- data that are not there


def test_missing_data_say_what_to_put_where(tmp_path: Path) -> None:
    file = tmp_path / "data.yaml"
    file.write_text("path: sea\ntrain: images/train\nnames: [a]\nlayout: the fish of the north sea\n")
    message = refusal(file)
    assert f"put the fish of the north sea into {tmp_path / 'sea'}" in message
    assert "cfg=demo.yaml" in message
    (tmp_path / "sea").mkdir()
    message = refusal(file)
    assert f"{tmp_path / 'sea' / 'images' / 'train'} does not exist" in message
    assert f"put the fish of the north sea into {tmp_path / 'sea'}" in message


@pytest.mark.parametrize("name", ["coco.yaml", "voc.yaml", "voc0712.yaml"])
def test_the_data_yamls_of_the_package(name: str, tmp_path: Path) -> None:
    file = find_yaml(name, data=True)
    assert file.parent.name == "data"
    assert "into" in refusal(file_with_missing_path(file, tmp_path))
    data = read_data_yaml(file, tmp_path)  # as data_path=DIR does
    assert data.layout
    assert set(data.splits) >= {"train", "val"}
    if name != "coco.yaml":
        assert data.names is not None
        assert len(data.names) == 20
        assert data.names == sorted(data.names)


def file_with_missing_path(file: Path, folder: Path) -> Path:
    lines = [f"path: {folder / 'gone'}" if x.startswith("path:") else x for x in file.read_text().splitlines()]
    out = folder / file.name
    out.write_text("\n".join(lines))
    return out


def test_voc_yamls_read_a_devkit(tmp_path: Path) -> None:
    """The package's own YAML on a made-up VOCdevkit."""
    for year, lists in (("VOC2007", ("trainval", "test")), ("VOC2012", ("trainval",))):
        folder = VocFolder(tmp_path / year)
        for name, fish in (("a", "cat"), ("b", "dog")):
            folder.xml(name, [(fish, 1, 1, 40, 30, 0)])
        for i, name in enumerate(lists):
            folder.list.with_name(f"{name}.txt").write_text("ab"[i])
    shutil.move(tmp_path / "VOC2012" / "JPEGImages" / "a.png", tmp_path / "VOC2012" / "JPEGImages" / "2012_a.png")
    shutil.move(tmp_path / "VOC2012" / "Annotations" / "a.xml", tmp_path / "VOC2012" / "Annotations" / "2012_a.xml")
    (tmp_path / "VOC2012" / "ImageSets" / "Main" / "trainval.txt").write_text("2012_a")
    both = find_yaml("voc0712.yaml", data=True)
    assert [s.path.stem for s in load_data(both, "train", tmp_path).samples] == ["a", "2012_a"]
    semi = find_yaml("voc.yaml", data=True)
    shown = {split: [s.path.stem for s in load_data(semi, split, tmp_path).samples] for split in ("train", "val")}
    assert shown == {"train": ["a"], "val": ["b"]}
    assert not load_data(semi, "unlabeled", tmp_path).samples[0].labeled


def test_a_recipe_and_a_data_yaml_may_share_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (tmp_path, tmp_path / "data"):
        folder.mkdir(exist_ok=True)
        (folder / "sea.yaml").write_text("batch: 1\n")
    monkeypatch.setattr("ssod.config.cfg_folders", lambda: [tmp_path])
    assert find_yaml("sea.yaml") == tmp_path / "sea.yaml"
    assert find_yaml("sea.yaml", data=True) == tmp_path / "data" / "sea.yaml"
