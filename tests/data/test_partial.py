"""Partly labelled images: which they are is known from the data YAML to the batch, and in new splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from small_sets import CocoFolder, YoloFolder, picture, refusal

import ssod.data.annotations.coco_parse as coco_parse
from ssod.cli import main
from ssod.data.annotations.sources import find_parts, load_data, read_data_yaml
from ssod.data.check.doctor import check_data
from ssod.data.check.doctor_text import as_json, page
from ssod.data.check.findings import findings
from ssod.data.loader import StepLoader, build_loader
from ssod.data.samples import Sample, SampleTable
from ssod.data.split.splits import choose_labeled
from ssod.data.views.transforms import pipeline

NAMES = "names: [carp, pike]\n"


@pytest.fixture
def mixed(yolo_folder: YoloFolder) -> YoloFolder:
    """train: a, b, c of YOLO; partial: d, e of COCO; unlabeled: f."""
    root = yolo_folder.root
    content: dict[str, Any] = {"categories": [{"id": 4, "name": "carp"}, {"id": 9, "name": "pike"}], "annotations": []}
    content["images"] = [
        {"id": i, "file_name": f"{name}.png", "width": 40, "height": 30} for i, name in ((1, "d"), (2, "e"))
    ]
    for image in (1, 2):
        box = {"bbox": [5, 5, 10, 10], "area": 100, "iscrowd": 0}
        content["annotations"].append(box | {"id": image, "image_id": image, "category_id": 9})
    for i, name in enumerate("def"):
        picture(root / ("pool" if name == "f" else "more") / f"{name}.png", seed=10 + i)
    (root / "more" / "some.json").write_text(json.dumps(content))
    yolo_folder.yaml.write_text(f"train: images/train\npartial: more/some.json\nunlabeled: pool\n{NAMES}")
    return yolo_folder


def told(samples: SampleTable) -> dict[str, bool]:
    return {s.path.stem: s.complete for s in samples}


# ----------------------------------------------------------------- from the YAML to samples


def test_train_is_of_both_first_the_complete_ones(mixed: YoloFolder) -> None:
    data = load_data(mixed.yaml, "train", strict=True)
    assert told(data.samples) == {"a": True, "b": True, "c": True, "d": False, "e": False}
    assert data.samples.complete.tolist() == [True, True, True, False, False]
    assert data.samples.labeled.all()
    assert (data.format, data.split) == ("YOLO + COCO", "train")
    assert data.samples.ids.tolist() == [1, 2, 3, 4, 5]  # both count from 1, so they are counted anew
    assert [s.labels.tolist() for s in data.samples] == [[0], [1], [0], [1], [1]]
    assert load_data(mixed.yaml, "unlabeled").samples.complete.all()
    assert [p.complete for p in find_parts(read_data_yaml(mixed.yaml), "train")] == [True, False]


def test_partial_alone_and_as_a_list(mixed: YoloFolder) -> None:
    mixed.yaml.write_text(f"partial: [more/some.json, images/train]\n{NAMES}")
    assert told(load_data(mixed.yaml, "train").samples) == dict.fromkeys("deabc", False)
    assert read_data_yaml(mixed.yaml).splits == {"train": ["more/some.json", "images/train"]}
    mixed.yaml.write_text("partial: more/some.json\n")  # names are those of its annotations
    data = load_data(mixed.yaml, "train")
    assert (len(data), data.names) == (2, ["carp", "pike"])


def test_the_flag_stays_with_the_image(mixed: YoloFolder) -> None:
    samples = load_data(mixed.yaml, "train").samples
    flags = samples.complete.tolist()
    assert samples.select([4, 0, 3]).complete.tolist() == [False, True, False]
    assert samples[1:4].complete.tolist() == [True, True, False]
    assert samples.renumbered().complete.tolist() == flags
    assert samples.without_labels().complete.tolist() == flags
    assert SampleTable.join([samples[3:], samples[:1]]).complete.tolist() == [False, False, True]
    assert SampleTable.of(list(samples)).complete.tolist() == flags


def test_the_kept_copy_of_an_annotation_file_serves_both_keys(
    coco_folder: CocoFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept of a JSON does not know under which key it stands; nor does a table that another shares."""
    monkeypatch.setenv("SSOD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(coco_parse, "CACHE_FROM", 0)
    yaml_file = coco_folder.write()
    assert load_data(yaml_file, "train").samples.complete.all()
    assert list((tmp_path / "cache").rglob("*.npz"))
    yaml_file.write_text(yaml_file.read_text().replace("train:", "partial:"))
    partly = load_data(yaml_file, "train").samples
    assert not partly.complete.any()
    plain = SampleTable.of([Sample.unlabeled(Path("a.png"), 1, 4, 4)])
    assert not plain.as_partial().complete.any()
    assert plain.complete.all()


def test_refusals_name_the_line(mixed: YoloFolder) -> None:
    root = mixed.root
    mixed.yaml.write_text(f"train: images/train\npartial: gone\n{NAMES}")
    assert "'partial': " in refusal(mixed.yaml)
    mixed.yaml.write_text(f"train: images/train\npartial: images/train\n{NAMES}")
    assert "'train' and 'partial': two of its paths hold the image" in refusal(mixed.yaml)
    mixed.yaml.write_text("train: images/train\npartial: more/some.json\nnames: [pike, carp]\n")
    assert "The class lists differ" in refusal(mixed.yaml)
    mixed.yaml.write_text(f"train: images/train\npartial: 5\n{NAMES}")
    assert "'partial' must be one path" in refusal(mixed.yaml)
    mixed.yaml.write_text(f"train: images/train\npartail: more/some.json\n{NAMES}")
    assert "Did you mean 'partial'?" in refusal(mixed.yaml)
    (root / "images" / "none").mkdir()
    (root / "labels" / "none").mkdir()
    mixed.yaml.write_text(f"train: images/train\npartial: images/none\n{NAMES}")
    assert "point 'partial' at data" in refusal(mixed.yaml)


def test_a_share_is_drawn_over_all_images(mixed: YoloFolder) -> None:
    """4 of 5 images: whichever is left out, one of the partly labelled ones is in; over seeds each is left out once."""
    samples = load_data(mixed.yaml, "train").samples
    left_out = set()
    for seed in range(40):
        chosen, rest = choose_labeled(samples, "80%", seed, 2)
        assert not samples.select(chosen).complete.all()
        left_out |= set(rest)
    assert left_out == {0, 1, 2, 3, 4}


# ----------------------------------------------------------------- in the loader


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Six images of one colour each: the partly labelled ones red, the complete ones blue."""
    folder = tmp_path_factory.mktemp("coloured")
    made = []
    for i in range(6):
        partial = i % 3 == 0
        h, w = ((40, 60), (60, 40), (48, 48))[i % 3]
        path = folder / f"{i}.png"
        Image.new("RGB", (w, h), (250, 0, 0) if partial else (0, 0, 250)).save(path)
        box = np.array([[4, 4, 30, 30]], np.float32)
        made.append(
            Sample(path, i + 1, w, h, box, np.array([0]), np.array([False]), labeled=True, complete=not partial)
        )
    return made


def loader(samples: list[Sample], labeled_view: Any, **options: Any) -> StepLoader:
    read = pipeline(labeled_view, 64, "labeled"), pipeline("weak", 64, "weak"), pipeline("weak", 64)
    given: dict[str, Any] = {"batch": 3, "batch_unlabeled": 2, "imgsz": 64, "seed": 5, "start_step": 0, "steps": 8}
    given |= {"workers": 0, **options}
    return build_loader(samples, samples, labeled_view=read[0], weak=read[1], strong=read[2], **given)


def shows_red(image: torch.Tensor) -> bool:
    red, green, _ = image.int()  # padding and what a mosaic leaves empty is grey: as much green as red
    return bool(((red > 60) & (green < 40)).any())


MIXED_VIEWS = [
    ["resize"],
    [{"mosaic": 0.7}, {"resize": {"scale": [1, 1]}}],
    [{"mixup": 0.7}, "resize"],
    [{"mosaic": 0.3}, {"mixup": 0.5}, "resize"],
]


@pytest.mark.parametrize("view", MIXED_VIEWS)
def test_a_view_is_complete_where_no_partly_labelled_image_is_seen(coloured: list[Sample], view: Any) -> None:
    flags = []
    for batch in loader(coloured, view):
        complete = batch.labeled.complete
        assert complete is not None
        assert complete == [not shows_red(image) for image in batch.labeled.images]
        assert batch.weak is not None
        assert batch.strong is not None
        assert batch.weak.complete is batch.strong.complete is None
        flags += complete
    assert True in flags
    assert False in flags


@pytest.mark.parametrize("workers", [0, 2])
def test_every_view_of_an_image_says_the_same(coloured: list[Sample], workers: int) -> None:
    seen = []
    for batch in loader(coloured, ["weak", "strong"], workers=workers):
        complete = batch.labeled.complete
        assert complete is not None
        assert complete == [coloured[i].complete for i in batch.labeled.indices]
        assert complete[:3] == complete[3:]
        assert batch.to("cpu").labeled.complete is not None
        seen.append(complete)
    assert len(seen) == 8


@pytest.mark.parametrize("workers", [0, 1])
def test_where_all_are_complete_nothing_is_said(coloured: list[Sample], workers: int) -> None:
    whole = [s for s in coloured if s.complete]
    assert all(batch.labeled.complete is None for batch in loader(whole, "weak", steps=2, workers=workers))


# ----------------------------------------------------------------- splits


def split(yaml_file: Path, out: Path, *words: str) -> None:
    assert main(["split", f"data={yaml_file}", f"out={out}", *words]) == 0


def test_a_sparse_set_is_partly_labelled(mixed: YoloFolder, tmp_path: Path) -> None:
    split(mixed.yaml, tmp_path / "out", "sparse=hard")
    file = tmp_path / "out" / "hard" / "fold0" / "data.yaml"
    content = yaml.safe_load(file.read_text())
    assert list(content) == ["path", "partial", "unlabeled", "names"]
    assert content["partial"].endswith("hard/fold0/labeled.json")
    assert told(load_data(file, "train", strict=True).samples) == dict.fromkeys("abcde", False)


def test_a_share_of_a_partly_labelled_set_is_partly_labelled(mixed: YoloFolder, tmp_path: Path) -> None:
    split(mixed.yaml, tmp_path / "sparse", "sparse=easy")
    sparse = tmp_path / "sparse" / "easy" / "fold0" / "data.yaml"
    split(sparse, tmp_path / "share", "percent=40")
    samples = load_data(tmp_path / "share" / "40percent" / "fold0" / "data.yaml", "train").samples
    assert samples.complete.tolist() == [False, False]
    split(sparse, tmp_path / "sparser", "sparse=extreme")
    again = load_data(tmp_path / "sparser" / "extreme" / "fold0" / "data.yaml", "train").samples
    assert again.complete.tolist() == [False] * 5


def test_a_share_of_a_mixed_set_is_refused(
    mixed: YoloFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["split", f"data={mixed.yaml}", f"out={tmp_path / 'out'}", "percent=40"]) == 2
    message = capsys.readouterr().err
    assert "one labeled.json cannot hold images of both" in message
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------- the doctor


def test_the_doctor_counts_them(mixed: YoloFolder) -> None:
    report = check_data(mixed.yaml)
    assert [f.what for f in findings(report) if f.kind == "partly labelled"] == ["2 of 5 images are partly labelled"]
    assert "  partly labelled" in page(report)
    splits = json.loads(as_json(report))["splits"]
    assert splits["train"]["images_partly_labeled"] == 2
    assert "images_partly_labeled" not in splits["unlabeled"]
    mixed.yaml.write_text(f"train: images/train\n{NAMES}")
    assert "partly" not in page(check_data(mixed.yaml))
