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
from small_sets import CocoFolder, VocFolder, YoloFolder, picture

from ssod.cli import main
from ssod.data.annotations.sources import load_data
from ssod.data.check.doctor import Report, check_data
from ssod.data.check.doctor_text import as_json, page, passed
from ssod.data.check.findings import LEVELS, Finding, findings
from ssod.data.check.sheet import draw_samples
from ssod.data.draw import class_color
from ssod.data.samples import BOX_DROPPED, IMAGE_UNREADABLE, count_problems
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
    assert passed(report)
    assert report.names == ["carp", "pike"]
    assert {s: len(r.dataset) for s, r in report.splits.items()} == {"train": 3, "unlabeled": 1, "val": 1}
    assert report.splits["train"].counts.tolist() == [2, 1]
    assert np.allclose(report.splits["train"].sides, np.sqrt(10 * 6))
    text = page(report)
    assert "OK: " + ("5 of 5 images decoded" if decode else "headers of 5 images read") in text
    assert "; 0 errors, 0 warnings, 1 note; no image in two splits." in text
    assert {p: p.stat().st_mtime_ns for p in three_splits.root.rglob("*")} == before


def test_numbers_in_the_text(three_splits: YoloFolder) -> None:
    lines = page(check_data(three_splits.yaml)).splitlines()
    rows = {line.split("  ")[0]: line.split() for line in lines if line and not line.startswith(" ")}
    assert rows["images"] == ["images", "3", "1", "1"]
    assert rows["boxes"] == ["boxes", "3", "-", "1"]
    assert "  labels, never read" in "\n".join(lines)
    assert rows["0 carp"] == ["0", "carp", "2", "(67", "%)", "1", "(100", "%)"]
    table = [line for line in lines if line.startswith(("images", "boxes", "format"))]
    assert len({len(line) for line in table}) == 1, "columns are aligned"


