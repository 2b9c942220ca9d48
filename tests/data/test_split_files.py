"""`ssod split`: the same bytes for the same seed, files that every reader takes, the papers' lists, refusals."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_sets import VocFolder, picture

from ssod.cli import main
from ssod.data.annotations.sources import load_data
from ssod.data.split.split_files import _decimal
from ssod.data.split.splits import choose_labeled

CLASSES = [(5, "carp"), (17, "pike"), (90, "perch")]


def coco_sea(root: Path, images: int = 24, crowd_only: tuple[int, ...] = ()) -> Path:
    """A COCO data set with gaps in its ids, boxes of two decimals, and images without a box that is not crowd."""
    rng = np.random.default_rng(3)
    content: dict[str, Any] = {"images": [], "annotations": []}
    content["categories"] = [{"id": i, "name": n} for i, n in CLASSES]
    for i in range(images):
        name = f"{i:03d}.png"
        picture(root / "train2017" / name, seed=i)
        content["images"].append({"id": 10 + 3 * i, "file_name": name, "width": 40, "height": 30})
        for _ in range(0 if i in crowd_only else 1 + int(rng.integers(4))):
            x, y, w, h = (round(float(v), 2) for v in rng.uniform([0, 0, 2, 2], [20, 15, 20, 15]))
            box = {"bbox": [x, y, w, h], "area": round(w * h * 0.7, 2), "iscrowd": 0}
            row = {"id": len(content["annotations"]) + 1, "image_id": 10 + 3 * i}
            content["annotations"].append(row | box | {"category_id": CLASSES[int(rng.integers(3))][0]})
        if i in crowd_only and i % 2:
            row = {"id": len(content["annotations"]) + 1, "image_id": 10 + 3 * i, "category_id": 5}
            content["annotations"].append(row | {"bbox": [1, 1, 5, 5], "area": 25, "iscrowd": 1})
    content["images"].reverse()  # the order in the file must not matter
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    (root / "data.yaml").write_text(
        "train: annotations/instances_train2017.json\nval: annotations/instances_train2017.json\n"
    )
    return root / "data.yaml"


def split(yaml: Path, out: Path, *words: str) -> None:
    assert main(["split", f"data={yaml}", f"out={out}", *words]) == 0


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["split", *words]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


def digests(out: Path) -> dict[str, str]:
    return {
        p.relative_to(out).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.rglob("*.json"))
    }


# ----------------------------------------------------------------- shares


@pytest.mark.parametrize("words", [["percent=[10,50]", "folds=2"], ["sparse=hard", "folds=2"], ["sparse=50miss"]])
def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, words: list[str]) -> None:
    one = coco_sea(tmp_path / "one")
    two = tmp_path / "elsewhere" / "two"
    shutil.copytree(one.parent, two)
    split(one, tmp_path / "a", *words)
    split(two / "data.yaml", tmp_path / "b" / "c", *words)
    split(one, tmp_path / "d", *words, "seed=9")
    assert digests(tmp_path / "a") == digests(tmp_path / "b" / "c")
    assert len(digests(tmp_path / "a")) == 2 * (len(digests(tmp_path / "a")) // 2) + 1  # pairs and the manifest
    same = digests(tmp_path / "a").items() & digests(tmp_path / "d").items()
    assert not same


def test_parts_hold_every_image_once_and_the_boxes_of_the_source(tmp_path: Path) -> None:
    yaml = coco_sea(tmp_path / "sea")
    source = json.loads((tmp_path / "sea" / "annotations" / "instances_train2017.json").read_text())
    split(yaml, tmp_path / "out", "percent=25")
    folder = tmp_path / "out" / "25percent" / "fold0"
    labeled, rest = (json.loads((folder / f"{n}.json").read_text()) for n in ("labeled", "unlabeled"))
    assert labeled["categories"] == source["categories"]  # with their ids, so that the val file of the source fits
    assert rest["annotations"] == []
    ids = [{i["id"] for i in part["images"]} for part in (labeled, rest)]
    assert not ids[0] & ids[1]
    assert ids[0] | ids[1] == {i["id"] for i in source["images"]}

    def plain(a: dict[str, Any]) -> tuple[Any, ...]:
        return (a["image_id"], a["category_id"], a["iscrowd"], a["area"], *a["bbox"])

    expected = sorted(plain(a) for a in source["annotations"] if a["image_id"] in ids[0])
    assert sorted(map(plain, labeled["annotations"])) == expected  # the same decimals, not their float32
    assert all((tmp_path / "sea" / i["file_name"]).is_file() for i in labeled["images"] + rest["images"])


def test_fold_k_is_what_training_draws_with_seed_plus_k(tmp_path: Path) -> None:
    yaml = coco_sea(tmp_path / "sea")
    split(yaml, tmp_path / "out", "percent=[10,50]", "folds=3", "seed=4")
    samples = load_data(yaml, "train").samples
    for percent in (10, 50):
        for fold in range(3):
            chosen, _ = choose_labeled(samples, f"{percent}%", 4 + fold, 3)
            folder = tmp_path / "out" / f"{percent}percent" / f"fold{fold}"
            written = {i["id"] for i in json.loads((folder / "labeled.json").read_text())["images"]}
            assert written == {samples[i].image_id for i in chosen}
            assert choose_labeled(samples, str(folder), 0, 3)[0] == chosen  # labeled=FOLDER
            assert choose_labeled(samples, str(folder / "labeled.json"), 0, 3)[0] == chosen
    few, many = (set(choose_labeled(samples, f"{tmp_path}/out/{p}percent/fold1", 0, 3)[0]) for p in (10, 50))
    assert few < many


def test_the_data_yaml_of_a_split_trains(tmp_path: Path) -> None:
    yaml = coco_sea(tmp_path / "sea")
    picture(tmp_path / "sea" / "more" / "x.png")
    yaml.write_text(yaml.read_text() + "unlabeled: more\nlayout: the sea\n")
    split(yaml, tmp_path / "out", "percent=25")
    split(yaml, tmp_path / "sea" / "splits", "percent=25")
    shutil.move(tmp_path / "sea", tmp_path / "moved")  # splits that lie among the data move with them
    own = tmp_path / "moved" / "splits" / "25percent" / "fold0" / "data.yaml"
    train, unlabeled, val = (load_data(own, s, strict=True) for s in ("train", "unlabeled", "val"))
    assert (len(train), len(unlabeled), len(val)) == (6, 19, 24)
    assert train.names == val.names == ["carp", "pike", "perch"]
    full = {s.image_id: s for s in val.samples}
    for s in train.samples:
        assert (s.boxes == full[s.image_id].boxes).all()
        assert s.areas is not None
        assert (s.areas == full[s.image_id].areas).all()
    shutil.move(tmp_path / "moved", tmp_path / "sea")
    assert len(load_data(tmp_path / "out" / "25percent" / "fold0" / "data.yaml", "train")) == 6


def test_from_voc_and_yolo(tmp_path: Path) -> None:
    """Any format in; difficult objects become crowd, classes count from 1, pycocotools reads the result."""
    from pycocotools.coco import COCO

    for year, shift in (("VOC2007", 0), ("VOC2012", 2)):
        folder = VocFolder(tmp_path / "kit" / year)
        for i, name in enumerate("ab"):
            picture(folder.root / "JPEGImages" / f"{year}_{name}.png", seed=i + shift)
            folder.xml(f"{year}_{name}", [("carp", 1, 1, 40, 30, 0), ("pike", 2, 3, 9, 8, 1)])
        folder.list.write_text(f"{year}_a\n{year}_b\n")
    yaml = tmp_path / "kit" / "data.yaml"
    lists = ", ".join(f"{year}/ImageSets/Main/train.txt" for year in ("VOC2007", "VOC2012"))
    yaml.write_text(f"train: [{lists}]\nnames: [pike, carp]\n")
    split(yaml, tmp_path / "out", "percent=50")
    own = tmp_path / "out" / "50percent" / "fold0"
    labeled = json.loads((own / "labeled.json").read_text())
    assert labeled["categories"] == [{"id": 1, "name": "pike"}, {"id": 2, "name": "carp"}]
    assert [(a["category_id"], a["iscrowd"], a["bbox"]) for a in labeled["annotations"][:2]] == [
        (2, 0, [0, 0, 40, 30]),
        (1, 1, [1, 2, 8, 6]),
    ]
    assert all((tmp_path / "kit" / i["file_name"]).is_file() for i in labeled["images"])
    with contextlib.redirect_stdout(io.StringIO()):
        api = COCO(str(own / "labeled.json"))
    assert len(api.loadAnns(api.getAnnIds(catIds=[2], iscrowd=False))) == 2
    before = {s.path: s for s in load_data(yaml, "train").samples}
    for s in load_data(own / "data.yaml", "train", strict=True).samples:
        assert (s.boxes == before[s.path].boxes).all()
        assert (s.labels == before[s.path].labels).all()
        assert (s.crowd == before[s.path].crowd).all()


def test_images_of_one_name_in_two_folders(tmp_path: Path) -> None:
    for year in ("VOC2007", "VOC2012"):
        VocFolder(tmp_path / "kit" / year)  # both hold a and b
    yaml = tmp_path / "kit" / "data.yaml"
    yaml.write_text("train: [VOC2007/ImageSets/Main/train.txt, VOC2012/ImageSets/Main/train.txt]\n")
    split(yaml, tmp_path / "out", "percent=75")
    samples = load_data(yaml, "train").samples
    chosen, _ = choose_labeled(samples, "75%", 0, 2)
    assert len({samples[i].path.name for i in chosen}) < len(chosen) == 3
    assert choose_labeled(samples, str(tmp_path / "out" / "75percent" / "fold0"), 0, 2)[0] == chosen


def test_real_sets_survive_the_way_through_files(real_data, tmp_path: Path) -> None:
    for name in ("bccd", "aquarium"):
        yaml, folder = real_data(name)
        split(yaml, tmp_path / name, "percent=100", f"data_path={folder}")
        before = {s.path: s for s in load_data(yaml, "train", folder).samples}
        after = load_data(tmp_path / name / "100percent" / "fold0" / "data.yaml", "train", strict=True).samples
        assert {s.path for s in after} == before.keys()
        for s in after:
            assert (s.boxes == before[s.path].boxes).all()
            assert (s.labels == before[s.path].labels).all()


@given(st.lists(st.floats(0, 4000, width=32), min_size=2, max_size=2, unique=True))
def test_numbers_add_up_to_what_was_read(side: list[float]) -> None:
    """x and x + width, in decimals as written, mean the same float32 numbers as before."""
    low, high = sorted(side)
    if high < 0.01:  # of a pixel: finer than the nine digits written
        return
    x, far = _decimal(np.array([low, high], np.float32))
    width = float(np.round(far - x, 9))
    assert np.float32(x) == np.float32(low)
    assert np.float32(float(x) + width) == np.float32(high)


# ----------------------------------------------------------------- manifest


def test_manifest(tmp_path: Path) -> None:
    yaml = coco_sea(tmp_path / "sea")
    split(yaml, tmp_path / "out", "percent=[10,50]", "folds=2")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    source = tmp_path / "sea" / "annotations" / "instances_train2017.json"
    assert manifest["source"]["files"] == [
        {
            "file": "annotations/instances_train2017.json",
            "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        }
    ]
    assert manifest["seed"] == 0
    assert [s["name"] for s in manifest["splits"]] == [
        f"{p}percent/fold{k}" for p, k in ((10, 0), (10, 1), (50, 0), (50, 1))
    ]
    for s in manifest["splits"]:
        for name, told in s["files"].items():
            file = tmp_path / "out" / s["name"] / name
            content = json.loads(file.read_text())
            assert told["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
            assert told["images"] == len(content["images"])
            if name == "labeled.json":
                name_of = {c["id"]: c["name"] for c in content["categories"]}
                counts = dict.fromkeys(name_of.values(), 0)
                for a in content["annotations"]:
                    counts[name_of[a["category_id"]]] += 1
                assert told["classes"] == counts
                assert told["boxes"] == sum(counts.values())


def test_the_content_hash_sees_a_box_that_moved(tmp_path: Path) -> None:
    folder = VocFolder(tmp_path / "voc")
    hashes = []
    for side in (40, 39):
        folder.xml("a", [("pike", 1, 1, side, 30, 0)])
        split(folder.yaml, tmp_path / f"out{side}", "percent=50")
        source = json.loads((tmp_path / f"out{side}" / "manifest.json").read_text())["source"]
        hashes.append((source["files"][0]["sha256"], source["content_sha256"]))
    assert hashes[0][0] == hashes[1][0]  # the list of names is the same
    assert hashes[0][1] != hashes[1][1]


# ----------------------------------------------------------------- sparse


@pytest.mark.parametrize("kind", ["easy", "hard", "extreme", "50miss"])
def test_sparse_parts_add_up(tmp_path: Path, kind: str) -> None:
    yaml = coco_sea(tmp_path / "sea", crowd_only=(1, 2))
    source = json.loads((tmp_path / "sea" / "annotations" / "instances_train2017.json").read_text())
    split(yaml, tmp_path / "out", f"sparse={kind}")
    folder = tmp_path / "out" / kind / "fold0"
    left, gone = (json.loads((folder / f"{n}.json").read_text()) for n in ("labeled", "erased"))
    assert len(left["images"]) == len(source["images"])
    ids = [[a["id"] for a in part["annotations"]] for part in (left, gone)]
    assert sorted(ids[0] + ids[1]) == list(range(1, len(source["annotations"]) + 1))
    assert gone["annotations"]
    assert {a["image_id"] for a in gone["annotations"]} == {i["id"] for i in gone["images"]}
    assert not any(a["iscrowd"] for a in gone["annotations"])
    own = load_data(folder / "data.yaml", "train", strict=True)
    assert sum(len(s.boxes) for s in own.samples) == len(ids[0])
    assert len(load_data(folder / "data.yaml", "val")) == len(source["images"])


# ----------------------------------------------------------------- the papers' lists


def test_canonical_positions_count_images_with_a_box(tmp_path: Path) -> None:
    """Images 0, 3 and 7 have no box that is not crowd: position 0 is image 1, position 2 image 4."""
    yaml = coco_sea(tmp_path / "sea", crowd_only=(0, 3, 7))
    lists = {"10.0": {"0": [0, 2], "1": [20, 1]}, "50.0": {"0": [0, 2, 4, 6], "1": [5, 3, 1]}}
    file = tmp_path / "list.txt"
    file.write_text(json.dumps(lists))
    words = [f"canonical={file}", "canonical_images=21"]
    split(yaml, tmp_path / "out", *words, "percent=[10,50]", "folds=2")
    shown = {}
    for s in json.loads((tmp_path / "out" / "manifest.json").read_text())["splits"]:
        labeled = json.loads((tmp_path / "out" / s["name"] / "labeled.json").read_text())
        shown[s["name"]] = [(i["id"] - 10) // 3 for i in labeled["images"]]
    assert shown == {
        "10percent/fold0": [1, 4],
        "10percent/fold1": [2, 23],
        "50percent/fold0": [1, 4, 6, 9],
        "50percent/fold1": [2, 5, 8],
    }
    rest = json.loads((tmp_path / "out" / "10percent" / "fold0" / "unlabeled.json").read_text())
    assert len(rest["images"]) == 22  # those without a box are images, too


@pytest.mark.parametrize(
    ("lists", "words", "expected"),
    [
        (
            {"10.0": {"0": [0, 2]}},
            [],
            "has 22 images with a box that is not crowd, but .* among 117,266, those of COCO",
        ),
        ({"10.0": {"0": [0, 2]}}, ["canonical_images=23"], "among 23; use the whole"),
        ({"10.0": {"0": [0, 22]}}, ["canonical_images=22"], "position 22 is beyond the 22 images"),
        ({"10.0": {"0": [0]}}, ["canonical_images=22", "percent=1"], "no list for percent=1; there are 10"),
        ({"10.0": {"0": [0]}}, ["canonical_images=22", "folds=2"], "10 % has 1 lists; ask for fewer"),
        ({"10.0": {"0": [0, 0]}}, [], "COCO_supervision.txt"),
        ({"ten": {"0": [0]}}, [], "COCO_supervision.txt"),
        ({"10.0": [1, 2]}, [], "COCO_supervision.txt"),
        ([1, 2], [], "COCO_supervision.txt"),
        ({"10.0": {"0": [-1]}}, [], "COCO_supervision.txt"),
    ],
)
def test_lists_that_do_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lists: Any, words: list[str], expected: str
) -> None:
    yaml = coco_sea(tmp_path / "sea", crowd_only=(0, 3))
    (tmp_path / "list.txt").write_text(json.dumps(lists))
    words = ["percent=10", *words] if not any(w.startswith("percent") for w in words) else words
    message = refused(capsys, f"data={yaml}", f"out={tmp_path / 'out'}", f"canonical={tmp_path / 'list.txt'}", *words)
    assert re.search(expected, message), message
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_list_needs_one_coco_file_and_all_of_its_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "list.txt").write_text(json.dumps({"10.0": {"0": [0, 2]}}))
    words = [f"canonical={tmp_path / 'list.txt'}", "canonical_images=24", "percent=10", f"out={tmp_path / 'out'}"]
    voc = VocFolder(tmp_path / "voc")
    assert "counts images of one COCO JSON" in refused(capsys, f"data={voc.yaml}", *words)
    yaml = coco_sea(tmp_path / "sea")
    (tmp_path / "sea" / "train2017" / "002.png").unlink()
    assert "1 of the 2 images" in refused(capsys, f"data={yaml}", *words)


# ----------------------------------------------------------------- refusals


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    yaml = coco_sea(tmp_path / "sea")
    (tmp_path / "out").mkdir()
    split(yaml, tmp_path / "out", "percent=50")  # an empty folder is as good as none
    before = digests(tmp_path / "out")
    assert "is not an empty folder" in refused(capsys, f"data={yaml}", f"out={tmp_path / 'out'}", "percent=10")
    assert digests(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["percent=0"], "a share lies above 0"),
        (["percent=[50,101]"], "percent=101"),
        (["percent=ten"], "percent='ten' does not fit"),
        (["sparse=hard", "percent=10"], "leave out percent"),
        (["sparse=soft"], "'easy', 'hard', 'extreme' or '50miss'"),
        (["canonical=gone.txt", "canonical_images=24"], "there is no such file"),
        (["canonical=gone.txt", "seed=1"], "leave out seed"),
        (["kind=percent"], "'kind' is not a valid argument"),
    ],
)
def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], expected: str) -> None:
    yaml = coco_sea(tmp_path / "sea")
    assert expected in refused(capsys, f"data={yaml}", f"out={tmp_path / 'out'}", *words)
    assert [p.name for p in tmp_path.iterdir()] == ["sea"]  # not even half of a split


def test_images_outside_of_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    yaml = coco_sea(tmp_path / "sea")
    (tmp_path / "sea" / "cfg").mkdir()
    yaml.write_text(f"path: cfg\ntrain: {tmp_path}/sea/annotations/instances_train2017.json\n")
    assert "lies outside of" in refused(capsys, f"data={yaml}", f"out={tmp_path / 'out'}")
