"""The page about a run: made of a real training, of files written by hand, of runs that lack or damage parts."""

from __future__ import annotations

import base64
import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import run_files
from PIL import Image
from run_files import NAMES, STEPS, made_by_hand

from ssod.cli import main, report_words
from ssod.config import load_config, parse_words
from ssod.data.shapes import NAMES as SHAPES
from ssod.engine.report import find_runs, report, report_run
from ssod.engine.trainer import SemiTrainer
from ssod.errors import UserError
from ssod.modes import ReportConfig
from ssod.report import overview
from ssod.report.charts import Line, line_chart, ticks
from ssod.report.film import read_film
from ssod.report.findings import FILE, Findings
from ssod.report.page import Seen, write_page
from ssod.report.run import differences, read_run

EVIL = "<script>alert(1)</script>"


class Page(HTMLParser):
    """What a page holds: tags with their attributes, and the words a reader sees."""

    VOID = {"meta", "link", "img", "input", "br"}

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.words += " " + data

    def text(self) -> str:
        return re.sub(r"\s+", " ", self.words)

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.tags if name == tag]


def page_of(folder: Path, **seen: Any) -> Page:
    given = {"findings": None, "paths": None, "why": "there are no data."} | seen
    return Page(write_page(read_run(folder), folder / "report.html", None, Seen(**given)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shapes_data: Path) -> Path:
    """The run folder of a real training with plots."""
    options: dict[str, Any] = {
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
        "max_det": 20,
        "device": "cpu",
        "project": str(tmp_path_factory.mktemp("runs")),
    }
    trainer = SemiTrainer(load_config("train", options))
    trainer.train()
    return trainer.folder


def test_a_training_ends_with_its_page(trained: Path) -> None:
    page, summary = Page(trained / "report.html"), json.loads((trained / "metrics.json").read_text())
    text = page.text()
    assert page.open == [], "every element is closed"
    assert f"{summary['labeled']} labelled, {summary['unlabeled']} unlabelled, {summary['val']} val" in text
    assert f"AP {summary['best']['AP']:.3f}" in text
    assert "6, 3 of them supervised first" in text
    assert "weights/best.pt on 8 validation images" in text
    assert all(name in text for name in SHAPES)
    labels = [svg["aria-label"] for svg in page.of("svg") if "aria-label" in svg]
    for title in ("AP on the val", "Loss.", "Loss of the unl", "Boxes an image", "Precision over", "F1 over"):
        assert any(label.startswith(title) for label in labels), (title, labels)
    for image in page.of("img"):
        assert image["alt"]
        Image.open(BytesIO(base64.b64decode(image["src"].removeprefix("data:image/jpeg;base64,")))).load()
    assert sum(d.get("class") == "crops" for d in page.of("div")) == 2, (
        "so short a training makes mistakes of both kinds"
    )
    assert "Pseudo labels of fixed unlabelled images" in text
    assert "Left the weak view" in text


def test_the_page_asks_for_nothing(trained: Path) -> None:
    page = Page(trained / "report.html")
    assert [s.get("type", "") for s in page.of("script")] == ["application/json", ""]
    for tag, attrs in page.tags:
        for name in ("src", "href", "srcset", "action", "data"):
            assert attrs.get(name, "#").startswith(("#", "data:")), (tag, attrs)
    policy = next(m["content"] for m in page.of("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "url(" not in (trained / "report.html").read_text()
    assert "@import" not in (trained / "report.html").read_text()


def test_detections_are_kept_and_made_anew_for_another_model(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "copy"
    shutil.copytree(trained, run)
    kept = (run / FILE).read_bytes()
    config = ReportConfig(run=str(run), device="cpu", workers=0)
    (run / "weights" / "best.pt").rename(run / "weights" / "away.pt")  # not needed any more
    assert "8 validation images" in Page(report_run(run, config)).text()
    assert (run / FILE).read_bytes() == kept

    content = json.loads(kept) | {"about": {"best": ["student", 1, 0.0], "conf": 0.05, "of": 8}}
    (run / FILE).write_text(json.dumps(content))  # of an earlier best.pt
    assert "the run has no weights/best.pt" in Page(report_run(run, config)).text()
    (run / "weights" / "away.pt").rename(run / "weights" / "best.pt")
    report_run(run, config)
    again = Findings.load(run / FILE)
    before = json.loads(kept)
    assert again is not None
    assert again.about == before["about"]
    np.testing.assert_allclose(again.found, np.asarray(before["found"]), atol=0.06)


def test_without_the_data_curves_stay_and_pictures_go(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "copy"
    shutil.copytree(trained, run)
    config = ReportConfig(run=str(run), data_path=str(tmp_path / "nowhere"), device="cpu")
    page = Page(report_run(run, config))
    assert "The worst mistakes are not shown: " in page.text()
    assert "nowhere" in page.text(), "it says which data are not there"
    assert not any(d.get("class") == "crops" for d in page.of("div"))
    assert any(s.get("aria-label", "").startswith("F1 over") for s in page.of("svg"))
    (run / FILE).unlink()
    assert "Curves and mistakes of the best network are not shown: " in Page(report_run(run, config)).text()


def test_a_page_that_cannot_be_made_does_not_fail_the_run(
    tiny: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = SemiTrainer(load_config("train", tiny | {"plots": True, "iters": 4, "burn_in": 2, "max_det": 5}))
    (trainer.folder / "report.html").mkdir()  # nothing can be written there
    summary = trainer.train()
    assert summary["steps"] == 4
    said = capsys.readouterr().out
    assert "WARNING: report.html could not be made (IsADirectoryError" in said
    assert f"`ssod report {trainer.folder}" in said


def test_the_command_line_makes_it_and_says_where(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = trained.parent / "elsewhere" / "x.html"
    assert main(["report", str(trained), f"out={out}", "device=cpu", "workers=0"]) == 0
    assert f"page {out}" in capsys.readouterr().out
    assert Page(out).open == []
    assert main(["report"]) == 2
    assert "'run' is missing" in capsys.readouterr().err
    assert main(["report", str(trained.parent / "no")]) == 2
    assert "no folder of a training run" in capsys.readouterr().err


def test_the_command_on_the_page_repeats_the_run() -> None:
    words = [
        "data=my.yaml",
        "labeled=10%",
        "strategy=rpl",
        "strategy.tau=0.6",
        "imgsz=[400, 640]",
        "lr0=1e-5",
        "amp=false",
    ]
    words += ["augment.strong=[weak, {erase: {p: 0.5, area: [0.02, 0.2]}}]", "milestones=[0.5]", "name=it's; rm"]
    words += ["weights=my file.pt", "seed=3", "cache=disk", "detector.codec=bucket", "unlabeled=none", "freeze=1"]
    config = load_config("train", parse_words(words))
    command = overview.command(config.model_dump())
    again = load_config("train", parse_words(shlex.split(command)[2:]))
    assert again.model_dump() == config.model_dump() | {"name": "exp"}, "only where it is written to is another"


def test_differences_are_from_the_defaults_alone() -> None:
    assert differences(load_config("train", {}).model_dump()) == {}
    config = load_config("train", {"batch": 3, "strategy": {"tau": 0.5}, "augment": "comining"})
    found = differences(config.model_dump())
    assert found == {
        "batch": 3,
        "strategy": "mean_teacher",
        "strategy.tau": 0.5,
        "augment.labeled": "comining",
        "augment.weak": "comining",
        "augment.strong": "comining",
    }
    assert differences({"of_a_later_version": 1}) == {"of_a_later_version": 1}


def test_all_parts_by_hand(tmp_path: Path) -> None:
    run = made_by_hand(tmp_path / "exp")
    run_files.write_film(run, NAMES, STEPS)
    run_files.write_audit(run, NAMES, STEPS)
    run_files.write_alarm(run, "nothing above the threshold; lower strategy.tau", "error")
    run_files.write_baseline(run, NAMES, STEPS)
    page = page_of(run)
    text = page.text()
    assert page.open == []
    assert "error at step 40: nothing above the threshold" in text
    assert "0.040 AP more than its supervised control" in text
    assert "9 labelled images that the run treated as unlabelled" in text
    assert [c["class"] for c in page.of("li") if c.get("class") in ("error", "warning")] == ["error"]
    labels = [svg.get("aria-label", "") for svg in page.of("svg")]
    for title in ("Kept pseudo boxes", "tau by class", "cat: scores of the teacher", "cat: scores at step 60"):
        assert any(label.startswith(title) for label in labels), title
    ap = next(label for label in labels if label.startswith("AP on"))
    assert "baseline (supervised): from 0.09 at step 20" in ap
    assert len(page.of("img")) == 4 + 3, "a thumbnail an image, however many steps, and a pair a step"
    film = read_film(run / "pseudo")
    assert film is not None
    written = json.loads((run / "pseudo" / "step000060.json").read_text())["annotations"]
    kept = sum(a["kept"] for a in written)
    assert film.counts[-1] == (60, kept, len(written) - kept)
    record = run / "pseudo" / "step000060.json"
    fewer = json.loads(record.read_text())
    fewer["images"][0]["left_out"] = 67  # what a file counts and does not hold
    record.write_text(json.dumps(fewer))
    film = read_film(run / "pseudo")
    assert film is not None
    assert film.counts[-1] == (60, kept, len(written) - kept + 67)
    assert "without 67 dropped boxes" in " ".join(film.notes)
    solid = [r for r in page.of("rect") if r.get("class") == "solid"]
    assert len(solid) == kept, "the last step is drawn without the script"


def test_what_a_run_lacks_is_said_and_nothing_fails(tmp_path: Path) -> None:
    folder = tmp_path / "begun"
    folder.mkdir()
    (folder / "args.yaml").write_text("data: my.yaml\nlabeled: 10%\nstrategy: {name: mean_teacher}\n")
    page = page_of(folder)
    text = page.text()
    for said in (
        "not finished",
        "No validation has been done yet",
        "No alarm was raised",
        "results.csv has no losses yet",
        "no folder pseudo/",
        "audit=5%",
        "no env.txt",
        "not shown: there are no data.",
    ):
        assert said in text, said


def test_a_run_that_still_trains_has_its_curves(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "running"
    shutil.copytree(trained, run)
    (run / "metrics.json").unlink()
    with open(run / "results.csv", "a") as file:
        file.write("7,0.1")  # the line being written
    page = page_of(run)
    assert "not finished" in page.text()
    assert "AP by class is known when the run has ended" in page.text()
    assert any(s.get("aria-label", "").startswith("AP on") for s in page.of("svg"))
    assert (run / "results.csv").read_text().endswith("7,0.1"), "looking changes nothing"


def test_damaged_files_are_named(tmp_path: Path) -> None:
    run = made_by_hand(tmp_path / "exp")
    run_files.write_film(run, NAMES, STEPS)
    run_files.write_alarm(run, "one whole line")
    with open(run / "diagnosis.jsonl", "a") as file:
        file.write('{"step": 50, "te')
    (run / "baseline.json").write_text("{")
    (run / "pseudo" / "step000040.json").write_text('{"info": {}')
    (run / "pseudo" / "images" / "2.jpg").write_bytes(b"no image")
    text = page_of(run).text()
    assert "diagnosis.jsonl: 1 lines are not whole" in text
    assert "one whole line" in text
    assert "baseline.json is not whole JSON" in text
    assert "Could not be read and left out: step000040.json" in text
    assert "The thumbnail of 1.jpg cannot be read" in text


def test_whatever_users_write_stays_text(tmp_path: Path) -> None:
    names = [EVIL, '"><img src=x onerror=alert(1)>', "a & b"]
    folder = made_by_hand(tmp_path / "a <b> & c", names, data=f"{EVIL}.yaml", name="'\"><script>x</script>")
    run_files.write_film(folder, names, STEPS)
    run_files.write_audit(folder, names, STEPS)
    run_files.write_alarm(folder, EVIL)
    (folder / "env.txt").write_text(EVIL)
    record = folder / "pseudo" / "step000060.json"
    record.write_text(record.read_text().replace("0.jpg", "<script>.jpg").replace("below tau", "</script><b>"))
    rows = np.asarray([[0, 5, 5, 50, 50, 0, 0.9]], float)
    images = [{"file_name": f"{EVIL}.jpg", "width": 64, "height": 64}]
    Image.new("RGB", (64, 64)).save(tmp_path / "x.png")
    findings = Findings({"conf": 0.05, "of": 1}, images, names, rows[:0], rows)
    page = page_of(folder, findings=findings, paths=[tmp_path / "x.png"], why="")
    assert page.open == []
    scripts = page.of("script")
    assert [s.get("type", "") for s in scripts] == ["application/json", ""], "no script but the page's own"
    assert all(not name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert all(i["src"].startswith("data:") for i in page.of("img"))
    assert EVIL in page.text()
    write = folder / "report.html"
    data = re.search(r'id="film-data">(.*?)</script>', write.read_text(), re.S)
    assert data is not None
    assert json.loads(data[1])["names"] == names


def test_a_page_stays_small(tmp_path: Path) -> None:
    names = [f"class {i}" for i in range(80)]
    run = made_by_hand(tmp_path / "exp", names)
    run_files.write_film(run, names, range(10, 410, 10), images=20, boxes=120)
    run_files.write_audit(run, names, STEPS)
    rng = np.random.default_rng(0)
    paths = []
    for i in range(8):
        paths.append(tmp_path / f"{i}.jpg")
        Image.fromarray(rng.integers(0, 255, (700, 900, 3), np.uint8)).save(paths[-1])
    images = [{"file_name": p.name, "width": 900, "height": 700} for p in paths]
    boxes = rng.uniform(0, 400, (800, 2))
    columns = [rng.integers(0, 8, 800), *boxes.T, *(boxes + 200).T, rng.integers(0, 80, 800)]
    truth, found = (np.stack([*columns, last], 1).astype(float) for last in (np.zeros(800), rng.uniform(0, 1, 800)))
    found[:, 1:5] += 60
    findings = Findings({"conf": 0.05, "of": 8}, images, names, truth, found)
    page = page_of(run, findings=findings, paths=paths, why="")
    assert (run / "report.html").stat().st_size < 8e6
    assert len(page.of("img")) == 16 + 12 + 24
    assert "24 of 40 recorded steps are shown" in page.text()
    assert "the 20 of 80 classes that are annotated most" in page.text()


def test_several_runs_side_by_side(tmp_path: Path, trained: Path) -> None:
    for i, tau in enumerate((0.5, 0.6)):
        made_by_hand(tmp_path / "train" / f"run{i}", strategy={"name": "mean_teacher", "tau": tau}, seed=i)
    (tmp_path / "train" / "run0" / "baseline").mkdir()
    shutil.copyfile(tmp_path / "train/run0/args.yaml", tmp_path / "train/run0/baseline/args.yaml")
    shutil.copytree(trained, tmp_path / "train" / "short")
    (tmp_path / "train" / "nothing").mkdir()
    said: list[str] = []
    words = report_words([str(p) for p in sorted((tmp_path / "train").iterdir())])
    page_file = report(load_config("report", words), said.append)
    assert page_file == tmp_path / "train" / "comparison.html"
    assert said == [f"left out, since they hold no run (no args.yaml): {tmp_path / 'train' / 'nothing'}"]
    page = Page(page_file)
    text = page.text()
    assert page.open == []
    assert "3 runs" in text
    assert text.index("run0") < text.index("short"), "the best one first"
    assert re.search(r"strategy\.tau 0\.5 0\.6", text)
    assert re.search(r"seed default 1 ", text)
    assert any(s.get("aria-label", "").startswith("AP of the teacher") for s in page.of("svg"))

    for given in ([str(tmp_path / "train")], [str(tmp_path / "train" / "*")], [str(tmp_path)]):
        assert [f.name for f in find_runs(given)[0]] == ["run0", "run1", "short"], given
    with pytest.raises(UserError, match="goes with one run"):
        report(load_config("report", words | {"baseline": str(trained)}))


def test_one_run_against_another(tmp_path: Path) -> None:
    own = made_by_hand(tmp_path / "own")
    other = made_by_hand(tmp_path / "other", strategy={"name": "supervised"}, imgsz=320)
    said: list[str] = []
    config = load_config("report", {"run": str(own), "baseline": str(other), "device": "cpu"})
    page = Page(report(config, said.append))
    assert "AP, end" in said[0]
    assert "Against the baseline other" in page.text()
    assert "imgsz=640 against 320" in page.text(), "what makes the comparison doubtful"
    assert "0.000 AP more than the baseline other" in page.text()


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.37), (0.3, 0.41), (0, 180_000), (-2.5, 7), (0, 1e-5)])
def test_ticks_are_round_and_within(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 3 <= len(found) <= 7
    assert all(low - 1e-9 <= t <= high + 1e-9 for t in found)
    steps = np.diff(found)
    assert np.allclose(steps, steps[0])


def test_a_chart_leaves_out_what_is_no_number() -> None:
    nan = float("nan")
    assert line_chart("x", [Line("a", [1, 2], [nan, nan], "red")]) == ""
    drawn = str(line_chart("x", [Line("a", [1, 2, 3], [1, nan, 3], "red"), Line("b", [5], [2], "red")]))
    assert "nan" not in drawn
    assert drawn.count("<polyline") == 2
    assert "a: from 1 at step 1 to 3 at step 3, at most 3." in drawn
    flat = str(line_chart("x", [Line("a", [0], [0], "red")]))
    assert "nan" not in flat
