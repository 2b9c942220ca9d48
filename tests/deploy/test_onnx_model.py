"""Exported models by their runtimes: what is given back, what is refused, and that ONNX needs no torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image
from small_models import NAMES, card, write_model, write_onnx

from ssod import SSOD
from ssod.deploy.asked import fit_of
from ssod.deploy.contract import ForeignModel
from ssod.deploy.onnx_model import CPU, CUDA, TENSORRT, OnnxModel, parse_device
from ssod.errors import UserError

WHITE = np.full((80, 120, 3), 255, np.uint8)
KINDS = ["onnx", "openvino", "torchscript"]
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_onnx(tmp_path_factory.mktemp("models") / "student.onnx", card())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [None, (96, 160)])
def test_every_format_gives_the_same(kind: str, size: tuple[int, int] | None, tmp_path: Path) -> None:
    model = SSOD(write_model(tmp_path, kind, card(size=size)), device="cpu")
    assert model.names == {0: "cat", 1: "dog"}
    assert model.card == card(size=size)
    dark = WHITE // 5 * 3
    first, second, third = model.predict([WHITE, WHITE.transpose(1, 0, 2), dark], conf=0.1)
    np.testing.assert_allclose(first.boxes.xyxy, [[30, 20, 60, 60], [0, 0, 120, 80]], atol=1e-4)
    np.testing.assert_allclose(first.boxes.conf, [1, 0.5], atol=1e-6)
    assert first.boxes.cls.tolist() == [1, 0]
    np.testing.assert_allclose(second.boxes.xyxy, [[20, 30, 40, 90], [0, 0, 80, 120]], atol=1e-4)
    np.testing.assert_allclose(third.boxes.conf, [0.6, 0.3], atol=1e-6)
    assert set(first.speed) == {"preprocess", "inference", "postprocess"}
    assert first.orig_img is WHITE


def test_openvino_by_its_xml(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "openvino", card())
    assert len(SSOD(folder / "model.xml").predict(WHITE)[0]) == 2


def test_a_model_without_sizes(tmp_path: Path) -> None:
    model = SSOD(write_onnx(tmp_path / "x.onnx", card(inputs=("images",)), sized=False))
    # 80 x 120 becomes 64 x 96 at imgsz 96: no padding, so parts of the padded image are parts of the image
    np.testing.assert_allclose(model.predict(WHITE)[0].boxes.xyxy, [[30, 20, 60, 60], [0, 0, 120, 80]], atol=1e-4)


@pytest.mark.parametrize("workers", [0, 3])
def test_batches_and_threads_change_nothing(model: Path, tmp_path: Path, workers: int) -> None:
    rng = np.random.default_rng(0)
    for i, (h, w) in enumerate([(80, 120), (120, 80), (96, 96), (80, 120), (33, 200), (80, 120), (120, 80)]):
        Image.fromarray(rng.integers(0, 60 + 20 * i, (h, w, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "4.png").write_bytes((tmp_path / "4.png").read_bytes()[:500])
    opened = SSOD(model)
    together = opened.predict(tmp_path, batch=3, workers=workers, conf=0.05)
    assert [r.path.name for r in together] == [f"{i}.png" for i in (0, 1, 2, 3, 5, 6)]
    for result in together:
        (alone,) = opened.predict(result.path, conf=0.05)
        np.testing.assert_array_equal(result.boxes.xyxy, alone.boxes.xyxy)
        np.testing.assert_array_equal(result.boxes.conf, alone.boxes.conf)
    with pytest.raises(UserError, match=r"none of the 1 images can be read; the first, .*4\.png"):
        opened.predict(tmp_path / "4.png", workers=workers)


def test_thresholds_are_those_in_the_file_or_stricter(model: Path, tmp_path: Path) -> None:
    opened = SSOD(model)
    assert opened.predict(WHITE, conf=0.6)[0].verbose() == "1 dog"
    assert opened.predict(WHITE, max_det=1)[0].verbose() == "1 dog"
    assert opened.predict(WHITE, classes=["cat"], max_det=1)[0].verbose() == "1 cat"
    assert opened.predict(WHITE, classes=[])[0].verbose() == "nothing found"
    assert len(opened.predict(WHITE, iou=0.6, conf=0.05, max_det=3)[0]) == 2
    dark = WHITE // 5  # scores 0.2 and 0.1
    assert [len(opened.predict(dark, conf=c)[0]) for c in (None, 0.15, 0.05)] == [0, 1, 2], "0.25 unless said"
    picky = SSOD(write_onnx(tmp_path / "x.onnx", card(conf=0.6)))
    assert len(picky.predict(WHITE)[0]) == 1
    for options, words in {
        "conf": (0.01, r"keeps scores of 0.05 and more, so conf=0.01 .* `ssod export \.\.\. conf=0.01`"),
        "iou": (0.5, "has the NMS threshold 0.6 in it, so iou=0.5"),
        "max_det": (4, "gives at most 3 detections of an image, so max_det=4"),
        "classes": (["dgo"], "no class 'dgo'. Did you mean 'dog'"),
    }.items():
        with pytest.raises(UserError, match=words[1]):
            opened.predict(WHITE, **{options: words[0]})  # type: ignore[arg-type]


def test_image_sizes(model: Path, tmp_path: Path) -> None:
    opened = SSOD(model)
    for imgsz, size in ((None, (48, 96)), (64, (32, 64)), ([32, 100], (32, 64))):
        assert fit_of(card(), model, imgsz).resized(50, 100) == size
        np.testing.assert_allclose(opened.predict(WHITE, imgsz=imgsz)[0].boxes.xyxy[0], [30, 20, 60, 60], atol=0.5)
    fixed = SSOD(write_onnx(tmp_path / "x.onnx", card(size=(96, 160))))
    fixed.predict(WHITE, imgsz=160)
    with pytest.raises(UserError, match=r"is fixed at 96 x 160 pixels .* imgsz=640"):
        fixed.predict(WHITE, imgsz=640)


def test_the_other_network_is_not_in_the_file(model: Path) -> None:
    SSOD(model, weights="student")
    with pytest.raises(UserError, match=r"holds the student alone. Leave out weights=teacher"):
        SSOD(model, weights="teacher")


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_others(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ForeignModel, match=r"carries no description by ssod: .* `ssod export model=best.pt`"):
        SSOD(write_model(tmp_path, kind, None), device="cpu")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [0, 0.7])
def test_damaged_files(kind: str, keep: float, tmp_path: Path) -> None:
    path = write_model(tmp_path, kind, card())
    file = path / "model.xml" if path.is_dir() else path
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(UserError, match="or it is cut off") as error:
        SSOD(path, device="cpu")
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_changed_after_the_export(tmp_path: Path) -> None:
    with pytest.raises(ForeignModel, match="has the inputs images, sizes"):
        SSOD(write_onnx(tmp_path / "x.onnx", card(inputs=("images",))))


def test_endings(model: Path, tmp_path: Path) -> None:
    def said(name: str) -> str:
        with pytest.raises(UserError) as error:
            SSOD(tmp_path / name)
        return str(error.value)

    shutil.copy(model, tmp_path / "student.onnx")
    assert "x.onx ends in .onx. Did you mean '.onnx'" in said("x.onx")
    assert "Models are .pt (a checkpoint), .safetensors (one of the zoo's), .onnx, .torchscript, " in said("x.gguf")
    assert "has no ending" in said("best")
    assert "there is no model" in said("studnet.onnx")
    assert "Did you mean 'student.onnx'" in said("studnet.onnx")
    assert "there is no checkpoint" in said("best.pt")
    (tmp_path / "x_openvino").mkdir()
    assert "holds 0 .xml files" in said("x_openvino")


def test_devices(model: Path, tmp_path: Path) -> None:
    assert parse_device("auto") == (None, 0)
    assert parse_device("cpu") == (CPU, 0)
    assert parse_device("cuda") == parse_device(0) == parse_device("0") == (CUDA, 0)
    assert parse_device("cuda:1") == parse_device(1) == (CUDA, 1)
    assert parse_device("tensorrt") == (TENSORRT, 0)
    for wrong in ("gpu", "cuda:x", "cpu:1", "auto:1", -1):
        with pytest.raises(UserError, match=f"device={wrong} is not a device"):
            parse_device(wrong)
    assert OnnxModel(model, "cpu").device == "CPU"
    if CUDA not in onnxruntime.get_available_providers():
        with pytest.raises(UserError, match=r"has no CUDAExecutionProvider, .*pip install onnxruntime-gpu"):
            OnnxModel(model, "cuda")
        with pytest.raises(UserError, match="has no TensorrtExecutionProvider"):
            OnnxModel(model, "tensorrt")
    with pytest.raises(UserError, match="OpenVINO models run on the CPU"):
        SSOD(write_model(tmp_path, "openvino", card()), device="cuda")


HEAVY = ("torch", "torchvision", "timm", "pydantic", "yaml", "matplotlib", "scipy", "tqdm", "pandas", "pycocotools")
BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError("blocked: " + name)

sys.meta_path.insert(0, Blocker())
"""


