"""Small real things that several tests share: a drawn data set, a tiny training config."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads, as the package itself does

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssod.data.shapes import NAMES, SIZE, draw_image

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shapes_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data YAML of 24 train and 8 val drawn images in COCO form."""
    root = tmp_path_factory.mktemp("shapes")
    for number, (split, count) in enumerate({"train": 24, "val": 8}.items()):
        (root / "images" / split).mkdir(parents=True)
        images, annotations = [], []
        for index in range(count):
            picture, boxes, labels = draw_image(np.random.default_rng([7, number, index]))
            Image.fromarray(picture).save(root / "images" / split / f"{index}.png")
            images.append({"id": index + 1, "file_name": f"{index}.png", "width": SIZE, "height": SIZE})
            for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels.tolist(), strict=True):
                bbox = [x1, y1, x2 - x1, y2 - y1]
                row = {"id": len(annotations) + 1, "image_id": index + 1, "category_id": label + 1, "bbox": bbox}
                annotations.append(row | {"area": bbox[2] * bbox[3], "iscrowd": 0})
        (root / "annotations").mkdir(exist_ok=True)
        categories = [{"id": i + 1, "name": n} for i, n in enumerate(NAMES)]
        truth = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(truth))
    (root / "data.yaml").write_text("path: .\ntrain: images/train\nval: images/val\n")
    return root / "data.yaml"


@pytest.fixture
def tiny(shapes_data: Path, tmp_path: Path) -> dict[str, object]:
    """Overrides of a training run that takes seconds: six steps, three of them burn-in, at 64 pixels."""
    return {
        "data": str(shapes_data),
        "labeled": "25%",
        "detector": {"name": "fcos", "fpn_channels": 32, "head_convs": 1},
        "backbone": "test_resnet",
        "strategy": {"name": "mean_teacher", "tau": 0.02, "tau_low": 0.01},
        "imgsz": 64,
        "iters": 6,
        "burn_in": 3,
        "batch": 2,
        "workers": 0,
        "amp": False,
        "ema_decay": 0.5,
        "warmup_iters": 0,
        "val_interval": 3,
        "save_interval": 1,
        "plots": False,
        "project": str(tmp_path / "runs"),
        "device": "cpu",
    }
