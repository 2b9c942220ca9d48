"""README and docs: their commands and programs are run, page by page in the order of the page, on drawn images with a
tiny model.

What a command would take from outside, or take hours for, is replaced: SMALLER says what and why; none is left out.
docs/export.md is run by tests/deploy/test_export_doc.py, the Dockerfiles' commands by tests/test_docker.py and
tests/deploy/test_slim.py, the benches, small, by tests/bench. The studies take hours and are not run.
`make test-slow` runs this file.
"""

from __future__ import annotations

import glob
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_docs import FENCED, ROOT, code, inline, text_of

from ssod import SSOD, zoo
from ssod.cli import main
from ssod.config import load_config, parse_words
from ssod.data.shapes import draw_image

ELSEWHERE = ["docs/export.md", "docs/config.md"]  # the latter is of arguments, without a command that does something
TRAIN_THEIR_OWN = ["README.md", "docs/quickstart.md"]  # the others speak of a run that is there
ENTRY = "tiny_fcos"
TINY = ["backbone=mobilenetv3_small_050", "imgsz=64"]
NARROW = {  # of the detectors that the pages name
    "fcos": ["detector.fpn_channels=32", "detector.head_convs=1"],
    "retinanet": ["detector.fpn_channels=32", "detector.head_convs=1"],
    "faster_rcnn": ["detector.fpn_channels=32", "detector.box_head_width=32", "detector.train_proposals=20"],
}
SHORT = ["iters=2", "burn_in=1", "batch=2", "workers=0", "plots=false", "amp=false"]
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
    (r"^weights=FILE$", "", "a backbone's weights, as above"),
    (r"^cfg=coco10\.yaml$", "cfg=coco10.yaml data=my.yaml labeled=25% weights=null", "COCO"),
    (r"^cfg=(coco10_\w+\.yaml|bccd10\.yaml)$", r"cfg=\1 data=my.yaml labeled=25% weights=null", "COCO, BCCD"),
    (r"^cfg=(sparse_\w+\.yaml)$", r"cfg=\1 weights=null", "a backbone's weights, as above"),
    (r"^strategy\.mine_from=1500$", "strategy.mine_from=1", "two steps"),
    (r"^device=0,1(,2,3)?$", "device=cpu,cpu", "graphics cards"),
    (r"^data_path=/data/mine$", "data_path=.", "where the run's data lie"),
    (r"^imgsz=640$", "imgsz=64", "minutes"),
    (r"^resume=FOLDER$", "resume=runs/train/exp", "the run that is there"),
]


def commands(page: str) -> list[str]:
    """Lines that call ssod in a page's blocks, fenced or indented, and whole commands within its sentences; in a
    console block all of them are mistakes."""
    blocks = [block for _, language, block in FENCED.findall(text_of(ROOT / page)) if language != "console"]
    blocks += re.findall(r"^    .*(?:\n    .*)*", FENCED.sub("", text_of(ROOT / page)), re.M)
    lines = [line.strip() for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    found = [line for line in lines if re.match(r"(ssod|torchrun .*-m ssod) ", line)]
    whole = [line for line in inline(ROOT / page) if re.search(r"^ssod (train|check) .*\b(cfg|data|resume)=", line)]
    return list(dict.fromkeys(found + whole))


ALL = sorted(["README.md", *(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))])
PAGES = [page for page in ALL if page not in ELSEWHERE and commands(page)]


