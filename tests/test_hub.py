"""torch.hub, really: from the checkout, a clone and an unpacked archive, each in a process without a network."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from ssod import zoo
from ssod.checkpoint import FORMAT, save_checkpoint
from ssod.detectors import DETECTORS, build_detector
from ssod.detectors.fetch import sha256
from ssod.packed import write_packed

ROOT = Path(__file__).resolve().parent.parent
# Nothing may be connected to; the working folder is not the repository, and its `ssod` is asked for by its file.
BEFORE = """
import socket, sys
def refuse(*_, **__):
    raise AssertionError("the network was asked for")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import torch
torch.set_num_threads(1)
repo = sys.argv[1]
def load(name, *args, **kwargs):
    return torch.hub.load(repo, name, *args, source="local", trust_repo=True, **kwargs)
def listed():  # by the rule of torch.hub.list, which itself takes no folder
    sys.path.insert(0, repo)
    import hubconf
    return [n for n, v in vars(hubconf).items() if callable(v) and not n.startswith("_")]
"""
SMALL = 'num_classes=3, backbone="mobilenetv3_small_050", fpn_channels=32'


# Other packages that ssod knows of cannot be imported; pyyaml comes with timm.
WITHOUT = """
for name in ("pycocotools", "matplotlib", "imagehash", "onnx", "onnxruntime", "cv2", "scipy"):
    sys.modules[name] = None
