"""`ssod label`: what the files hold, who can read them, and that neither a kill nor more ranks change a byte."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pycocotools.coco import COCO

from ssod import dist
from ssod.checkpoint import FORMAT, load_checkpoint, save_checkpoint
from ssod.cli import main
from ssod.config import load_config
from ssod.data.annotations.sources import load_data
from ssod.deploy.infer import Inference
from ssod.deploy.label import Labeled, class_thresholds, label, label_images
from ssod.deploy.label_plan import Plan, make_plan
from ssod.deploy.label_writers import WRITERS
from ssod.deploy.predictor import Predictor, load_detector
from ssod.detectors import build_detector
from ssod.errors import UserError
from ssod.modes import LabelConfig

NAMES = ["sea cat", "dog & <co>"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    detector = build_detector("fcos", 2, "resnet10t", {"fpn_channels": 32, "head_convs": 1})
    content = {"format": FORMAT, "spec": detector.spec, "names": NAMES, "imgsz": 64, "use": "student", "metrics": {}}
    path = tmp_path_factory.mktemp("model") / "best.pt"
    save_checkpoint(content | {"networks": {"student": detector.state_dict()}}, path)
    return path


def noise(path: Path, seed: int, size: tuple[int, int] = (64, 48)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five good images in two folders, one cut off and one that is none."""
    folder = tmp_path / "mes photos é"
    for i, name in enumerate(("b.png", "a.png", "more/c.png", "more/d 1.png")):
        noise(folder / name, i, (64, 48) if i % 2 else (80, 60))
    noise(folder / "more" / "e.png", 9, (33, 77))
    whole = noise(folder / "cut.png", 5).read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    return folder


def config(checkpoint: Path, source: Path | str, out: Path, **options: Any) -> LabelConfig:
    base: dict[str, Any] = {"model": str(checkpoint), "source": str(source), "out": str(out), "device": "cpu"}
    base |= {"conf": 0.0, "max_det": 4, "workers": 0, "save_interval": 3, "batch": 2}
    return load_config("label", base | options)


def labeled(checkpoint: Path, source: Path | str, out: Path, **options: Any) -> Labeled:
    done = label(config(checkpoint, source, out, **options))
    assert done is not None
    return done


def tree(folder: Path) -> dict[str, bytes]:
    """Everything that was written: file names and bytes, links by their target."""
    out = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            out[str(path.relative_to(folder))] = os.readlink(path).encode()
        elif path.is_file() and path.name != ".lock":
            out[str(path.relative_to(folder))] = path.read_bytes()
    return out


# ------------------------------------------------------------------------------------------ what the files hold


@pytest.mark.parametrize("format_", ["coco", "yolo", "voc"])
def test_our_own_reader_finds_the_boxes_of_predict(
    checkpoint: Path, photos: Path, tmp_path: Path, format_: str
) -> None:
    done = labeled(checkpoint, photos, tmp_path / "out", format=format_, scores=True)
    wanted = {r.path.name: r for r in Predictor(checkpoint, device="cpu", conf=0.0, max_det=4, batch=2)(photos)}
    data = load_data(done.data_yaml, "train", strict=True)
    assert data.names == NAMES
    assert [s.path.resolve() for s in data.samples] == [
        photos / n for n in ("a.png", "b.png", "more/c.png", "more/d 1.png", "more/e.png")
    ]
    for sample in data.samples:
        boxes = wanted[sample.path.name].boxes
        large = (boxes.xyxy[:, 2:] - boxes.xyxy[:, :2] > 1).all(1) if format_ == "voc" else slice(None)
        np.testing.assert_allclose(sample.boxes[large], boxes.xyxy.numpy()[large], atol=0.02)
        np.testing.assert_array_equal(sample.labels, boxes.cls.numpy())
    assert (done.counts.images, done.counts.unreadable, done.counts.empty) == (5, 2, 0)
    assert done.counts.boxes == sum(done.counts.boxes_of_class.values()) == sum(len(s.boxes) for s in data.samples)
    told = (tmp_path / "out" / "unreadable.txt").read_text()
    assert [line.split(":")[0] for line in told.splitlines()] == ["cut.png", "empty.jpg"]
    assert not (tmp_path / "out" / "work").exists()
    assert yaml.safe_load(done.data_yaml.read_text())["path"] == ("../mes photos é" if format_ == "coco" else ".")


