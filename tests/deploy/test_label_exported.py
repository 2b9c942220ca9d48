"""`ssod label` with exported models: labels from the file alone, and what is not in the file is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_models import card, write_model

from ssod.config import load_config
from ssod.deploy.label import label
from ssod.deploy.onnx_model import device_of_rank
from ssod.errors import UserError


def bright(folder: Path) -> Path:
    """Three images of one colour each: 100 %, 60 % and 10 % of white, all lighter than what pads them but the last."""
    folder.mkdir()
    for name, value in (("a", 255), ("b", 153), ("c", 26)):
        Image.fromarray(np.full((80, 120, 3), value, np.uint8)).save(folder / f"{name}.png")
    return folder


@pytest.mark.parametrize("kind", ["onnx", "openvino", "torchscript"])
@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_an_exported_model_labels(kind: str, tmp_path: Path) -> None:
    model = write_model(tmp_path, kind, card(size=(80, 120), multiple=1, iou=0.45, imgsz=120))
    given = {"model": str(model), "source": str(bright(tmp_path / "pool")), "out": str(tmp_path / "out")}
    done = label(load_config("label", given | {"workers": 0, "device": "cpu", "conf": 0.4}))
    assert done is not None
    assert done.counts.boxes_of_class == {"cat": 1, "dog": 2}  # scores 1 and 1/2, 0.6 and 0.3, 0.1 and 0.05
    content = json.loads((tmp_path / "out" / "annotations" / "instances_train.json").read_text())
    assert content["annotations"][0]["bbox"] == [30, 20, 30, 40]
    settings = json.loads((tmp_path / "out" / "label.json").read_text())["settings"]
    assert (settings["iou"], settings["max_det"], settings["imgsz"]) == (0.45, 3, 120), "what is in the file"
    if kind == "openvino":
        weights = model / "model.bin"
        weights.write_bytes(weights.read_bytes() + b"more")
        with pytest.raises(UserError, match="holds labels made with model_sha256="):
            label(load_config("label", given | {"workers": 0, "device": "cpu", "conf": 0.4}))


def test_what_an_exported_model_cannot_give_is_refused(tmp_path: Path) -> None:
    model = write_model(tmp_path, "onnx", card(conf=0.6))
    pool = bright(tmp_path / "pool")
    for options, sentence in (
        ({"conf": {"cat": 0.7, "default": 0.5}}, "keeps scores of 0.6 and more, so conf=0.5 cannot be had"),
        ({"iou": 0.5}, "has the NMS threshold 0.6 in it"),
        ({"max_det": 50}, "gives at most 3 detections"),
        ({"weights": "teacher"}, "holds the student alone"),
        ({"device": "tpu"}, "device=tpu is not a device"),
    ):
        given = {"model": str(model), "source": str(pool), "out": str(tmp_path / "out"), "workers": 0}
        with pytest.raises(UserError, match=sentence):
            label(load_config("label", given | options))
    done = label(load_config("label", given | {"device": "cpu"}))  # its own threshold is above the default of 0.5
    assert done is not None
    settings = json.loads((tmp_path / "out" / "label.json").read_text())["settings"]
    assert settings["conf"] == {"cat": 0.6, "dog": 0.6}
    assert done.counts.boxes_of_class == {"cat": 0, "dog": 2}


def test_ranks_of_an_onnx_model_take_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [device_of_rank(d, 3) for d in ("cuda", "cpu", "cuda:1", 0)] == ["cuda:3", "cpu", "cuda:1", 0]
    import onnxruntime

    for providers, device in ((["CUDAExecutionProvider", "CPUExecutionProvider"], "cuda:3"), (["CPU"], "auto")):
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda p=providers: p)
        assert device_of_rank("auto", 3) == device