def run_without(packages: tuple[str, ...], code: str, *words: str) -> Any:
    program = BLOCKED.format(blocked=set(packages)) + code
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.run([sys.executable, "-c", program, *words], env=env, capture_output=True, text=True, timeout=60)


def test_an_onnx_file_needs_neither_torch_nor_anything_of_training(model: Path, tmp_path: Path) -> None:
    Image.fromarray(WHITE).save(tmp_path / "a.png")
    code = """
from ssod import SSOD
model = SSOD(sys.argv[1])
(result,) = model.predict(sys.argv[2])
result.save(sys.argv[2] + ".drawn.jpg")
print(result, result.boxes.xyxy.tolist(), model.card.detector, result.to_json())
"""
    done = run_without(HEAVY, code, str(model), str(tmp_path / "a.png"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Results(a.png: 1 dog, 1 cat) [[30.0, 20.0, 60.0, 60.0]")
    assert (tmp_path / "a.png.drawn.jpg").is_file()


def test_predict_on_the_command_line_needs_no_torch(model: Path, tmp_path: Path) -> None:
    Image.fromarray(WHITE).save(tmp_path / "a.png")
    code = "from ssod.cli import main\nsys.exit(main(sys.argv[1:]))"
    words = [f"model={model}", f"source={tmp_path}", f"project={tmp_path / 'runs'}", "save_txt=true", "workers=2"]
    done = run_without(("torch", "torchvision", "timm", "matplotlib", "scipy"), code, "predict", *words)
    assert done.returncode == 0, done.stderr
    assert "1 dog, 1 cat" in done.stdout
    assert "2 objects on 1 images" in done.stdout
    folder = tmp_path / "runs" / "predict" / "exp"
    assert (folder / "a.jpg").is_file()
    assert len((folder / "labels" / "a.txt").read_text().splitlines()) == len(NAMES)


def test_without_onnxruntime(model: Path) -> None:
    code = """
from ssod import SSOD, UserError
try:
    SSOD(sys.argv[1])
except UserError as error:
    print(error)
"""
    done = run_without(("onnxruntime",), code, str(model))
    assert "pip install onnxruntime" in done.stdout, done.stderr
