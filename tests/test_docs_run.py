"""README and docs: their commands are run, page by page in the order of the page, on drawn images with a tiny model.

What a command would take from outside, or take hours for, is replaced: SMALLER says what and why; none is left out.
docs/export.md is run by tests/deploy/test_export_doc.py. `make test-slow` runs this file.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_docs import FENCED, ROOT, text_of

from ssod import zoo
from ssod.cli import main
from ssod.data.shapes import draw_image

PAGES = ["README.md", "docs/quickstart.md", "docs/predict.md", "docs/zoo.md", "docs/label.md", "docs/splits.md"]
ENTRY = "tiny_fcos"
TINY = [
    "detector=fcos",
    "detector.fpn_channels=32",
    "detector.head_convs=1",
    "backbone=mobilenetv3_small_050",
    "imgsz=64",
]
SHORT = ["iters=2", "burn_in=1", "batch=2", "workers=0", "plots=false", "amp=false", "device=cpu"]
# (word of a page, words that are run instead, why)
SMALLER = [
    (r"^epochs=\d+$", "", "two steps, see SHORT"),
    (r"^cfg=demo\.yaml$", "cfg=demo.yaml data=my.yaml labeled=25%", "its 600 images take half a minute to draw"),
    (r"^weights=torchvision://.*$", "", "it downloads: tests/detectors/test_fetch.py does, from this machine"),
    (r"^NAME$", ENTRY, "a name of the zoo: the one that this test has packed"),
    (r"^model=NAME$", f"model={ENTRY}", "likewise"),
    (r"^data_path=FOLDER$", "data_path=.", "where the entry's data lie"),
    (r"^source=/pool$", "source=photos/", "a large pool of photos"),
    (r"^conf\.shark=(.*)$", r"conf.star=\1", "a class of the drawn images"),
    (r"^canonical=(.*)$", r"canonical=\1 canonical_images=24", "the drawn set has fewer images than COCO"),
    (r"^percent=\[1,2,5,10\]$", "percent=[25,50]", "1 % of 24 images cannot show every class"),
    (r"^percent=10$", "percent=25", "likewise; tests/data/test_split_files.py has 10"),
    (r"10percent", "25percent", "likewise"),
    (r"^labeled=\d+%$", "labeled=25%", "likewise"),
]


def commands(page: str) -> list[str]:
    """Lines that call ssod in a page's blocks, fenced or indented; in a console block all of them are mistakes."""
    blocks = [block for _, language, block in FENCED.findall(text_of(ROOT / page)) if language != "console"]
    blocks += re.findall(r"^    .*(?:\n    .*)*", FENCED.sub("", text_of(ROOT / page)), re.M)
    lines = [line.strip() for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    return [line for line in lines if re.match(r"(ssod|torchrun .*-m ssod) ", line)]


def words_of(command: str, here: Path) -> list[str]:
    """What is run of a command: from the mode on."""
    words = shlex.split(command, comments=True)
    words = words[words.index("ssod") + 1 :]
    mode = words[0]
    for pattern, instead, _ in SMALLER:
        taken = [re.sub(pattern, instead, word).split() if re.search(pattern, word) else [word] for word in words]
        words = [word for some in taken for word in some]
    for place, word in enumerate(words):  # a page shows several ways to one folder, which is refused in earnest
        folder = here / word.removeprefix("out=")
        if word.startswith("out=") and folder.is_dir() and mode != "zoo":
            words[place] = f"{word.rstrip('/')}-{place}{len(list(here.iterdir()))}"
    if mode == "train" and "resume=true" in words:
        return [*words, "iters=3"]
    if mode == "train":
        return [*words, *([] if any(w.startswith("model=") for w in words) else TINY), *SHORT]
    if mode == "check" and any(word.startswith("model=") for word in words):
        return [*words, "imgsz=64", "backbone=resnet10t", "device=cpu"]
    return [*words, "workers=0"] if mode == "zoo" and len(words) > 1 else words


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory, shapes_data: Path) -> Path:
    """A folder with all that the pages speak of: data YAMLs, photos, a checkpoint, its ONNX file, a zoo of one."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("images", "annotations"):
        shutil.copytree(shapes_data.parent / name, folder / name)
    (folder / "photos").mkdir()
    for index in range(6):
        pixels, _, _ = draw_image(np.random.default_rng([8, index]))
        Image.fromarray(pixels).save(folder / "photos" / f"{index}.png")
    yaml = "path: .\ntrain: images/train\nval: images/val\ntest: images/val\nunlabeled: photos\n"
    for name in ("my.yaml", "mine.yaml", "coco.yaml"):
        (folder / name).write_text(yaml)
    photos = sorted((folder / "photos").iterdir())
    (folder / "list.txt").write_text("".join(f"{p}\n" for p in photos[:3]))
    Image.open(photos[0]).resize((1000, 700)).save(folder / "aerial.png")
    lists = {"25.0": {str(fold): [fold, fold + 5, fold + 10, fold + 11, fold + 15, fold + 17] for fold in range(5)}}
    (folder / "COCO_supervision.txt").write_text(json.dumps(lists))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "data=my.yaml", "labeled=25%", "name=start", *TINY, *SHORT]) == 0
        shutil.move(folder / "runs/train/start/weights/best.pt", folder / "best.pt")
        shutil.rmtree(folder / "runs")
        assert main(["export", "model=best.pt"]) == 0
        facts = ["trained_by=mean_teacher", "labels=25%", "data_licence=CC0-1.0", "command=ssod train", "commit=abc"]
        assert main(["zoo", "pack", ENTRY, "model=best.pt", "data=my.yaml", *facts, "out=home", "workers=0"]) == 0
        shutil.rmtree(folder / "runs")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_every_command_runs(
    page: str, furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "here"
    shutil.copytree(furnished, here)
    (here / "list.txt").write_text((here / "list.txt").read_text().replace(str(furnished), str(here)))
    if page != "README.md" and page != "docs/quickstart.md":  # these two train what they use
        (here / "runs/train/exp/weights").mkdir(parents=True)
        shutil.copy(here / "best.pt", here / "runs/train/exp/weights")
    monkeypatch.chdir(here)
    monkeypatch.setattr(zoo, "HOME", here / "home")
    ran = 0
    for command in commands(page):
        words = words_of(command, here)
        if command.startswith("torchrun"):
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
            done = subprocess.run([*launch, "ssod", *words], capture_output=True, text=True, timeout=600)
            code, told = done.returncode, done.stdout + done.stderr
        else:
            code = main(words)
            told = "".join(capsys.readouterr())
        assert code == 0, f"{command}\nrun as: ssod {shlex.join(words)}\n{told}"
        ran += 1
    assert ran > 2


def test_what_is_replaced_stands_on_a_page() -> None:
    every = [command for page in PAGES for command in commands(page)]
    words = [word for command in every for word in shlex.split(command, comments=True)]
    for pattern, _, why in SMALLER:
        assert any(re.search(pattern, word) for word in words), (pattern, why)
    assert len(every) > 30