def test_truncated_image_is_found_by_decoding_only(three_splits: YoloFolder) -> None:
    path = three_splits.root / "images" / "train" / "b.png"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert passed(check_data(three_splits.yaml, decode=False)), "the header is sound"
    report = check_data(three_splits.yaml)
    assert not passed(report)
    assert count_problems(report.splits["train"].problems) == {IMAGE_UNREADABLE: 1}
    text = page(report)
    assert "1 x image unreadable" in text
    assert "images/train/b.png" in text
    assert "NOT OK: 4 of 5 images decoded; 1 error" in text
    assert path.read_bytes() == whole[: len(whole) // 2]


@pytest.mark.parametrize("split", ["train", "unlabeled"])
@pytest.mark.fault(34)
def test_validation_image_among_the_training_ones(three_splits: YoloFolder, split: str) -> None:
    target = "images/train/a.png" if split == "train" else "pool/other name.png"
    val = three_splits.root / "images" / "val" / "d.png"
    shutil.copy(val, three_splits.root / target)
    for decode in (True, False):
        report = check_data(three_splits.yaml, decode=decode)
        assert not passed(report)
        (overlap,) = report.overlaps
        assert {overlap.a, overlap.b} == {split, "val"}
        assert val in overlap.pairs[0]
        assert "scores on them mean nothing" in page(report)
        assert "NOT OK" in page(report)


@pytest.mark.fault(34)
def test_the_same_pixels_in_another_file_format(three_splits: YoloFolder) -> None:
    """Only decoding can tell: the bytes differ."""
    with Image.open(three_splits.root / "images" / "val" / "d.png") as image:
        image.save(three_splits.root / "pool" / "e.bmp")
    assert passed(check_data(three_splits.yaml, decode=False))
    assert not passed(check_data(three_splits.yaml))


def test_repetition_within_a_split_is_a_remark(three_splits: YoloFolder) -> None:
    shutil.copy(three_splits.root / "pool" / "e.png", three_splits.root / "pool" / "f.png")
    report = check_data(three_splits.yaml)
    assert passed(report)
    assert "unlabeled: 1 pair of images that have the same content" in page(report)


def test_mended_flaws_are_told_and_grouped(three_splits: YoloFolder) -> None:
    three_splits.label("a", "0 0.5 0.5 0.5 0.5\n" + "1 0.5 0.5 0 0\n" * 5)
    report = check_data(three_splits.yaml)
    assert passed(report)
    assert count_problems(report.splits["train"].problems) == {BOX_DROPPED: 5}
    text = page(report)
    assert "WARNING  train: 5 x box dropped" in text
    assert "labels/train/a.txt, line 2: [20, 15, 20, 15] has no area" in text
    assert "and 2 more" in text
    assert str(three_splits.root / "labels") not in text, "paths are short"


def test_a_split_that_cannot_be_used_does_not_hide_the_others(three_splits: YoloFolder) -> None:
    three_splits.label("b", "9 0.5 0.5 0.5 0.5")
    report = check_data(three_splits.yaml)
    assert not passed(report)
    assert set(report.splits) == {"unlabeled", "val"}
    assert "unknown class 9" in report.errors["train"]
    assert "ERROR    train: cannot be used" in page(report)


def test_only_the_split_asked_for(three_splits: YoloFolder) -> None:
    assert set(check_data(three_splits.yaml, splits=["val"]).splits) == {"val"}
    with pytest.raises(UserError, match="Data YAML not found"):
        check_data(three_splits.root / "gone.yaml")


def test_crowd_is_counted_apart(coco_folder: CocoFolder) -> None:
    coco_folder.content["annotations"][0]["iscrowd"] = 1
    report = check_data(coco_folder.write())
    assert report.splits["train"].crowd == 1
    assert report.splits["train"].counts.tolist() == [1, 0]
    assert "crowd, besides" in page(report)


def told(report: Report, kind: str) -> Finding:
    """The only finding of a kind."""
    (finding,) = (f for f in findings(report) if f.kind == kind)
    return finding


def test_a_photo_saved_again_smaller_is_told_as_looking_alike(three_splits: YoloFolder) -> None:
    rng = np.random.default_rng(0)
    scene = np.kron(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8), np.ones((10, 10, 1), np.uint8))
    Image.fromarray(scene).save(three_splits.root / "images" / "train" / "a.png")
    Image.fromarray(scene).resize((80, 60)).save(three_splits.root / "images" / "val" / "d.jpg", quality=60)
    report = check_data(three_splits.yaml)
    finding = told(report, "near-duplicate")
    assert (finding.level, finding.split) == ("warning", "train and val")
    assert "images/train/a.png ~ images/val/d.jpg" in finding.where[0]
    assert passed(report)
    assert not passed(report, strict=True)
    assert "OK: 6 of 6 images decoded; 0 errors, 1 warning, 1 note; splits have images that look alike" in page(report)


def test_class_names_that_differ_are_compared_one_by_one(coco_folder: CocoFolder) -> None:
    content = json.loads(json.dumps(coco_folder.content))
    content["categories"][0]["name"] = "Pike"
    picture(coco_folder.root / "images" / "val" / "a.png", seed=5)
    picture(coco_folder.root / "images" / "val" / "b.png", seed=6)
    coco_folder.lines.append("val: annotations/instances_val.json")
    yaml = coco_folder.write()
    (coco_folder.root / "annotations" / "instances_val.json").write_text(json.dumps(content))
    report = check_data(yaml)
    finding = told(report, "classes differ")
    assert (finding.level, finding.split) == ("error", "val")
    assert finding.where == [
        "'Pike' is not a class of the data set. Did you mean 'pike'?",
        "'pike' is missing in its categories.",
    ]
    content["categories"] = [{"id": 90, "name": "carp"}, {"id": 5, "name": "pike"}]
    (coco_folder.root / "annotations" / "instances_val.json").write_text(json.dumps(content))
    assert told(check_data(yaml), "classes differ").where == [
        "the same names in another order: pike, carp instead of carp, pike."
    ]


