"""Readers: the same boxes from every format, every flaw counted, every unusable file refused in one sentence."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_sets import CocoFolder, VocFolder, YoloFolder, picture, refusal

from ssod.data import samples as kinds
from ssod.data.annotations.sources import load_data, read_data_yaml
from ssod.data.samples import Inspector, class_counts, count_problems
from ssod.errors import UserError


def contents(root: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in root.rglob("*") if p.is_file()}


# ----------------------------------------------------------------- what is right


@pytest.mark.parametrize(
    ("name", "splits", "boxes", "dropped"),
    [
        ("bccd", {"train": 205, "val": 87, "test": 72}, 4886, 2),
        ("aquarium", {"train": 448, "val": 127, "test": 63}, 4815, 2),
        ("garbage", {"train": 1600, "val": 400}, 5776, 0),
    ],
)
def test_real_sets(real_data, name: str, splits: dict[str, int], boxes: int, dropped: int) -> None:
    yaml, folder = real_data(name)
    sets = {split: load_data(yaml, split, path=folder) for split in splits}
    assert {split: len(data) for split, data in sets.items()} == splits
    everything = [s for data in sets.values() for s in data.samples]
    assert sum(len(s.boxes) for s in everything) == boxes
    problems = [p for data in sets.values() for p in data.problems]
    assert count_problems(problems) == ({kinds.BOX_DROPPED: dropped} if dropped else {})
    for sample in everything:
        x1, y1, x2, y2 = sample.boxes.T
        assert ((x1 >= 0) & (x1 < x2) & (x2 <= sample.width)).all()
        assert ((y1 >= 0) & (y1 < y2) & (y2 <= sample.height)).all()
    if name == "bccd":
        counts = sum(class_counts(data.samples, 3) for data in sets.values())
        assert counts.tolist() == [4153, 372, 361]  # 4155 RBC but for the two without area
    if name == "aquarium":
        assert [s.path.stem for s in everything if not len(s.boxes)] == ["IMG_3133_jpeg_jpg"]
    if dropped:
        split = problems[0].path.rsplit("/", 2)[1] if name == "aquarium" else "train"
        with pytest.raises(UserError, match="has no area"):
            load_data(yaml, split, path=folder, strict=True)


def test_coco(coco_folder: CocoFolder) -> None:
    before = contents(coco_folder.root)
    data = load_data(coco_folder.write(), "train")
    assert data.format == "COCO"
    assert data.names == ["carp", "pike"]  # by category id, gaps closed
    assert [(s.image_id, s.path.name) for s in data.samples] == [(3, "a.png"), (7, "b.png")]
    assert data.samples[0].boxes.tolist() == [[5, 5, 15.5, 15]]
    assert [s.labels.tolist() for s in data.samples] == [[0], [1]]
    assert data.samples[1].areas is not None
    assert data.samples[1].areas.tolist() == [150]
    assert (data.problems, "2 images, 2 boxes of 2 classes" in data.summary()) == ([], True)
    after = contents(coco_folder.root)
    assert {path: after[path] for path in before} == before


@pytest.mark.parametrize("line", ["train: .", "train: images/train", "train: annotations/instances_train.json"])
def test_coco_is_found_by_looking(coco_folder: CocoFolder, line: str) -> None:
    coco_folder.lines = [line]
    data = load_data(coco_folder.write(), "train")
    assert (data.format, len(data)) == ("COCO", 2)


def test_voc_counts_pixels_from_one(voc_folder: VocFolder) -> None:
    voc_folder.xml("a", [("carp", 1, 1, 40, 30, 0), ("pike", 11, 6, 20, 15, 1)])
    data = load_data(voc_folder.yaml, "train")
    assert (data.format, data.names) == ("VOC", ["carp", "pike"])
    a = data.samples[0]
    assert (a.path.name, a.image_id) == ("a.png", 1)
    assert a.boxes.tolist() == [[0, 0, 40, 30], [10, 5, 20, 15]]  # the whole image, and 10 x 10 pixels
    assert a.crowd.tolist() == [False, True]
    assert data.problems == []


def test_voc_that_counts_from_zero_loses_no_box(voc_folder: VocFolder) -> None:
    voc_folder.xml("a", [("carp", 0, 0, 39, 29, 0)])
    data = load_data(voc_folder.yaml, "train")
    assert (data.samples[0].boxes.tolist(), data.problems) == ([[0, 0, 39, 29]], [])


@pytest.mark.parametrize("value", ["ImageSets/Main/train.txt", "train", "."])
def test_voc_is_found_by_looking(voc_folder: VocFolder, value: str) -> None:
    voc_folder.yaml.write_text(f"train: {value}\n")
    assert load_data(voc_folder.yaml, "train").format == "VOC"


def test_yolo(yolo_folder: YoloFolder) -> None:
    yolo_folder.label("b", "1 0.5 0.5 0.5 0.2\n\n0 0.1 0.1 0.3 0.1 0.2 0.4\n")  # the second is a polygon
    data = load_data(yolo_folder.yaml, "train")
    assert (data.format, [s.path.stem for s in data.samples]) == ("YOLO", ["a", "b", "c"])
    assert np.allclose(data.samples[1].boxes, [[10, 12, 30, 18], [4, 3, 12, 12]], atol=1e-4)
    assert data.samples[1].labels.tolist() == [1, 0]


def test_yolo_with_the_folders_the_other_way_round(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "images" / "a.jpg")
    (tmp_path / "train" / "labels").mkdir()
    (tmp_path / "train" / "labels" / "a.txt").write_text("0 0.5 0.5 0.5 0.5")
    (tmp_path / "data.yaml").write_text("train: train/images\nnames: {0: carp}\nnc: 1\n")
    assert len(load_data(tmp_path / "data.yaml", "train").samples[0].boxes) == 1


def test_background_images(yolo_folder: YoloFolder) -> None:
    (yolo_folder.root / "labels" / "train" / "a.txt").unlink()
    yolo_folder.label("b", "")
    data = load_data(yolo_folder.yaml, "train", strict=True)  # both are legitimate
    assert [len(s.boxes) for s in data.samples] == [0, 0, 1]
    assert all(s.labeled for s in data.samples)
    assert count_problems(data.problems) == {kinds.NO_LABEL_FILE: 1}


@pytest.mark.fault(25)
def test_exif_frame(coco_folder: CocoFolder) -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(coco_folder.root / "images" / "train" / "a.jpg", exif=exif)
    coco_folder.content["images"][1]["file_name"] = "a.jpg"
    data = load_data(coco_folder.write(), "train")
    assert (data.samples[0].width, data.samples[0].height) == (30, 40)
    assert count_problems(data.problems) == {kinds.SIZE_DIFFERS: 1}
    assert "annotated as 40x30, but upright it is 30x40" in str(data.problems[0])


# ----------------------------------------------------------------- unlabelled


def test_labels_of_unlabelled_images_are_not_read(
    yolo_folder: YoloFolder, voc_folder: VocFolder, coco_folder: CocoFolder
) -> None:
    yolo_folder.label("a", "not a number")
    yolo_folder.yaml.write_text("unlabeled: images/train\n")
    (voc_folder.root / "Annotations" / "a.xml").write_text("broken")
    voc_folder.yaml.write_text("unlabeled: ImageSets/Main/train.txt\n")
    coco_folder.content["annotations"] = ["broken"]
    coco_folder.lines = ["unlabeled: annotations/instances_train.json"]
    coco_folder.write()
    for folder, n in ((yolo_folder, 3), (voc_folder, 2), (coco_folder, 2)):
        data = load_data(folder.yaml, "unlabeled")
        assert len(data) == n
        assert not any(s.labeled or len(s.boxes) for s in data.samples)
        assert "no labels used" in data.summary()


def test_plain_folder(tmp_path: Path) -> None:
    for name in ("b.JPG", "sub/a.png", "._b.JPG", ".trash/c.png"):
        picture(tmp_path / "pool" / name)
    (tmp_path / "pool" / "notes.txt").write_text("x")
    (tmp_path / "pool" / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "data.yaml").write_text("unlabeled: pool\n")
    data = load_data(tmp_path / "data.yaml", "unlabeled")
    assert [s.path.name for s in data.samples] == ["b.JPG", "a.png"]
    assert count_problems(data.problems) == {kinds.IMAGE_UNREADABLE: 1}


# ----------------------------------------------------------------- fault 6: bad boxes

BAD_BOXES = {
    "nan": ([float("nan"), 1, 5, 5], "is not finite"),
    "infinite": ([1, 1, float("inf"), 5], "is not finite"),
    "no width": ([1, 1, 0, 5], "has no area"),
    "negative": ([10, 10, -5, 5], "has no area"),
    "outside": ([100, 100, 5, 5], "lies outside"),
    "touching": ([40, 0, 5, 5], "lies outside"),
    "too thin for float32": ([30, 1, 1e-9, 5], "lies outside"),
}


@pytest.mark.parametrize("case", BAD_BOXES)
@pytest.mark.fault(6)
def test_bad_box_is_dropped_and_counted(coco_folder: CocoFolder, case: str) -> None:
    box, reason = BAD_BOXES[case]
    coco_folder.content["annotations"].append({"id": 3, "image_id": 3, "category_id": 5, "bbox": box})
    data = load_data(coco_folder.write(), "train")
    assert [len(s.boxes) for s in data.samples] == [1, 1]
    assert count_problems(data.problems) == {kinds.BOX_DROPPED: 1}
    problem = data.problems[0]
    assert (problem.path, problem.record) == (str(coco_folder.json), "annotations[2]")
    assert reason in problem.reason
    with pytest.raises(UserError, match=r"annotations\[2\].*strict"):
        load_data(coco_folder.yaml, "train", strict=True)


@pytest.mark.fault(6)
def test_box_that_reaches_outside_is_clipped_and_counted(yolo_folder: YoloFolder) -> None:
    label = yolo_folder.label("a", "0 0.1 0.5 0.5 0.5\n1 0.5 0.5 1.0000001 1")
    data = load_data(yolo_folder.yaml, "train")
    assert np.allclose(data.samples[0].boxes, [[0, 7.5, 14, 22.5], [0, 0, 40, 30]])
    assert count_problems(data.problems) == {kinds.BOX_CLIPPED: 1}  # the other's overhang is rounding
    assert (data.problems[0].path, data.problems[0].record) == (str(label), "line 1")
    with pytest.raises(UserError, match="reaches outside"):
        load_data(yolo_folder.yaml, "train", strict=True)


coordinate = st.one_of(st.floats(width=32), st.floats(-60, 60), st.integers(-5, 45).map(float))


@given(st.lists(st.tuples(coordinate, coordinate, coordinate, coordinate), max_size=8))
@pytest.mark.fault(6)
def test_every_box_is_kept_sound_or_reported(boxes: list[tuple[float, float, float, float]]) -> None:
    inspector = Inspector()
    kept, indices = inspector.clean(boxes, (40, 30), "file", [str(i) for i in range(len(boxes))])
    assert kept.dtype == np.float32
    assert (kept[:, :2] >= 0).all()
    assert (kept[:, :2] < kept[:, 2:]).all()
    assert (kept[:, 2:] <= [40, 30]).all()
    dropped = [int(p.record) for p in inspector.problems if p.kind == kinds.BOX_DROPPED]
    assert sorted([*indices.tolist(), *dropped]) == list(range(len(boxes)))


# ----------------------------------------------------------------- missing and unreadable images


@pytest.mark.parametrize("strict", [False, True])
def test_missing_image(coco_folder: CocoFolder, voc_folder: VocFolder, strict: bool) -> None:
    coco_folder.write()
    (coco_folder.root / "images" / "train" / "a.png").unlink()
    voc_folder.list.write_text("a\nb\ngone\n")
    for folder, n in ((coco_folder, 1), (voc_folder, 2)):
        if strict:
            with pytest.raises(UserError, match="strict"):
                load_data(folder.yaml, "train", strict=True)
        else:
            data = load_data(folder.yaml, "train")
            assert len(data) == n
            assert count_problems(data.problems) == {kinds.IMAGE_MISSING: 1}


def test_image_with_a_broken_header(yolo_folder: YoloFolder) -> None:
    spoilt = yolo_folder.root / "images" / "train" / "b.png"
    spoilt.write_bytes(b"")
    data = load_data(yolo_folder.yaml, "train")
    assert [(s.image_id, s.path.stem) for s in data.samples] == [(1, "a"), (3, "c")]
    assert [str(p) for p in data.problems] == [f"{spoilt}: the file is empty"]
    assert spoilt.read_bytes() == b""


def test_missing_xml_leaves_the_image_out(voc_folder: VocFolder) -> None:
    (voc_folder.root / "Annotations" / "a.xml").unlink()
    data = load_data(voc_folder.yaml, "train")
    assert [s.path.stem for s in data.samples] == ["b"]
    assert count_problems(data.problems) == {kinds.ANNOTATION_MISSING: 1}


def test_label_without_image(yolo_folder: YoloFolder) -> None:
    yolo_folder.label("gone", "0 0.5 0.5 0.5 0.5")
    yolo_folder.label("classes", "carp\npike")
    assert count_problems(load_data(yolo_folder.yaml, "train").problems) == {kinds.ANNOTATION_ORPHAN: 1}


# ----------------------------------------------------------------- fault 9: empty splits


@pytest.mark.fault(9)
def test_empty_folder(yolo_folder: YoloFolder) -> None:
    (yolo_folder.root / "more").mkdir()
    yolo_folder.yaml.write_text("train: images/train\nunlabeled: more\nnames: [carp, pike]\n")
    message = refusal(yolo_folder.yaml, "unlabeled")
    assert "no usable image" in message
    assert "'unlabeled'" in message


@pytest.mark.fault(9)
def test_images_without_a_single_box(yolo_folder: YoloFolder) -> None:
    for name in "abc":
        yolo_folder.label(name, "")
    message = refusal(yolo_folder.yaml)
    assert "3 images but not one box" in message
    assert "'unlabeled'" in message


def test_all_images_unreadable(yolo_folder: YoloFolder) -> None:
    for name in "abc":
        (yolo_folder.root / "images" / "train" / f"{name}.png").write_bytes(b"x")
    message = refusal(yolo_folder.yaml)
    assert "3 problems" in message
    assert "not an image" in message


@pytest.mark.fault(9)
def test_split_that_is_not_there(yolo_folder: YoloFolder) -> None:
    assert "no 'val' in it; add the line 'val: PATH'" in refusal(yolo_folder.yaml, "val")
    assert "Did you mean 'train'?" in refusal(yolo_folder.yaml, "trian")


def test_folder_without_annotations(tmp_path: Path) -> None:
    picture(tmp_path / "pics" / "a.png")
    (tmp_path / "data.yaml").write_text("train: pics\nnames: [carp]\n")
    assert "no annotations found" in refusal(tmp_path / "data.yaml")


def test_two_formats_fit(coco_folder: CocoFolder) -> None:
    (coco_folder.root / "labels" / "train").mkdir(parents=True)
    coco_folder.lines = ["train: images/train"]
    message = refusal(coco_folder.write())
    assert "COCO" in message
    assert "YOLO" in message


# ----------------------------------------------------------------- fault 28 and the YAML


@pytest.mark.fault(28)
def test_python_tags_are_refused(tmp_path: Path) -> None:
    import yaml as pyyaml

    file = tmp_path / "data.yaml"
    trace = tmp_path / "ran"
    file.write_text(f"train: x\nnames: !!python/object/apply:pathlib.Path.touch [!!python/name:x '{trace}']\n")
    attack = f"!!python/object/apply:os.mkdir ['{trace}']\n"
    pyyaml.unsafe_load(attack)
    assert trace.is_dir(), "the fault is not there: the tag runs no code"
    trace.rmdir()
    file.write_text(f"train: {attack}")
    message = refusal(file)
    assert f"{file}, line 1: refused" in message
    assert not trace.exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: [a", "not valid YAML"),
        ("- a\n- b", "not a list"),
        ("", "not a NoneType"),
        ("trian: x", "Did you mean 'train'?"),
        ("download: https://example.org", "The keys are path, train"),
        ("names: [a]", "no data in it"),
        ("train: [a, 5]\nnames: [a]", "must be one path"),
        ("train: []\nnames: [a]", "must be one path"),
        ("train: a\nlayout: [a]", "'layout' must be a text"),
        ("train: x\nnames: [a, a]", "more than once"),
        ("train: x\nnames: [a, 1]", "quote"),
        ("train: x\nnames: {0: a, 2: b}", "without a gap"),
        ("train: x\nnames: [a]\nnc: 2", "'nc' is 2"),
        ("path: 5\ntrain: x", "'path' must be a folder"),
        ("path: gone\ntrain: x", "there is no folder"),
        ("train: gone", "does not exist"),
        ("train: 2024-99-99 12:00:00", "not valid YAML|does not exist"),
    ],
)
def test_bad_yaml(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "data.yaml"
    file.write_text(text)
    message = refusal(file)
    assert str(file) in message
    assert re.search(expected, message), message


def test_missing_yaml(tmp_path: Path) -> None:
    assert "Data YAML not found" in refusal(tmp_path / "gone.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\x00")
    assert "cannot be read" in refusal(tmp_path / "binary.yaml")


def test_path_is_relative_to_the_yaml_and_can_be_overridden(
    yolo_folder: YoloFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = tmp_path / "cfg" / "data.yaml"
    away.parent.mkdir()
    away.write_text("path: ../yolo\ntrain: images/train\nnames: [carp, pike]\n")
    assert load_data(away, "train").root == yolo_folder.root
    away.write_text("path: gone\ntrain: images/train\nnames: [carp, pike]\n")
    monkeypatch.chdir(tmp_path)
    assert len(load_data("cfg/data.yaml", "train", path="yolo")) == 3
    assert read_data_yaml(away, yolo_folder.root).splits == {"train": ["images/train"]}