"""


def hub(repo: Path, code: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", BEFORE + code, str(repo)], cwd=cwd, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def files_of_git() -> list[str]:
    """What a commit of the working tree would hold."""
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "hubconf.py", "ssod", "cfg"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of the working tree as it is, committed."""
    folder = tmp_path_factory.mktemp("origin")
    for name in files_of_git():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    own = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all"]):
        subprocess.run([*own, *words], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture(
    scope="session", params=["checkout", *(pytest.param(p, marks=pytest.mark.slow) for p in ("clone", "zip"))]
)
def repo(request: pytest.FixtureRequest, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "checkout":
        return ROOT
    folder = tmp_path_factory.mktemp(request.param) / "ssod-main"
    if request.param == "clone":
        subprocess.run(["git", "clone", "-q", str(repository), str(folder)], check=True)
        return folder
    archive = folder.parent / "main.zip"
    subprocess.run(["git", "archive", "--prefix=ssod-main/", "-o", str(archive), "HEAD"], cwd=repository, check=True)
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder.parent)
    return folder


def test_each_way_to_get_the_repository_gives_a_detector(repo: Path, tmp_path: Path) -> None:
    """With what `dependencies` names, and no more of it than is needed."""
    code = f"""
model = load("fcos", {SMALL})
import ssod, pathlib
assert pathlib.Path(ssod.__file__).resolve().is_relative_to(pathlib.Path(repo).resolve()), ssod.__file__
found = model.eval()(torch.zeros(2, 3, 64, 96, dtype=torch.uint8), conf=0.0)
assert isinstance(model, torch.nn.Module) and len(found) == 2 and found[0].boxes.shape[1] == 4
sys.path.insert(0, repo)
import hubconf
assert set(hubconf.dependencies) <= set(sys.modules), set(hubconf.dependencies) - set(sys.modules)
print(model.num_classes)
"""
    assert hub(repo, WITHOUT + code, tmp_path).split() == ["3"]
    assert list(tmp_path.iterdir()) == []


def test_every_detector_is_an_entry_point_and_nothing_else_is_listed(tmp_path: Path) -> None:
    code = f"""
print(*listed())
for name in ("retinanet", "faster_rcnn"):
    print(type(load(name, {SMALL})).__name__)
detr = load("deformable_detr", num_classes=3, backbone="mobilenetv3_small_050", width=32, heads=4, queries=20)
print(type(detr).__name__)
"""
    listed, *kinds = hub(ROOT, code, tmp_path).splitlines()
    assert set(listed.split()) == {*DETECTORS, "custom", "predictor", *zoo.entries()}
    assert kinds == ["RetinaNet", "FasterRCNN", "DeformableDETR"]


def test_importing_hubconf_does_nothing_else(tmp_path: Path) -> None:
    """It reads a table and loads no model code: no torch beyond what torch.hub is, no file written, no thread."""
    code = """
import importlib.util, threading
before, threads, seed = set(sys.modules), threading.active_count(), torch.initial_seed()
state = torch.get_rng_state()
spec = importlib.util.spec_from_file_location("hubconf", repo + "/hubconf.py")
sys.path.insert(0, repo)
spec.loader.exec_module(importlib.util.module_from_spec(spec))
assert torch.equal(state, torch.get_rng_state()) and threading.active_count() == threads
print(*sorted(m for m in set(sys.modules) - before if m.split(".")[0] not in sys.stdlib_module_names))
"""
    loaded = hub(ROOT, code, tmp_path).split()
    assert {name.split(".")[0] for name in loaded} <= {"ssod"}
    assert set(loaded) <= {"ssod", "ssod.errors", "ssod.zoo"}
    assert list(tmp_path.iterdir()) == []


def packed(folder: Path, name: str, strategy: str, data: str, detector: torch.nn.Module) -> dict[str, object]:
    """Put a network of two classes into the zoo of a clone, and return the content of a checkpoint of it."""
    names, spec = ["cat", "dog"], detector.spec
    content = {"format": FORMAT, "spec": spec, "names": names, "imgsz": 64, "use": "student", "metrics": {}}
    content["networks"] = {"student": detector.state_dict()}
    home = folder / "ssod" / "zoo"
    path = home / "weights" / f"{name}.safetensors"
    write_packed(content, path, {})
    entry = zoo.Entry(
        name=name,
        data=data,
        strategy=strategy,
        labels="10%",
        ap=0.5,
        supervised_ap=None,
        imgsz=64,
        names=names,
        spec=spec,
        size=path.stat().st_size,
        sha256=sha256(path),
        weights_licence="Apache-2.0",
        data_licence="CC0-1.0",
        command="ssod train",
        commit="abc",
        date="2026-01-01",
        file=path.name,
    )
    zoo.add(entry, home)
    return content


@pytest.fixture(scope="session")
def with_entry(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone whose zoo holds one entry more: a network of random weights, and its checkpoint beside."""
    folder = tmp_path_factory.mktemp("zoo") / "clone"
    subprocess.run(["git", "clone", "-q", str(repository), str(folder)], check=True)
    (folder / "ssod" / "zoo" / "entries.json").write_text("[]")  # what comes with the package is no matter of this test
    torch.manual_seed(0)
    detector = build_detector("fcos", 2, "mobilenetv3_small_050", {"fpn_channels": 32})
    save_checkpoint(packed(folder, "demo_fcos", "mean_teacher", "shapes", detector), folder / "best.pt")
    return folder


@pytest.fixture(scope="session")
def with_several(with_entry: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That clone, with two more of other strategies and data, and one of another detector."""
    folder = tmp_path_factory.mktemp("several") / "clone"
    shutil.copytree(with_entry, folder)
    torch.manual_seed(1)
    for name, strategy, data, kind, backbone in (
        ("cells_fcos", "mean_teacher", "bccd.yaml", "fcos", "mobilenetv3_small_050"),
        ("cells_fcos_rpl", "rpl", "bccd.yaml", "fcos", "mobilenetv3_small_075"),
        ("cells_rcnn", "soft_teacher", "bccd.yaml", "faster_rcnn", "mobilenetv3_small_050"),
    ):
        packed(folder, name, strategy, data, build_detector(kind, 2, backbone, {"fpn_channels": 32}))
    return folder


def test_names_of_the_zoo_own_files_and_photographs(with_entry: Path, tmp_path: Path) -> None:
    code = """
assert "demo_fcos" in listed()
images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
same = [load("demo_fcos"), load("fcos", pretrained="demo_fcos"), load("custom", repo + "/best.pt")]
assert not any(m.training for m in same)
scores = [m(images, conf=0.0)[0].scores for m in same]
assert torch.equal(scores[0], scores[1])
torch.testing.assert_close(scores[0], scores[2], atol=1e-3, rtol=0)  # fp16 against the checkpoint
five = load("fcos", num_classes=5, pretrained="demo_fcos")
assert five.num_classes == 5
old, new = same[0].state_dict(), five.state_dict()
changed = {k for k in old if old[k].shape != new[k].shape or not torch.equal(old[k], new[k])}
assert changed and all("cls_logits" in k for k in changed), changed
import numpy as np
results = load("predictor", "demo_fcos", conf=0.0)(np.zeros((48, 80, 3), np.uint8))
assert results[0].orig_shape == (48, 80) and list(results[0].names) in ([0, 1], ["cat", "dog"])
assert torch.equal(load("fcos", pretrained=True)(images, conf=0.0)[0].scores, scores[0])  # the only one there is
try:
    load("fcos", pretrained="demo_fcso")
except Exception as error:
    assert "Did you mean 'demo_fcos'" in str(error), error
else:
    raise AssertionError
try:
    load("retinanet", pretrained="demo_fcos")
except Exception as error:
    assert "none of retinanet so far" in str(error), error
"""
    hub(with_entry, WITHOUT + code, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_pretrained_weights_are_picked_by_strategy_data_and_backbone(with_several: Path, tmp_path: Path) -> None:
    code = """
def same(one, other):
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
for name, asked in {
    "demo_fcos": [{"data": "shapes"}, {"strategy": "mean_teacher", "data": "shapes"}],
    "cells_fcos": [{"strategy": "mean_teacher", "data": "bccd"}, {"strategy": "mean_teacher", "data": "bccd.yaml"}],
    "cells_fcos_rpl": [{"strategy": "rpl"}, {"backbone": "mobilenetv3_small_075"}],
}.items():
    for words in asked:
        model = load("fcos", pretrained=True, **words)
        assert same(model, load(name)) and not model.training, (name, words)
assert same(load("faster_rcnn", pretrained=True), load("cells_rcnn"))
assert same(load("fcos", pretrained="cells_fcos", strategy="mean_teacher", data="bccd"), load("cells_fcos"))
three = load("fcos", 3, pretrained=True, strategy="rpl")
assert three.num_classes == 3
old, new = load("cells_fcos_rpl").state_dict(), three.state_dict()
changed = {k for k in old if old[k].shape != new[k].shape or not torch.equal(old[k], new[k])}
assert changed and all("cls_logits" in k for k in changed), changed
"""
    hub(with_several, WITHOUT + code, tmp_path)


def test_what_no_one_entry_fits_is_said(with_several: Path, tmp_path: Path) -> None:
    """Names of what there is, in one sentence, and nothing loaded instead."""
    code = """
for name, words, said in (
    ("fcos", {"pretrained": True}, ["fits 3 of", "demo_fcos (", "cells_fcos (", "cells_fcos_rpl ("]),
    ("fcos", {"pretrained": True, "strategy": "mean_teacher"}, ["fits 2 of", "on shapes", "on bccd.yaml"]),
    ("fcos", {"pretrained": True, "strategy": "sed"}, ["no fcos with strategy='sed'", "rpl on bccd.yaml"]),
    ("fcos", {"pretrained": True, "backbone": "resnet18"}, ["no fcos with backbone='resnet18'", "demo_fcos"]),
    ("retinanet", {"pretrained": True}, ["no retinanet", "none of retinanet so far"]),
    ("fcos", {"pretrained": "cells_fcos", "strategy": "rpl"}, ["contradicts strategy='rpl'", "(mean_teacher on bccd"]),
    ("fcos", {"pretrained": "cells_rcnn"}, ["does not name weights of fcos"]),
    ("fcos", {"strategy": "mean_teacher"}, ["random weights has seen no strategy", "pretrained=True"]),
    ("deformable_detr", {"data": "bccd"}, ["random weights has seen no data"]),
):
    try:
        load(name, **words)
    except ValueError as error:
        assert all(part in str(error) for part in said), (words, str(error))
    else:
        raise AssertionError(words)
"""
    hub(with_several, WITHOUT + code, tmp_path)