def test_classes_that_are_rare_absent_or_only_tested(three_splits: YoloFolder) -> None:
    three_splits.yaml.write_text("train: images/train\nval: images/val\nnames: [carp, pike, eel, ray]\n")
    three_splits.label("a", "0 0.5 0.5 0.5 0.5\n" + "".join(f"0 0.5 0.5 0.{i} 0.3\n" for i in range(11, 30)))
    (three_splits.root / "labels" / "val" / "d.txt").write_text("2 0.5 0.5 0.5 0.5\n")
    report = check_data(three_splits.yaml)
    tail = told(report, "long tail")
    assert "21 times" in tail.what
    assert tail.where == ["pike: 1 box on 1 image", "carp: 21 boxes on 2 images"]
    assert told(report, "class only tested").where == ["eel"]
    absent = {f.split: (f.level, f.where) for f in findings(report) if f.kind == "class without boxes"}
    assert absent == {"train": ("warning", ["eel", "ray"]), "val": ("note", ["carp", "pike", "ray"])}


def test_many_classes_still_fit_a_page(three_splits: YoloFolder) -> None:
    names = [f"class{i}" for i in range(300)]
    three_splits.yaml.write_text(f"train: images/train\nval: images/val\nnames: {names}\n")
    text = page(check_data(three_splits.yaml))
    assert "... 280 more (json=true lists all)" in text
    assert len(text.splitlines()) < 70


def test_boxes_at_the_border_repeated_and_images_without(three_splits: YoloFolder) -> None:
    three_splits.label("a", "0 0.25 0.5 0.5 0.5\n0 0.25 0.5 0.5 0.5\n1 0.25 0.5 0.5 0.5\n")
    three_splits.label("b", "")
    (three_splits.root / "labels" / "train" / "c.txt").unlink()
    report = check_data(three_splits.yaml)
    assert told(report, "box annotated twice").where == [
        "images/train/a.png: 1 box with the corners and class of another"
    ]
    assert told(report, "image without boxes").where == ["images/train/b.png: no box", "images/train/c.png: no box"]
    numbers = json.loads(as_json(report))["splits"]["train"]
    assert (numbers["boxes"], numbers["boxes_at_the_border"], numbers["images_without_boxes"]) == (3, 3, 2)
    assert numbers["boxes_an_image"] == {"mean": 1.0, "min": 0, "5%": 0, "50%": 0, "95%": 2.7, "max": 3}


def test_kinds_of_files_are_counted(three_splits: YoloFolder) -> None:
    pool = three_splits.root / "pool"
    exif = Image.Exif()
    exif[0x0112] = 6
    rng = np.random.default_rng(0)
    noise = lambda: Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8))  # noqa: E731
    noise().save(pool / "turned.jpg", exif=exif)
    noise().convert("CMYK").save(pool / "print.jpg")
    noise().convert("L").save(pool / "gray.png")
    noise().convert("P").save(pool / "palette.png")
    noise().convert("RGBA").save(pool / "clear.png")
    Image.fromarray(rng.integers(0, 65535, (30, 40), dtype=np.uint16)).save(pool / "deep.png")
    noise().save(pool / "film.gif", save_all=True, append_images=[noise()])
    report = check_data(three_splits.yaml)
    wanted = {
        "EXIF rotation": 1,
        "CMYK": 1,
        "gray": 1,
        "palette": 2,
        "transparency": 1,
        "16-bit": 1,
        "several frames": 1,
    }
    assert dict(report.splits["unlabeled"].traits) == wanted
    assert "1 x EXIF rotation" in told(report, "kinds of files").what


