"""Small data sets, one a format, whose parts a test may spoil."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ssod.data.annotations.sources import load_data
from ssod.errors import UserError


def picture(path: Path, width: int = 40, height: int = 30, seed: int = 0) -> Path:
    """A small image of noise; each seed is another image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


class CocoFolder:
    """A COCO data set of two images, 40x30 pixels, whose parts a test changes before `write`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.json = root / "annotations" / "instances_train.json"
        self.yaml = root / "data.yaml"
        self.lines = ["train: annotations/instances_train.json"]
        self.content: dict[str, Any] = {
            "images": [
                {"id": 7, "file_name": "b.png", "width": 40, "height": 30},
                {"id": 3, "file_name": "a.png", "width": 40, "height": 30},
            ],
            "annotations": [
                {"id": 1, "image_id": 7, "category_id": 90, "bbox": [1, 2, 10, 20], "area": 150, "iscrowd": 0},
                {"id": 2, "image_id": 3, "category_id": 5, "bbox": [5, 5, 10.5, 10], "area": 105, "iscrowd": 0},
            ],
            "categories": [{"id": 90, "name": "pike"}, {"id": 5, "name": "carp"}],
        }
        picture(root / "images" / "train" / "a.png", seed=1)
        picture(root / "images" / "train" / "b.png", seed=2)

    def write(self) -> Path:
        self.json.parent.mkdir(exist_ok=True)
        self.json.write_text(json.dumps(self.content), encoding="utf-8")
        self.yaml.write_text("\n".join(self.lines), encoding="utf-8")
        return self.yaml


class YoloFolder:
    """A YOLO data set of three images, 40x30 pixels, whose label files a test rewrites."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.yaml = root / "data.yaml"
        for i, name in enumerate(("a", "b", "c")):
            picture(root / "images" / "train" / f"{name}.png", seed=i)
            self.label(name, f"{i % 2} 0.5 0.5 0.25 0.2\n")
        self.yaml.write_text("train: images/train\nnames: [carp, pike]\n", encoding="utf-8")

    def label(self, name: str, text: str) -> Path:
        path = self.root / "labels" / "train" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path


class VocFolder:
    """A Pascal VOC data set of two images, 40x30 pixels."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.yaml = root / "data.yaml"
        self.list = root / "ImageSets" / "Main" / "train.txt"
        self.list.parent.mkdir(parents=True)
        self.list.write_text("b\na\n", encoding="utf-8")
        self.yaml.write_text("train: ImageSets/Main/train.txt\n", encoding="utf-8")
        for i, (name, label) in enumerate((("a", "pike"), ("b", "carp"))):
            picture(root / "JPEGImages" / f"{name}.png", seed=i)
            self.xml(name, [(label, 1, 1, 40, 30, 0)])

    def xml(self, name: str, objects: list[tuple[str, float, float, float, float, int]], head: str = "") -> Path:
        parts = [f"{head}<annotation><size><width>40</width><height>30</height></size>"]
        for label, x1, y1, x2, y2, difficult in objects:
            corners = f"<xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
            box = f"<difficult>{difficult}</difficult><bndbox>{corners}</bndbox>"
            parts.append(f"<object><name>{label}</name>{box}</object>")
        path = self.root / "Annotations" / f"{name}.xml"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(parts) + "</annotation>", encoding="utf-8")
        return path


def refusal(yaml: Path, split: str = "train") -> str:
    """The one sentence in which `load_data` refuses a data YAML."""
    with pytest.raises(UserError) as caught:
        load_data(yaml, split)
    message = str(caught.value)
    assert "\n" not in message, "one sentence on one line"
    return message
