"""Broken annotation files: refused with file, record and reason; ids and classes that would spoil a score are named."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from small_sets import CocoFolder, VocFolder, YoloFolder, refusal

from ssod.data import samples as kinds
from ssod.data.annotations.sources import load_data
from ssod.data.samples import count_problems
from ssod.errors import UserError

# ----------------------------------------------------------------- fault 5: corrupt annotation files


@pytest.mark.fault(5)
def test_corrupt_json(coco_folder: CocoFolder) -> None:
    coco_folder.write()
    text = coco_folder.json.read_text()
    coco_folder.json.write_text(text[: len(text) // 2])
    with pytest.raises(json.JSONDecodeError):
        json.loads(coco_folder.json.read_text())
    message = refusal(coco_folder.yaml)
    assert str(coco_folder.json) in message
    assert "line 1, column" in message


@pytest.mark.parametrize(
    ("key", "index", "change", "expected"),
    [
        ("annotations", 1, {"bbox": [1, 2, 3]}, ["annotations[1]", "bbox"]),
        ("annotations", 1, {"bbox": [1, 2, "3", 4]}, ["annotations[1]", "bbox"]),
        ("annotations", 1, {"bbox": None}, ["annotations[1]", "bbox"]),
        ("annotations", 0, {"image_id": "7"}, ["annotations[0]", "image_id"]),
        ("images", 1, {"id": None}, ["images[1]", "'id'"]),
        ("images", 1, {"file_name": 5}, ["images[1]", "file name"]),
        ("categories", 1, {"name": ""}, ["categories[1]", "name"]),
        ("categories", 1, {"id": 90}, ["categories[1]", "90"]),
    ],
)
@pytest.mark.fault(5)
def test_corrupt_coco_record(
    coco_folder: CocoFolder, key: str, index: int, change: dict[str, object], expected: list[str]
) -> None:
    coco_folder.content[key][index] |= change
    message = refusal(coco_folder.write())
    assert str(coco_folder.json) in message
    for part in expected:
        assert part in message


@pytest.mark.parametrize("content", ["[]", '"x"', "{}", '{"images": {}}', '{"images": [1]}', "[" * 100_000])
@pytest.mark.fault(5)
def test_json_that_is_not_coco(coco_folder: CocoFolder, content: str) -> None:
    coco_folder.write()
    coco_folder.json.write_text(content)
    assert str(coco_folder.json) in refusal(coco_folder.yaml)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<annotation><object>", "not valid XML"),
        ("", "not valid XML"),
        ("<html/>", "starts with <annotation>"),
        ("<annotation><object><name>carp</name></object></annotation>", "<bndbox> is missing"),
        ("<annotation><object><bndbox/></object></annotation>", "<name> is missing"),
        (
            "<annotation><object><name>carp</name><bndbox><xmin>a</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax>"
            "</bndbox></object></annotation>",
            "<xmin> must be a number, not 'a'",
        ),
    ],
)
@pytest.mark.fault(5)
def test_corrupt_xml(voc_folder: VocFolder, text: str, expected: str) -> None:
    voc_folder.yaml.write_text("train: train\nnames: [carp, pike]\n")
    file = voc_folder.root / "Annotations" / "a.xml"
    file.write_text(text)
    message = refusal(voc_folder.yaml)
    assert str(file) in message
    assert expected in message


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_xml_entities_are_not_expanded(voc_folder: VocFolder, encoding: str) -> None:
    secret = voc_folder.root / "secret.txt"
    secret.write_text("carp")
    bomb = '<!ENTITY a "carp"><!ENTITY b "&a;&a;">' + f'<!ENTITY c SYSTEM "{secret.as_uri()}">'
    file = voc_folder.xml("a", [("&a;", 1, 1, 5, 5, 0)], head=f"<!DOCTYPE annotation [{bomb}]>")
    file.write_bytes(f'<?xml version="1.0" encoding="{encoding}"?>{file.read_text()}'.encode(encoding))
    import xml.etree.ElementTree as ET

    assert ET.parse(file).findtext("object/name") == "carp", "the fault is not there: the entity is not expanded"
    assert "document type declaration" in refusal(voc_folder.yaml)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("0 0.5 0.5 0.5", "4 numbers"),
        ("0 0.5 0.5 0.5 0.5 7", "6 numbers"),
        ("carp 0.5 0.5 0.5 0.5", "numbers are expected"),
        ("0.5 0.5 0.5 0.5 0.5", "integer"),
    ],
)
@pytest.mark.fault(5)
def test_corrupt_yolo_line(yolo_folder: YoloFolder, line: str, expected: str) -> None:
    label = yolo_folder.label("b", f"0 0.5 0.5 0.5 0.5\n{line}\n")
    message = refusal(yolo_folder.yaml)
    assert f"{label}, line 2" in message
    assert expected in message


def test_yolo_label_that_is_not_text(yolo_folder: YoloFolder) -> None:
    label = yolo_folder.label("b", "")
    label.write_bytes(b"\xff\xfe\x00\x80")
    assert str(label) in refusal(yolo_folder.yaml)


ODD = [
    "",
    "x",
    "7",
    "\ud800",
    "a\0b",
    "n" * 5000,
    0,
    -1,
    10**30,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    True,
    None,
]
ODD_VALUES: list[object] = [*ODD, [], {}, [[]], [None] * 4, [1e308] * 4, [10**400] * 4, {"id": 1}]


@pytest.mark.filterwarnings("error")
@pytest.mark.fault(5)
def test_no_odd_value_in_a_coco_file_escapes(coco_folder: CocoFolder) -> None:
    """Each value of the file in turn becomes something odd: a data set or one sentence, never another error."""
    good = json.dumps(coco_folder.content)
    places = [(k, i, field) for k, rs in coco_folder.content.items() for i, r in enumerate(rs) for field in r]
    places += [(k, i, None) for k in coco_folder.content for i in range(2)]
    refusals = []
    for key, i, record_field in places:
        for odd in ODD_VALUES:
            coco_folder.content = json.loads(good)
            if record_field is None:
                coco_folder.content[key][i] = odd
            else:
                coco_folder.content[key][i][record_field] = odd
            try:
                data = load_data(coco_folder.write(), "train")
                assert all(
                    np.isfinite(s.boxes).all() and np.isfinite(s.areas).all() for s in data.samples if len(s.boxes)
                )
            except UserError as error:
                refusals.append(str(error))
    assert len(refusals) > len(places) * len(ODD_VALUES) / 3
    assert not any("\n" in r for r in refusals)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("text", ["", "nan", "inf", "-1e308", "1e999", "x", "&amp;", "9" * 5000, "\u0663"])
@pytest.mark.fault(5)
def test_no_odd_value_in_xml_or_yolo_escapes(voc_folder: VocFolder, yolo_folder: YoloFolder, text: str) -> None:
    file = voc_folder.root / "Annotations" / "a.xml"
    good = file.read_text()
    label = ["0", "0.5", "0.5", "0.5", "0.5"]
    refusals = []
    for i in range(7):
        parts = re.split(r"(?<=>)([^<>]+)(?=<)", good)  # what stands between tags is at the odd positions
        parts[2 * i + 1] = text
        file.write_text("".join(parts), encoding="utf-8")
        yolo_folder.label("a", " ".join([*label[: i % 5], text, *label[i % 5 + 1 :]]))
        for folder in (voc_folder, yolo_folder):
            try:
                load_data(folder.yaml, "train")
            except UserError as error:
                refusals.append(str(error))
    assert not any("\n" in r for r in refusals)


def test_byte_order_marks(coco_folder: CocoFolder, voc_folder: VocFolder, yolo_folder: YoloFolder) -> None:
    """What Windows editors put in front of a text file changes nothing."""
    coco_folder.write()
    files = [coco_folder.json, coco_folder.yaml, voc_folder.list, voc_folder.yaml, yolo_folder.yaml]
    for file in [*files, yolo_folder.label("a", "0 0.5 0.5 0.5 0.5")]:
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    for folder, n in ((coco_folder, 2), (voc_folder, 2), (yolo_folder, 3)):
        assert len(load_data(folder.yaml, "train", strict=True)) == n


# ----------------------------------------------------------------- fault 7: unknown classes


@pytest.mark.parametrize("class_id", [2, -1, 90])
@pytest.mark.fault(7)
def test_yolo_class_out_of_range(yolo_folder: YoloFolder, class_id: int) -> None:
    yolo_folder.label("b", f"{class_id} 0.5 0.5 0.5 0.5")
    message = refusal(yolo_folder.yaml)
    assert f"unknown class {class_id}" in message
    assert "0 carp, 1 pike" in message


@pytest.mark.fault(7)
def test_coco_unknown_category(coco_folder: CocoFolder) -> None:
    coco_folder.content["annotations"][1]["category_id"] = 6
    message = refusal(coco_folder.write())
    assert "annotations[1]" in message
    assert "category_id 6 is not among the categories of this file (5, 90)" in message


@pytest.mark.fault(7)
def test_voc_unknown_class(voc_folder: VocFolder) -> None:
    voc_folder.yaml.write_text("train: train\nnames: [carp, pikes]\n")
    message = refusal(voc_folder.yaml)
    assert "unknown class 'pike'" in message
    assert "carp, pikes" in message
    assert "Did you mean 'pikes'?" in message


@pytest.mark.parametrize("names", ["[pike, carp]", "[carp]", "[carp, pike, eel]"])
def test_class_lists_that_differ(coco_folder: CocoFolder, names: str) -> None:
    coco_folder.lines.append(f"names: {names}")
    message = refusal(coco_folder.write())
    assert str(names.strip("[]").split(", ")) in message
    assert "['carp', 'pike']" in message


@pytest.mark.fault(32)
def test_val_must_have_the_classes_of_train(coco_folder: CocoFolder) -> None:
    coco_folder.lines.append("val: annotations/instances_val.json")
    coco_folder.write()
    shutil.copytree(coco_folder.root / "images" / "train", coco_folder.root / "images" / "val")
    other = coco_folder.content | {"categories": [{"id": 5, "name": "pike"}, {"id": 90, "name": "carp"}]}
    (coco_folder.root / "annotations" / "instances_val.json").write_text(json.dumps(other))
    assert "class lists differ" in refusal(coco_folder.yaml, "val")


def test_yolo_needs_names(yolo_folder: YoloFolder) -> None:
    yolo_folder.yaml.write_text("train: images/train\n")
    assert "'names'" in refusal(yolo_folder.yaml)


# ----------------------------------------------------------------- fault 8: duplicate ids


@pytest.mark.fault(8)
def test_duplicate_image_id_is_refused(coco_folder: CocoFolder) -> None:
    coco_folder.content["images"][1]["id"] = 7
    message = refusal(coco_folder.write())
    assert "image id 7" in message
    assert "'b.png'" in message
    assert "'a.png'" in message


@pytest.mark.parametrize(("ids", "count"), [((0, 1), 1), ((4, 4), 2), ((0, 0), 2)])
@pytest.mark.fault(8)
def test_annotation_ids_that_would_spoil_the_score(coco_folder: CocoFolder, ids: tuple[int, int], count: int) -> None:
    for annotation, id_ in zip(coco_folder.content["annotations"], ids, strict=True):
        annotation["id"] = id_
    data = load_data(coco_folder.write(), "train")
    assert [len(s.boxes) for s in data.samples] == [1, 1], "no box is lost"
    assert count_problems(data.problems) == {kinds.ANNOTATION_ID: count}
    with pytest.raises(UserError, match="annotation id"):
        load_data(coco_folder.yaml, "train", strict=True)


@pytest.mark.fault(8)
def test_annotation_id_zero_is_a_fault_of_pycocotools(coco_folder: CocoFolder) -> None:
    """What the report guards against: perfect detections that score below 1 because of an id."""
    coco = pytest.importorskip("pycocotools.coco")
    from pycocotools.cocoeval import COCOeval

    scores = []
    for first in (1, 0):
        coco_folder.content["annotations"][0]["id"] = first
        coco_folder.write()
        truth = coco.COCO(str(coco_folder.json))
        perfect = [
            {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 1.0}
            for a in coco_folder.content["annotations"]
        ]
        evaluation = COCOeval(truth, truth.loadRes(perfect), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        scores.append(evaluation.stats[0])
    assert scores[0] == pytest.approx(1)
    assert scores[1] < 0.6


def test_annotation_of_no_image_and_image_listed_twice(coco_folder: CocoFolder) -> None:
    coco_folder.content["annotations"].append({"id": 3, "image_id": 99, "category_id": 5, "bbox": [1, 1, 2, 2]})
    coco_folder.content["images"].append({"id": 8, "file_name": "a.png"})
    data = load_data(coco_folder.write(), "train")
    assert count_problems(data.problems) == {kinds.ANNOTATION_ORPHAN: 1, kinds.IMAGE_TWICE: 1}