def words_of(command: str, here: Path) -> list[str]:
    """What is run of a command: from the mode on."""
    words = shlex.split(command, comments=True)
    words = words[words.index("ssod") + 1 :]
    mode = words[0]
    for pattern, instead, _ in SMALLER:
        taken = [re.sub(pattern, instead, word).split() if re.search(pattern, word) else [word] for word in words]
        words = [word for some in taken for word in some]
    words = [found for word in words for found in (sorted(glob.glob(word)) if "*" in word else [word])]
    for place, word in enumerate(words):  # a page shows several ways to one folder, which is refused in earnest
        folder = here / word.removeprefix("out=")
        if word.startswith("out=") and folder.is_dir() and mode != "zoo":
            words[place] = f"{word.rstrip('/')}-{place}{len(list(here.iterdir()))}"
    if mode == "train" and any(word.startswith("resume=") for word in words):
        done = [len(file.read_text().splitlines()) for file in here.glob("runs/train/*/results.csv")]
        return [*words, f"iters={2 + max(done)}"]  # more than any run here has
    if mode == "train":
        if not any(word.startswith("model=") for word in words):
            detector = load_config("train", parse_words(words[1:])).detector.name
            words += [*TINY, *NARROW[detector]]
        return [*words, *SHORT, *([] if any(word.startswith("device=") for word in words) else ["device=cpu"])]
    if mode == "label" and not any(word.startswith("conf") for word in words):
        return [*words, "conf=0.001", "max_det=4"]  # a model of two steps is sure of nothing
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
    for name in ("my.yaml", "mine.yaml", "other.yaml", "coco.yaml"):
        (folder / name).write_text(yaml)
    shutil.copytree(folder / "photos", folder / "more_photos")
    photos = sorted((folder / "photos").iterdir())
    (folder / "list.txt").write_text("".join(f"{p}\n" for p in photos[:3]))
    Image.open(photos[0]).resize((1000, 700)).save(folder / "aerial.png")
    lists = {"25.0": {str(fold): [fold, fold + 5, fold + 10, fold + 11, fold + 15, fold + 17] for fold in range(5)}}
    (folder / "COCO_supervision.txt").write_text(json.dumps(lists))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("control", "exp"):
            words = ["data=my.yaml", "labeled=25%", f"name={name}", *TINY, *NARROW["fcos"], *SHORT, "device=cpu"]
            assert main(["train", *words]) == 0
        shutil.copy(folder / "runs/train/exp/weights/best.pt", folder / "best.pt")
        assert main(["export", "model=best.pt"]) == 0
        facts = ["trained_by=mean_teacher", "labels=25%", "data_licence=CC0-1.0", "command=ssod train", "commit=abc"]
        assert main(["zoo", "pack", ENTRY, "model=best.pt", "data=my.yaml", *facts, "out=home", "workers=0"]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_every_command_runs(
    page: str, furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "here"
    shutil.copytree(furnished, here)
    (here / "list.txt").write_text((here / "list.txt").read_text().replace(str(furnished), str(here)))
    if page in TRAIN_THEIR_OWN:
        shutil.rmtree(here / "runs")
    monkeypatch.chdir(here)
    monkeypatch.setattr(zoo, "HOME", here / "home")
    ran = 0
    for command in commands(page):
        words = words_of(command, here)
        if "data=labels/data.yaml" in words:  # "once a line `val:` stands in it"
            with open("labels/data.yaml", "a") as file:
                file.write(f"val: {here / 'annotations' / 'instances_val.json'}\n")
        if command.startswith("torchrun"):
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
            done = subprocess.run([*launch, "ssod", *words], capture_output=True, text=True, timeout=600)
            code, told = done.returncode, done.stdout + done.stderr
        else:
            code = main(words)
            told = "".join(capsys.readouterr())
        assert code == 0, f"{command}\nrun as: ssod {shlex.join(words)}\n{told}"
        ran += 1
    assert ran


PROGRAMS = [page for page in ALL if code(ROOT / page, "python") and page != "docs/export.md"]
NOT_HERE = {
    "docs/zoo.md": "torch.hub's own download and two placeholders: tests/test_hub.py calls each line's function"
}


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PROGRAMS if page not in NOT_HERE])
def test_every_program_runs(page: str, furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    shutil.copytree(furnished, here)
    monkeypatch.chdir(here)
    (here / "my_recipe.yaml").write_text("data: my.yaml\nlabeled: 50%\n")
    cv2 = pytest.importorskip("cv2")
    film = cv2.VideoWriter("film.mp4", cv2.VideoWriter.fourcc(*"mp4v"), 10, (64, 48))
    for shade in range(3):
        film.write(np.full((48, 64, 3), 80 * shade, np.uint8))
    film.release()
    whole = SSOD.train

    def short(self: SSOD, **given: Any) -> Any:
        """As the program asks, in four steps and, where the model is built anew, of a tiny one."""
        left_out = {"epochs"} | {key for key, value in given.items() if str(value).startswith("torchvision://")}
        given = {key: value for key, value in given.items() if key not in left_out}
        few = {"iters": 4, "batch": 2, "workers": 0, "plots": False, "amp": False, "burn_in": 1, "labeled": "25%"}
        narrow = {"backbone": "mobilenetv3_small_050", "imgsz": 64}
        narrow["detector"] = {"name": "fcos", "fpn_channels": 32, "head_convs": 1}
        return whole(self, **{**given, **few, **(narrow if self._scratch is not None else {})})

    monkeypatch.setattr(SSOD, "train", short)
    for number, block in enumerate(code(ROOT / page, "python")):
        exec(compile(block, f"{page}, program {number + 1}", "exec"), {"__name__": "a_program"})


def test_what_is_replaced_stands_on_a_page() -> None:
    every = [command for page in PAGES for command in commands(page)]
    words = [word for command in every for word in shlex.split(command, comments=True)]
    for pattern, _, why in SMALLER:
        assert any(re.search(pattern, word) for word in words), (pattern, why)
    assert len(every) > 80
