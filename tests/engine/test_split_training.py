"""What `ssod split` writes is what training draws itself, and `ssod val` shows VOC figures for VOC data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ssod.checkpoint import FORMAT, load_checkpoint, save_checkpoint
from ssod.cli import main
from ssod.config import load_config
from ssod.detectors import build_detector
from ssod.engine.trainer import SemiTrainer


def weights(options: dict[str, Any]) -> dict[str, torch.Tensor]:
    trainer = SemiTrainer(load_config("train", options))
    trainer.train()
    content = load_checkpoint(trainer.folder / "weights" / "last.pt")
    return {f"{n}.{k}": v for n, state in content["networks"].items() for k, v in state.items()}


def test_training_on_a_split_is_training_on_the_share(
    tiny: dict[str, object], shapes_data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "splits"
    assert main(["split", f"data={shapes_data}", f"out={out}", "percent=25"]) == 0
    fold = out / "25percent" / "fold0"
    tiny |= {"iters": 4, "burn_in": 2, "val_interval": 4}
    drawn = weights(tiny | {"labeled": "25%", "seed": 0})
    from_files = weights(tiny | {"data": str(fold / "data.yaml"), "labeled": "all", "name": "files"})
    assert len(drawn) > 10
    for key, value in drawn.items():
        assert torch.equal(value, from_files[key]), key


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tmp_path / "voc" / folder).mkdir(parents=True)
    for name in "abc":
        Image.fromarray(rng.integers(0, 255, (90, 96, 3), dtype=np.uint8)).save(tmp_path / f"voc/JPEGImages/{name}.png")
        annotate(tmp_path / "voc", name, "carp", [1, 1, 20, 20])
    (tmp_path / "voc/ImageSets/Main/val.txt").write_text("a\nb\nc\n")
    (tmp_path / "voc/data.yaml").write_text("val: ImageSets/Main/val.txt\nnames: [carp, pike]\n")
    return tmp_path / "voc" / "data.yaml"


def annotate(root: Path, name: str, label: str, box: list[float]) -> None:
    """First and last pixel, counted from 1, as VOC does."""
    tags = zip(
        ("xmin", "ymin", "xmax", "ymax"), (round(box[0]) + 1, round(box[1]) + 1, *map(round, box[2:])), strict=True
    )
    corners = "".join(f"<{t}>{v}</{t}>" for t, v in tags)
    text = f"<annotation><object><name>{label}</name><bndbox>{corners}</bndbox></object></annotation>"
    (root / "Annotations" / f"{name}.xml").write_text(text)


def test_val_shows_voc_figures_for_voc_data(voc: Path, shapes_data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    detector = build_detector("fcos", 2, "test_resnet", {"fpn_channels": 32, "head_convs": 1})
    content = {"format": FORMAT, "spec": detector.spec, "names": ["carp", "pike"], "imgsz": 96, "use": "student"}
    save_checkpoint(content | {"metrics": {}, "networks": {"student": detector.state_dict()}}, tmp_path / "m.pt")

    def val(name: str, *words: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        common = [f"model={tmp_path / 'm.pt'}", f"data={voc}", "workers=0", "device=cpu", "conf=0", "max_det=1"]
        place = [f"project={tmp_path}", f"name={name}", "save_json=true"]
        assert main(["val", *common, *place, *words]) == 0
        files = [tmp_path / "val" / name / f"{n}.json" for n in ("metrics", "detections")]
        return json.loads(files[0].read_text()), json.loads(files[1].read_text())

    first, found = val("first")
    assert first["figures"]["VOC_AP50"] < 1
    assert len(found) == 3
    for d in found[:2]:  # two of three images are annotated with what the network finds there
        x, y, w, h = d["bbox"]
        annotate(voc.parent, Path(d["file_name"]).stem, ["carp", "pike"][d["category_id"] - 1], [x, y, x + w, y + h])
    annotate(voc.parent, Path(found[2]["file_name"]).stem, ["pike", "carp"][found[2]["category_id"] - 1], [0, 0, 9, 9])
    second, _ = val("second")
    assert 0 < second["figures"]["VOC_AP50"] <= 1
    assert second["figures"]["VOC07_AP50"] >= second["figures"]["VOC_AP50"] - 0.1
    assert set(second["voc"]) == {"carp", "pike"}
    coco, _ = val("coco", "metric=coco")
    assert "voc" not in coco
    assert coco["figures"].keys() == second["figures"].keys() - {"VOC_AP50", "VOC07_AP50"}
