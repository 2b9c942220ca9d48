"""Whatever stands in a file that is read: what comes out is a value, or one of the package's own errors."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import json
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from ssod.checkpoint import FORMAT, load_checkpoint, save_checkpoint
from ssod.config import load_config
from ssod.data.annotations.listing import find_images
from ssod.data.annotations.sources import load_data
from ssod.data.image import read_image
from ssod.data.split.canonical import read_positions
from ssod.deploy.contract import Card
from ssod.deploy.engine_sidecar import Sidecar
from ssod.deploy.label_plan import make_plan, read_plan
from ssod.deploy.predictor import load_detector
from ssod.detectors import build_detector
from ssod.engine.watch.audit import read_audit
from ssod.errors import Fault, UserError
from ssod.packed import read_packed, write_packed
from ssod.report.compare_runs import compare_runs
from ssod.report.findings import Findings
from ssod.report.page import Seen, write_page
from ssod.report.run import read_run
from ssod.report.table import Table

sys.path.append(str(Path(__file__).resolve().parent / "report"))
import run_files

FEW, MANY = 8, 500
# The same examples every time. Not shrunk: they are small, and some readers take a tenth of a second.
HOW: dict[str, Any] = {"deadline": None, "derandomize": True, "database": None, "phases": [Phase.generate]}
ODD: list[Any] = [
    *(None, True, 0, -1, 3.5, 1e308, float("inf"), float("nan"), 10**30),
    *("", "x", "-1", "\x00", "../../x", [], {}, [[]], [None], ["x"], [1, 2, 3, 4], {"a": 1}, {"": []}),
]


# -- sound files, one of each kind

SPEC: dict[str, Any] = {
    "name": "fcos",
    "num_classes": 2,
    "backbone": "test_resnet",
    "options": {"fpn_channels": 16, "head_convs": 0},
}


def content() -> dict[str, Any]:
    detector = build_detector(**SPEC)
    networks = {"student": detector.state_dict()}
    about = {"names": ["cat", "dog"], "imgsz": 64, "use": "student", "metrics": {"step": 3}}
    return {"format": FORMAT, "spec": detector.spec, **about, "networks": networks}


def data_set(folder: Path) -> dict[str, Path]:
    """A COCO, a VOC and a YOLO set of two images; their data YAMLs by name."""
    root = folder / "sets"
    for name in (
        "coco/images",
        "voc/JPEGImages",
        "voc/Annotations",
        "voc/ImageSets/Main",
        "yolo/images",
        "yolo/labels",
    ):
        (root / name).mkdir(parents=True)
    for place in ("coco/images", "voc/JPEGImages", "yolo/images"):
        for i in range(2):
            Image.new("RGB", (32, 24), (9 * i, 80, 90)).save(root / place / f"{i}.jpg")
    images = [{"id": i + 1, "file_name": f"{i}.jpg", "width": 32, "height": 24} for i in range(2)]
    boxes = [
        {"id": i + 1, "image_id": i + 1, "category_id": 1, "bbox": [1, 2, 9, 8.5], "area": 76.5, "iscrowd": 0}
        for i in range(2)
    ]
    truth = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]}
    (root / "coco/train.json").write_text(json.dumps(truth))
    (root / "coco/data.yaml").write_text("path: .\ntrain: train.json\nnames: {0: cat}\n")
    for i in range(2):
        box = "<bndbox><xmin>2</xmin><ymin>3</ymin><xmax>9</xmax><ymax>9.5</ymax></bndbox>"
        (root / f"voc/Annotations/{i}.xml").write_text(
            f"<annotation><filename>{i}.jpg</filename><size><width>32</width><height>24</height><depth>3</depth></size>"
            f"<object><name>cat</name><difficult>0</difficult>{box}</object></annotation>"
        )
        (root / f"yolo/labels/{i}.txt").write_text("0 0.5 0.5 0.25 0.25\n0 .2 .3 0.1 1e-1\n")
    (root / "voc/ImageSets/Main/train.txt").write_text("0\n1\n")
    (root / "voc/data.yaml").write_text("path: .\ntrain: ImageSets/Main/train.txt\nnames: [cat]\n")
    (root / "yolo/data.yaml").write_text("path: .\ntrain: images\nnames: [cat]\nnc: 1\n")
    return {name: root / name / "data.yaml" for name in ("coco", "voc", "yolo")}


def picture(kind: str) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (12, 16, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).convert("P" if kind == "GIF" else "RGB").save(out, kind)
    return out.getvalue()


def run_folder(folder: Path) -> Path:
    run = run_files.made_by_hand(folder)
    run_files.write_film(run, run_files.NAMES, run_files.STEPS[:1], images=2, boxes=2)
    run_files.write_audit(run, run_files.NAMES, run_files.STEPS)
    run_files.write_alarm(run, "a line")
    run_files.write_baseline(run, run_files.NAMES, run_files.STEPS)
    return run


def card() -> Card:
    words = dict.fromkeys(("weights", "target", "precision"), "x")
    numbers = {"imgsz": 64, "multiple": 32, "conf": 0.1, "iou": 0.6, "max_det": 9, "opset": 18}
    return Card(
        ["cat", "dog"], "fcos", "test_resnet", size=None, mean=(0, 0, 0), std=(1, 1, 1), inputs=("images", "sizes"),
        versions={"torch": "2"}, **words, **numbers,
    )  # fmt: skip


# -- targets: what is damaged, and what then reads it


class Target:
    """raw: a sound file; read(file) reads a damaged one that lies at `file`, beside whatever it needs."""

    def __init__(self, raw: bytes, read: Callable[[Path], object], place: Path) -> None:
        self.raw, self.read, self.place = raw, read, place


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    folder = tmp_path_factory.mktemp("fuzz")
    sets, out = data_set(folder), {}

    def add(name: str, raw: bytes | str, read: Callable[[Path], object], place: str = "") -> None:
        place = place or f"one/{name.replace(' ', '_')}"
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        out[name] = Target(raw.encode() if isinstance(raw, str) else raw, read, folder / place)

    def training(kind: str) -> Callable[[Path], object]:
        return lambda _: load_data(sets[kind], "train")

    for kind, place in (
        ("coco", "train.json"),
        ("coco", "data.yaml"),
        ("voc", "Annotations/0.xml"),
        ("voc", "ImageSets/Main/train.txt"),
        ("yolo", "labels/0.txt"),
        ("yolo", "data.yaml"),
    ):
        add(f"{kind} {place}", (folder / "sets" / kind / place).read_bytes(), training(kind), f"sets/{kind}/{place}")
    add("list of images", "a.jpg\nb.jpg\n", lambda f: find_images(str(f)), "one/list.txt")
    add("canonical", json.dumps({"10.0": {"1": [0, 1], "2": [3]}}), read_positions)
    values = load_config("train").model_dump()
    add("config", yaml.safe_dump(values), lambda f: load_config("train", {"cfg": str(f)}), "one/config.yaml")
    for kind in ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF"):
        add(f"image {kind}", picture(kind), read_image)
    save_checkpoint(content(), folder / "sound.pt")
    add("checkpoint", (folder / "sound.pt").read_bytes(), load_checkpoint, "one/damaged.pt")
    write_packed(content(), folder / "sound.safetensors", {})
    add("packed", (folder / "sound.safetensors").read_bytes(), read_packed, "one/damaged.safetensors")
    add("card of an export", card().dumps(), lambda f: Card.loads(text(f), f))
    profile = {"images": ((1, 3, 64, 64),) * 3, "sizes": ((1, 2),) * 3}
    sidecar = Sidecar(card(), "tensorrt", "10", ["sm86"], profile, "a" * 64, "b" * 64)  # type: ignore[arg-type]
    add("sidecar of an engine", sidecar.dumps(), lambda f: Sidecar.loads(text(f), f))
    make_plan(str(sets["yolo"].parent / "images"), folder / "plan", {"conf": 0.5}, 1, by_stem=False)
    add("plan of label", (folder / "plan/plan.json").read_bytes(), lambda f: read_plan(f.parent), "plan/plan.json")
    run = run_folder(folder / "run")
    shutil.copytree(run, folder / "other")
    images = [{"file_name": "0.jpg", "width": 32, "height": 24}]
    found = Findings({}, images, ["cat"], np.array([[0, 1, 2, 9, 9, 0, 0.0]]), np.array([[0, 1, 2, 9, 9, 0, 0.5]]))
    found.save(run / "val_detections.json")
    add("detections of a run", (run / "val_detections.json").read_bytes(), Findings.load)

    def page(file: Path) -> None:
        write_page(read_run(run), folder / "page.html", None, Seen(None, None, "."))

    for place in ("results.csv", "metrics.json", "diagnosis.jsonl", "audit.jsonl", "baseline.json", "args.yaml"):
        add(f"page, {place}", (run / place).read_bytes(), page, f"run/{place}")
    add("page, film", (run / "pseudo/step000020.json").read_bytes(), page, "run/pseudo/step000020.json")
    for place in ("metrics.json", "args.yaml"):
        raw = (folder / "other" / place).read_bytes()
        add(f"comparison, {place}", raw, lambda f: compare_runs(f.parent, run), f"other/{place}")
    add("results.csv, resumed", (run / "results.csv").read_bytes(), lambda f: Table(f, until_step=40))
    add("audit.jsonl, printed", (run / "audit.jsonl").read_bytes(), lambda f: read_audit(f.parent), "lone/audit.jsonl")
    return out


def text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


NAMES = [
    *("coco train.json", "coco data.yaml", "voc Annotations/0.xml", "voc ImageSets/Main/train.txt"),
    *("yolo labels/0.txt", "yolo data.yaml", "list of images", "canonical", "config"),
    *(f"image {kind}" for kind in ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF")),
    *("checkpoint", "packed", "card of an export", "sidecar of an engine", "plan of label", "detections of a run"),
    *("page, results.csv", "page, metrics.json", "page, diagnosis.jsonl", "page, audit.jsonl", "page, baseline.json"),
    *("page, args.yaml", "page, film", "comparison, metrics.json", "comparison, args.yaml"),
    *("results.csv, resumed", "audit.jsonl, printed"),
]


def damaged(data: st.DataObject, raw: bytes) -> bytes:
    """Bytes changed, taken out, put in, or the end cut off; where it is JSON or YAML, also a value that is odd."""
    tree = parsed(raw)
    if tree is not None and data.draw(st.integers(0, 3)):
        return odd(data, *tree)
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, max(0, len(raw) - 1)))
        end = start + data.draw(st.sampled_from([0, 1, 1, 2, 7, len(raw)]))
        raw = raw[:start] + data.draw(st.binary(max_size=4)) + raw[end:]
    return raw


def parsed(raw: bytes) -> tuple[str, Any] | None:
    with contextlib.suppress(ValueError):
        return "json", json.loads(raw)
    with contextlib.suppress(ValueError):
        return "lines", [json.loads(line) for line in raw.splitlines()]
    with contextlib.suppress(ValueError, yaml.YAMLError):
        found = yaml.safe_load(raw.decode())
        return ("yaml", found) if isinstance(found, dict) else None
    return None


def odd(data: st.DataObject, kind: str, tree: Any) -> bytes:
    tree = copy.deepcopy(tree)
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.sampled_from([*itertools.islice(places(tree), 400)] or [((), None)]))[0]
        value = copy.deepcopy(data.draw(st.sampled_from(["gone", *ODD])))
        if not place:
            tree = None if value == "gone" else value
            continue
        inner = tree
        for key in place[:-1]:
            inner = inner[key]
        if value == "gone":
            del inner[place[-1]]
        else:
            inner[place[-1]] = value
    if kind == "lines" and isinstance(tree, list):
        return b"\n".join(json.dumps(entry).encode() for entry in tree)
    return yaml.safe_dump(tree).encode() if kind == "yaml" else json.dumps(tree).encode()


def places(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Each value of a nested tree, by its keys."""
    yield at, tree
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in inner:
        yield from places(value, (*at, key))


