"""Two run folders held against each other: figures, differences, and what makes them incomparable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ssod.errors import UserError
from ssod.report.compare_runs import compare_runs

ARGS = {"data": "d.yaml", "labeled": "10%", "seed": 0, "imgsz": 320, "batch": 8, "detector": {"name": "fcos"}}


def entry(step: int, **networks: tuple[float, float | None, float]) -> dict[str, Any]:
    """AP, APs and the AP of class "b" of each network; class "a" has the AP."""
    figures = {
        name: {"AP": ap, "AP50": ap + 0.25, "APs": small, "per_class": {"a": ap, "b": b}}
        for name, (ap, small, b) in networks.items()
    }
    return {"step": step, **figures}


def folder(path: Path, history: list[dict[str, Any]], use: str, best: int, **args: Any) -> Path:
    path.mkdir()
    ap = next(h for h in history if h["step"] == best)[use]["AP"]
    metrics = {"best": {"AP": ap, "step": best, "use": use}, "steps": history[-1]["step"], "history": history}
    (path / "metrics.json").write_text(json.dumps(metrics | {"labeled": 6, "val": 8} | args.pop("metrics", {})))
    (path / "args.yaml").write_text(yaml.safe_dump(ARGS | args))
    return path


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    own = [
        entry(4, student=(0.5, None, 0.25), teacher=(0.75, 0.5, 0.5)),
        entry(8, student=(0.875, 0.25, 0.0), teacher=(0.625, None, 0.25)),
    ]
    control = [entry(4, student=(0.25, 0.25, 0.5)), entry(8, student=(0.5, 0.125, 0.125))]
    return (
        folder(tmp_path / "run", own, "teacher", 4, strategy={"name": "mean_teacher", "tau": 0.5}),
        folder(tmp_path / "control", control, "student", 8, strategy={"name": "supervised"}),
    )


def test_the_deployed_networks_are_compared_at_the_end_and_at_their_best(two: tuple[Path, Path]) -> None:
    c = compare_runs(*two)
    assert (c.run.network, c.baseline.network) == ("teacher", "student")
    assert c.run.final["AP"] == 0.625, "the teacher's, which best.pt deploys, though the student ended higher"
    assert (c.run.best["AP"], c.run.best_step, c.baseline.best_step) == (0.75, 4, 8)
    assert c.gain == {"AP": 0.125, "AP50": 0.125, "AP75": None, "APs": None, "APm": None, "APl": None}
    assert (c.best_gain["AP"], c.best_gain["APs"]) == (0.25, 0.375)
    assert c.per_class == {"a": 0.125, "b": 0.125}
    assert c.warnings == [], "the strategy is what is compared"
    assert "+0.1250" in c.text()
    assert c.text().count("WARNING") == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": "e.yaml"}, "other data: data=d.yaml against e.yaml"),
        ({"labeled": "5%"}, "other labelled images: labeled=10% against 5%"),
        ({"metrics": {"labeled": 5}}, "6 labelled images against 5"),
        ({"metrics": {"steps": 9}}, "8 steps against 9"),
        ({"metrics": {"val": 4}}, "8 validation images against 4"),
        ({"imgsz": 640}, "another image size: imgsz=320 against 640"),
        ({"seed": 1}, "another seed: seed=0 against 1"),
        ({"detector": {"name": "fcos", "head_convs": 2}}, "another detector: detector.head_convs=None against 2"),
        ({"lr0": 0.1}, "another optimizer or schedule: lr0=None against 0.1"),
    ],
)
def test_what_else_differs_is_said(two: tuple[Path, Path], tmp_path: Path, change: dict[str, Any], said: str) -> None:
    history = [entry(8, student=(0.5, 0.5, 0.5))]
    other = folder(tmp_path / "other", history, "student", 8, strategy={"name": "supervised"}, **change)
    (warning,) = compare_runs(two[0], other).warnings
    assert said in warning


def test_other_classes_are_said_and_their_differences_left_open(two: tuple[Path, Path]) -> None:
    metrics = json.loads((two[1] / "metrics.json").read_text())
    for h in metrics["history"]:
        h["student"]["per_class"] = {"a": 0.5, "z": 0.5}
    (two[1] / "metrics.json").write_text(json.dumps(metrics))
    c = compare_runs(*two)
    assert c.per_class == {"a": 0.125, "b": None, "z": None}
    assert "other classes: a, b against a, z" in c.warnings[0]


def test_no_finished_run_is_said_in_a_sentence(two: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        compare_runs(two[0], tmp_path / "none")
    (two[1] / "args.yaml").unlink()
    with pytest.raises(UserError, match=r"control is no finished training run: it has no args\.yaml"):
        compare_runs(*two)
    (two[0] / "metrics.json").write_text('{"figures": {}}')
    with pytest.raises(UserError, match="is not of a finished training run with a validation"):
        compare_runs(*two)
