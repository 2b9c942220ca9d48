"""File and folder names: any alphabet is read, and none leads out of the data folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from small_sets import CocoFolder, VocFolder, YoloFolder, picture, refusal

from ssod.data.annotations.sources import load_data


@pytest.mark.parametrize("name", ["with space", "рыба-魚-ö", "a'b#c%20[x]"])
@pytest.mark.fault(24)
def test_any_folder_name(tmp_path: Path, name: str) -> None:
    for make in (CocoFolder, YoloFolder, VocFolder):
        folder = make(tmp_path / name / make.__name__)
        plain = make(tmp_path / "plain" / make.__name__)
        if isinstance(folder, CocoFolder):
            folder.write()
            plain.write()
        odd, same = (load_data(f.yaml, "train") for f in (folder, plain))
        assert [s.path.name for s in odd.samples] == [s.path.name for s in same.samples]
        for a, b in zip(odd.samples, same.samples, strict=True):
            assert (a.boxes == b.boxes).all()


@pytest.mark.fault(24)
def test_any_file_name(coco_folder: CocoFolder, voc_folder: VocFolder) -> None:
    name = "рыба 魚 [1].png"
    picture(coco_folder.root / "images" / "train" / name)
    coco_folder.content["images"][0]["file_name"] = name
    assert load_data(coco_folder.write(), "train").samples[1].path.name == name
    picture(voc_folder.root / "JPEGImages" / name)
    voc_folder.xml(name[:-4], [("carp", 1, 1, 5, 5, 0)])
    voc_folder.list.write_text(f"a\n{name[:-4]}\n", encoding="utf-8")
    assert load_data(voc_folder.yaml, "train").samples[1].path.name == name


@pytest.mark.parametrize("name", ["../outside.png", "x/../../../outside.png", "/etc/outside.png", "C:\\a.png", "..\\a"])
@pytest.mark.fault(29)
def test_names_that_lead_out(coco_folder: CocoFolder, voc_folder: VocFolder, name: str) -> None:
    picture(coco_folder.root / "images" / "outside.png")
    coco_folder.content["images"][1]["file_name"] = name
    voc_folder.list.write_text(f"a\n{name}\n")
    for yaml in (coco_folder.write(), voc_folder.yaml):
        message = refusal(yaml)
        assert "leads out of the data folder" in message
        assert repr(name) in message


@pytest.mark.fault(29)
def test_symbolic_link_that_leads_out(coco_folder: CocoFolder, voc_folder: VocFolder, tmp_path: Path) -> None:
    outside = picture(tmp_path / "outside" / "secret.png")
    for link in (coco_folder.root / "images" / "train" / "a.png", voc_folder.root / "JPEGImages" / "a.png"):
        link.unlink()
        os.symlink(outside, link)
        assert link.is_file(), "the fault is not there: the link leads nowhere"
    for yaml in (coco_folder.write(), voc_folder.yaml):
        assert "symbolic link" in refusal(yaml)

    os.symlink(outside.parent, coco_folder.root / "images" / "train" / "sub")
    coco_folder.content["images"][1]["file_name"] = "sub/secret.png"
    assert "symbolic link" in refusal(coco_folder.write())


def test_links_inside_and_to_whole_folders_are_fine(coco_folder: CocoFolder, tmp_path: Path) -> None:
    images = coco_folder.root / "images" / "train"
    (images / "a.png").rename(images / "real.png")
    os.symlink("real.png", images / "a.png")
    assert len(load_data(coco_folder.write(), "train")) == 2
    images.rename(tmp_path / "big disk")
    os.symlink(tmp_path / "big disk", images)
    assert len(load_data(coco_folder.yaml, "train")) == 2