def test_labels_of_unlabelled_images_are_seen_but_not_read(
    three_splits: YoloFolder, coco_folder: CocoFolder, voc_folder: VocFolder
) -> None:
    three_splits.yaml.write_text("train: images/train\nunlabeled: images/val\nnames: [carp, pike]\n")
    (three_splits.root / "labels" / "val" / "d.txt").write_bytes(b"\xff not a label")
    assert "1 of 1 images have labels" in told(check_data(three_splits.yaml), "labels of unlabelled images").what
    coco_folder.lines = ["unlabeled: annotations/instances_train.json", "names: [carp, pike]"]
    coco_folder.content["annotations"][0]["bbox"] = "nonsense"
    assert "2 of 2 images have labels" in told(check_data(coco_folder.write()), "labels of unlabelled images").what
    voc_folder.yaml.write_text("unlabeled: ImageSets/Main/train.txt\nnames: [carp, pike]\n")
    (voc_folder.root / "Annotations" / "a.xml").write_text("<broken")
    (voc_folder.root / "Annotations" / "b.xml").unlink()
    assert "1 of 2 images have labels" in told(check_data(voc_folder.yaml), "labels of unlabelled images").what


def test_worst_comes_first_with_a_way_out(three_splits: YoloFolder) -> None:
    shutil.copy(three_splits.root / "pool" / "e.png", three_splits.root / "pool" / "f.png")
    three_splits.label("a", "1 0.5 0.5 0 0\n0 0.5 0.5 0.5 0.5")
    three_splits.label("b", "")
    (three_splits.root / "images" / "val" / "x.png").write_bytes(b"")
    report = check_data(three_splits.yaml)
    found = findings(report)
    assert [LEVELS.index(f.level) for f in found] == sorted(LEVELS.index(f.level) for f in found)
    assert {f.level for f in found} == set(LEVELS)
    assert all(f.fix and f.what and f.split for f in found)
    text = page(report)
    assert text.index("ERROR ") < text.index("WARNING ") < text.index("NOTE ") < text.index("NOT OK")


def test_exit_codes_and_json(three_splits: YoloFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["check", f"data={three_splits.yaml}", f"project={tmp_path}"]
    assert main([*words, "--json"]) == 0
    out, err = capsys.readouterr()
    assert (json.loads(out)["ok"], len(json.loads(out)["findings"]), err) == (True, 1, "")
    assert not (tmp_path / "check").exists()
    three_splits.label("a", "1 0.5 0.5 0 0\n0 0.5 0.5 0.5 0.5")
    assert main(words) == 0
    assert (tmp_path / "check" / "exp" / "samples.png").is_file()
    assert main([*words, "strict=true", "json=true"]) == 1
    out = capsys.readouterr().out
    content = json.loads(out[out.index("{") :])
    assert (content["ok"], content["findings"][0]["kind"]) == (False, BOX_DROPPED)
    three_splits.label("b", "9 0.5 0.5 0.5 0.5")
    assert main([*words, "--json"]) == 1
    assert main([*words, "--json", "model=fcos"]) == 2


@pytest.mark.parametrize(
    ("name", "flaws"),
    [
        (
            "bccd",
            {"train, box dropped: 1", "val, box dropped: 1", "train and val, near-duplicate: 1", "train, long tail: 3"},
        ),
        (
            "aquarium",
            {
                "test, box dropped: 2",
                "train, image without boxes: 1",
                "train, near-duplicate: 1",
                "train, long tail: 5",
            },
        ),
        ("garbage", set()),
    ],
)
def test_real_sets(real_data, name: str, flaws: set[str]) -> None:
    yaml, folder = real_data(name)
    report = check_data(yaml, path=folder)
    assert {f"{f.split}, {f.kind}: {len(f.where)}" for f in findings(report)} == flaws
    assert passed(report)
    assert all(r.decoded == len(r.dataset) for r in report.splits.values())
    if name == "bccd":
        assert "BloodImage_00037.jpg" in told(report, "near-duplicate").where[0], "the same smear, moved by a hair"
        assert report.splits["train"].touching > 500


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
    rooms = ["image", "annotations.sources", "split.splits", "check.doctor", "check.findings", "check.doctor_text"]
    script = (
        f"import sys; {'; '.join(f'import ssod.data.{r}' for r in rooms)}; print(json.dumps('torch' in sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", f"import json; {script}"], capture_output=True, text=True, check=True)
    assert json.loads(out.stdout) is False