def attack(target: Target, examples: int) -> None:
    @settings(max_examples=examples, **HOW)
    @given(st.data())
    def one(data: st.DataObject) -> None:
        target.place.write_bytes(damaged(data, target.raw))
        with contextlib.suppress(UserError, Fault):  # anything else escapes, and fails
            target.read(target.place)

    try:
        one()
    finally:
        target.place.write_bytes(target.raw)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.fault(5)
def test_a_damaged_file_gives_a_value_or_one_sentence(
    targets: dict[str, Target], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSOD_CACHE", str(tmp_path))
    assert sorted(targets) == sorted(NAMES)
    targets[name].place.write_bytes(targets[name].raw)
    targets[name].read(targets[name].place)  # sound, it is read
    attack(targets[name], FEW)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_file_damaged_in_many_ways_gives_a_value_or_one_sentence(
    targets: dict[str, Target], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSOD_CACHE", str(tmp_path))
    attack(targets[name], MANY)


# -- files whose check sum is right, made by somebody who means harm


@pytest.mark.parametrize("examples", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.fault(27)
def test_a_checkpoint_of_odd_values_gives_a_detector_or_one_sentence(
    tmp_path: Path, packed: bool, examples: int
) -> None:
    sound = content()
    file = tmp_path / ("odd.safetensors" if packed else "odd.pt")

    @settings(max_examples=examples, **HOW)
    @given(st.data())
    def one(data: st.DataObject) -> None:
        tree = json.loads(odd(data, "json", {k: v for k, v in sound.items() if k != "networks"}))
        if not isinstance(tree, dict):
            return
        if packed:
            write_packed(sound, file, {})
            file.write_bytes(with_card(file.read_bytes(), {k: v for k, v in tree.items() if k != "format"}))
        else:
            save_checkpoint(tree | {"networks": sound["networks"]}, file)
        with contextlib.suppress(UserError, Fault):
            load_detector(file)

    one()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"options": {"head_convs": 10**6}}, "detector.head_convs=1000000 is not valid"),
        ({"options": {"fpn_channels": 10**5}}, "detector.fpn_channels=100000 is not valid"),
        ({"name": "deformable_detr", "options": {"encoder_layers": 10**6}}, "detector.encoder_layers=1000000 is not"),
        ({"num_classes": 10**8}, "its 'num_classes' is not one"),
    ],
)
@pytest.mark.fault(27)
def test_a_checkpoint_of_endless_layers_is_refused_before_they_are_made(
    tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    made = content()
    save_checkpoint(made | {"spec": made["spec"] | change}, tmp_path / "endless.pt")
    with pytest.raises(UserError, match=sentence):
        load_detector(tmp_path / "endless.pt")


def with_card(raw: bytes, card: dict[str, Any]) -> bytes:
    """A packed network whose card is another one, signed as the writer signs."""
    from ssod.packed import _digest, _parts

    header, body = _parts(raw)
    told = json.dumps(card)
    header["__metadata__"] = {"ssod": told, "sha256": _digest(told, header, body)}
    lines = json.dumps(header).encode()
    lines += b" " * (-len(lines) % 8)
    return struct.pack("<Q", len(lines)) + lines + body


@given(st.sampled_from(["networks", "student", "weight"]), st.sampled_from(ODD))
@settings(max_examples=FEW, **HOW)
def test_a_checkpoint_of_odd_networks_gives_one_sentence(where: str, value: Any) -> None:
    made = content()
    weight = next(iter(made["networks"]["student"]))
    if where == "networks":
        made["networks"] = value
    elif where == "student":
        made["networks"]["student"] = value
    else:
        made["networks"]["student"][weight] = torch.zeros(3) if value is None else value
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ssod.checkpoint.load_checkpoint", lambda path: made)
        with pytest.raises(UserError):
            load_detector("odd.pt")