def test_pycocotools_reads_scores_and_quality(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    labeled(checkpoint, photos, tmp_path)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(tmp_path / "annotations" / "instances_train.json")
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == NAMES
    assert len(coco.imgs) == 5
    per_image = [coco.loadAnns(coco.getAnnIds(imgIds=[i])) for i in sorted(coco.imgs)]
    for found in per_image:
        scores = [a["score"] for a in found]
        assert scores == sorted(scores, reverse=True)
        assert all(0 <= a["score"] <= 1 and 0 <= a["quality"] <= 1 for a in found)
    assert sorted(coco.anns) == list(range(1, len(coco.anns) + 1))
    assert coco.dataset["info"]["conf"] == dict.fromkeys(NAMES, 0.0)


def test_yolo_and_voc_files(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    labeled(checkpoint, photos, tmp_path / "plain", format="yolo")
    labeled(checkpoint, photos, tmp_path / "scored", format="yolo", scores=True)
    labeled(checkpoint, photos, tmp_path / "voc", format="voc")
    plain = (tmp_path / "plain" / "labels" / "more" / "d 1.txt").read_text().splitlines()
    scored = (tmp_path / "scored" / "labels" / "more" / "d 1.txt").read_text().splitlines()
    assert [line.rsplit(" ", 1)[0] for line in scored] == plain
    assert all(len(line.split()) == 5 for line in plain)
    assert (tmp_path / "plain" / "train.txt").read_text().splitlines()[2:4] == [
        "./images/more/c.png",
        "./images/more/d 1.png",
    ]
    xml = (tmp_path / "voc" / "Annotations" / "more" / "d 1.xml").read_text()
    assert xml.count("<object>") == xml.count("<score>") == xml.count("<quality>") == len(plain)
    assert (tmp_path / "voc" / "JPEGImages" / "more" / "d 1.png").is_file()


def test_thresholds_of_classes() -> None:
    assert class_thresholds(0.5, NAMES) == [0.5, 0.5]
    assert class_thresholds({"sea cat": 0.2, "default": 0.7}, NAMES) == [0.2, 0.7]
    for conf, sentence in (
        ({"sea cta": 0.2, "default": 0.1}, "no class 'sea cta'. Did you mean 'sea cat'"),
        ({"sea cat": 0.2}, "conf says nothing about dog & <co>; add them, or conf.default"),
        (1.5, "conf=1.5 for default: a score lies between 0 and 1"),
    ):
        with pytest.raises(UserError, match=sentence):
            class_thresholds(conf, NAMES)


def test_a_class_is_cut_at_its_own_threshold(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    free = labeled(checkpoint, photos, tmp_path / "free", max_det=50).counts.boxes_of_class
    cut = labeled(checkpoint, photos, tmp_path / "cut", max_det=50, conf={"sea cat": 1.0, "default": 0.0})
    assert free["sea cat"] > 0
    assert cut.counts.boxes_of_class == {"sea cat": 0, "dog & <co>": free["dog & <co>"]}


# ------------------------------------------------------------------------------------------ sources


def test_sources(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "cut.png").unlink()
    (tmp_path / "list.txt").write_text("mes photos é/more/c.png\nmes photos é/b.png\n")
    (tmp_path / "data.yaml").write_text("path: mes photos é\nunlabeled: more\nval: '*.png'\nnames: [x]\n")
    images = {
        str(tmp_path / "list.txt"): ["more/c.png", "b.png"],
        str(photos / "*.png"): ["a.png", "b.png"],
        str(photos / "b.png"): ["b.png"],
        f"{tmp_path}/data.yaml:unlabeled": ["c.png", "d 1.png", "e.png"],
        f"{tmp_path}/data.yaml:val": ["a.png", "b.png"],
    }
    for number, (source, wanted) in enumerate(images.items()):
        labeled(checkpoint, source, tmp_path / str(number))
        content = json.loads((tmp_path / str(number) / "annotations" / "instances_train.json").read_text())
        assert [i["file_name"] for i in content["images"]] == wanted
        assert len(load_data(tmp_path / str(number) / "data.yaml", "train").samples) == len(wanted)


def test_labels_beside_the_images_are_not_opened(checkpoint: Path, tmp_path: Path) -> None:
    noise(tmp_path / "JPEGImages" / "a.png", 0)
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Annotations" / "a.xml").write_text("<broken")
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("a\ngone\n")
    (tmp_path / "data.yaml").write_text("train: ImageSets/Main/train.txt\nnames: [x]\n")
    counts = labeled(checkpoint, f"{tmp_path}/data.yaml:train", tmp_path / "out").counts
    assert (counts.images, counts.unreadable) == (1, 1)
    assert "no image gone" in (tmp_path / "out" / "unreadable.txt").read_text()


def test_mistakes_are_one_sentence(
    checkpoint: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise(photos / "a.jpg", 3)
    (tmp_path / "list.txt").write_text("mes photos é/b.png\nmes photos é/b.png\n")
    out = tmp_path / "out"
    labeled(checkpoint, photos, out)
    words = ["label", f"model={checkpoint}", "device=cpu", "conf=0.0", "max_det=4", "save_interval=3", "workers=0"]
    for more, sentence in (
        ([f"source={tmp_path}/none", f"out={tmp_path}/x1"], "no image there"),
        ([f"source={photos}", f"out={tmp_path}/x2", "format=yolo"], "would share one label file"),
        ([f"source={tmp_path}/list.txt", f"out={tmp_path}/x3"], "stands twice in the source"),
        ([f"source={photos}/empty.jpg", f"out={tmp_path}/x4"], "none of the 1 images could be read"),
        ([f"source={photos}", f"out={out}", "iou=0.3"], "holds labels made with iou=0.6, not 0.3"),
        ([f"source={photos}", f"out={tmp_path}/x5", "conf.cat=0.3"], "no class 'cat'"),
        ([f"source={photos}"], "'out' is missing"),
    ):
        assert main([*words, *more]) == 2
        error = capsys.readouterr().err
        assert sentence in error
        assert error.count("\n") == 1
    assert main([*words, f"source={photos}", f"out={out}", "batch=2"]) == 0
    assert "there already" in capsys.readouterr().out


def test_a_diverged_network_writes_no_background(
    checkpoint: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = load_checkpoint(checkpoint)
    content["networks"]["student"]["cls_logits.bias"][0] = float("nan")
    save_checkpoint(content, tmp_path / "nan.pt")
    assert main(["label", f"model={tmp_path}/nan.pt", f"source={photos}", f"out={tmp_path}/out", "device=cpu"]) == 1
    assert "cls_logits.bias is not finite" in capsys.readouterr().err
    assert not (tmp_path / "out" / "data.yaml").exists()


# ------------------------------------------------------------------------------------------ kills, ranks, memory


def process(cfg: LabelConfig, ranks: int = 1, **kwargs: Any) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    keys = ("model", "source", "out", "device", "conf", "max_det", "workers", "save_interval", "batch", "format")
    words = [f"{key}={getattr(cfg, key)}" for key in keys]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "ssod", "label", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        **kwargs,
    )


@pytest.fixture
def many(tmp_path: Path) -> Path:
    for i in range(60):
        noise(tmp_path / "pool" / f"{i // 20}" / f"{i:03d}.png", i, (96, 64 if i % 3 else 96))
    (tmp_path / "pool" / "1" / "bad.png").write_bytes(b"x")
    return tmp_path / "pool"


def test_killed_and_started_again_gives_the_same_bytes(checkpoint: Path, many: Path, tmp_path: Path) -> None:
    cfg = config(checkpoint, many, tmp_path / "out", save_interval=2, batch=1)
    label(cfg)
    (tmp_path / "out").rename(tmp_path / "whole")
    work = tmp_path / "out" / "work"
    child = process(cfg)
    deadline = time.monotonic() + 60
    while len(list(work.glob("part-*.jsonl"))) < 2 and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    done = len(list(work.glob("part-*.jsonl")))
    assert child.returncode == -signal.SIGKILL
    assert 2 <= done < 31, "the kill came in the middle"
    assert not (tmp_path / "out" / "label.json").exists()
    again = process(cfg)
    said = again.communicate(timeout=120)[0]
    assert again.returncode == 0, said
    assert f"going on: {done} of 31 parts" in said
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize("format_", ["coco", "yolo", "voc"])
def test_stopped_while_writing_out(checkpoint: Path, photos: Path, tmp_path: Path, format_: str) -> None:
    """The disk fills up between the files of the result: what was there is written again, to the same bytes."""
    cfg = config(checkpoint, photos, tmp_path / "out", format=format_)
    label(cfg)
    (tmp_path / "out").rename(tmp_path / "whole")
    blocked = tmp_path / "out" / "data.yaml"
    blocked.mkdir(parents=True)  # the last file but one cannot be written
    with pytest.raises(OSError, match=r"data\.yaml"):
        label(cfg)
    assert not (tmp_path / "out" / "label.json").exists()
    blocked.rmdir()
    label(cfg)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.slow
def test_two_ranks_give_the_same_bytes_and_share_the_work(checkpoint: Path, many: Path, tmp_path: Path) -> None:
    options = {"save_interval": 4, "format": "voc"}
    cfg = config(checkpoint, many, tmp_path / "out", **options)
    label(cfg)
    (tmp_path / "out").rename(tmp_path / "one")
    torchrun = process(cfg, ranks=2)
    said = torchrun.communicate(timeout=200)[0]
    assert torchrun.returncode == 0, said
    assert said.count("60 images labelled") == 1, "one rank reports"
    assert tree(tmp_path / "out") == tree(tmp_path / "one")


def test_a_rank_takes_only_its_own_parts(
    checkpoint: Path, many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 of 2 labels no part of rank 1 and waits for it; rank 1 comes back after its share."""
    cfg = config(checkpoint, many, tmp_path / "out", save_interval=8)
    work = tmp_path / "out" / "work"
    rank_1 = threading.Event()

    def second_rank(seconds: float) -> None:
        """Called where rank 0 waits for the other one: be that one, once."""
        if not rank_1.is_set():
            rank_1.set()
            assert sorted(p.name for p in work.glob("part-*")) == [f"part-{i:07d}.jsonl" for i in (0, 2, 4, 6)]
            monkeypatch.setattr(dist, "rank", lambda: 1)
            assert label(cfg) is None
            assert len(list(work.glob("part-*"))) == 8

    monkeypatch.setattr(dist, "world", lambda: 2)
    monkeypatch.setattr("ssod.deploy.label.time.sleep", second_rank)
    done = label(cfg)
    assert rank_1.is_set()
    assert done is not None
    assert done.counts.images == 60


def rows(plan: Plan, boxes: int) -> Iterator[str]:
    for i in range(plan.images):
        objects = [[k % 2, 1.0, 2.0, 30.5, 40.25, 0.5, 0.25] for k in range(boxes)]
        yield json.dumps({"file": f"{i // 100:05d}/{i:07d}.png", "width": 64, "height": 48, "objects": objects}) + "\n"


@pytest.mark.parametrize("format_", ["coco", *(pytest.param(f, marks=pytest.mark.slow) for f in ("yolo", "voc"))])
def test_writing_out_takes_the_memory_of_one_image(tmp_path: Path, format_: str) -> None:
    tries = count()

    def peak(images: int) -> int:
        out = tmp_path / str(next(tries))
        (out / "work").mkdir(parents=True)
        plan = Plan(out / "work", {"scores": True, "format": format_}, tmp_path, [0] * (images // 100 + 1), images, [])
        stream = rows(plan, 8)
        for part in range(plan.parts):
            plan.part_file(part).write_text("".join(next(stream) for _ in range(100)))
        tracemalloc.start()
        WRITERS[format_](plan, out, NAMES)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak(100)  # imports and caches
    # Threads that other tests left behind are traced, too: the least of three is the writer's own.
    small, large = peak(300), min(peak(3000) for _ in range(3))
    assert large < small + 20_000, f"{large - small} bytes more for 2700 images more"


def test_planning_and_labelling_take_the_memory_of_one_part(checkpoint: Path, tmp_path: Path) -> None:
    """Ten times as many images: 8 bytes each to find twins, and the growing list of parts; not a path is kept."""
    for i in range(160):
        noise(tmp_path / "pool" / f"{i // 16:02d}" / f"{i:03d}.png", i % 7, (32, 32))

    def peak(folder: str) -> int:
        cfg = config(checkpoint, tmp_path / folder, tmp_path / f"out {folder.replace('/', ' ')}", save_interval=8)
        tracemalloc.start()
        label(cfg)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak("pool/01")
    small, large = peak("pool/00"), peak("pool")
    assert large < small + 30_000, f"{large - small} bytes more for 144 images more"


def test_images_of_a_part_are_rows_in_order(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    plan = make_plan(str(photos), tmp_path / "work", {}, part=4, by_stem=False)
    assert (plan.images, plan.parts, plan.missing()) == (7, 2, [0, 1])
    assert plan.images_of(0) + plan.images_of(1) == [
        "a.png", "b.png", "cut.png", "empty.jpg", "more/c.png", "more/d 1.png", "more/e.png",
    ]  # fmt: skip
    how = Inference(64, torch.device("cpu"), conf=0.0, max_det=2)
    found = label_images(load_detector(checkpoint)[0], plan.base, plan.images_of(0), how, [0.0, 0.0])
    assert [row["file"] for row in found] == plan.images_of(0)
    assert [set(row) for row in found[2:]] == [{"file", "error"}] * 2
    assert len(found[0]["objects"]) == 2
