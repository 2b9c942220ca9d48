"""What the mechanism tests count, by hand and on a small untrained network."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mechanism_stats import class_recall, correlations, hits, judge, most_certain, precision, spearman

from ssod.config import load_config
from ssod.data.samples import Sample
from ssod.engine.trainer import SemiTrainer
from ssod.structures import Instances


def sample(boxes: list[list[float]], labels: list[int]) -> Sample:
    crowd = np.zeros(len(labels), bool)
    places = np.array(boxes, np.float32).reshape(-1, 4)
    return Sample(Path("x.png"), 1, 100, 100, places, np.array(labels, np.int64), crowd, labeled=True)


def detections(boxes: list[list[float]], labels: list[int], scores: list[float], quality: list[float]) -> Instances:
    return Instances(torch.tensor(boxes), torch.tensor(labels), torch.tensor(scores), torch.tensor(quality))


SAMPLES = [sample([[0, 0, 10, 10], [20, 0, 30, 10]], [0, 1]), sample([[0, 0, 10, 10]], [0]), sample([], [])]
FOUND = [
    (
        0,
        detections(
            [[0, 0, 10, 10], [0, 0, 10, 8], [20, 0, 30, 10]],  # exact; 0.8 of it; exact place, wrong class
            [0, 0, 0],
            [0.6, 0.9, 0.8],
            [0.9, 0.5, 0.4],
        ),
    ),
    (1, detections([[0, 0, 10, 6]], [0], [0.7], [0.8])),  # 0.6
]


def test_detections_are_laid_beside_the_truth_of_their_class() -> None:
    judged = judge(FOUND, SAMPLES, 2, by_root=False)
    assert judged.iou.tolist() == pytest.approx([1, 0.8, 0, 0.6])
    assert judged.truth.tolist() == [[1, 1], [1, 0], [0, 0]]
    root = judge(FOUND, SAMPLES, 2, by_root=True)
    assert root.p.tolist() == pytest.approx([0.36 / 0.9, 1.0, 1.0, 0.49 / 0.8])


def test_one_object_counts_once_and_the_most_certain_box_takes_it() -> None:
    judged = judge(FOUND, SAMPLES, 2, by_root=False)
    # By p the box of IoU 0.8 comes first: at 0.5 it takes the object, at 0.9 it cannot.
    assert hits(judged, judged.p, 0.5).tolist() == [False, True, False, True]
    assert hits(judged, judged.p, 0.9).tolist() == [True, False, False, False]
    assert judged.quality is not None
    assert hits(judged, judged.quality, 0.5).tolist() == [True, False, False, True]


def test_precision_and_recall_by_hand() -> None:
    judged = judge(FOUND, SAMPLES, 2, by_root=False)
    right = hits(judged, judged.p, 0.5)
    keep = most_certain(judged.p, 2)  # 0.9 (right) and 0.8 (wrong class)
    value, low, high = precision(judged, keep, right)
    assert value == 0.5
    assert 0 <= low <= value <= high <= 1
    assert np.isnan(precision(judged, most_certain(judged.p, 0), right)[0])
    assert class_recall(judged, 0.0).tolist() == [1.0, 0.0]  # class 0: both; class 1: none
    assert class_recall(judged, 0.8).tolist() == [0.5, 0.0]


def test_rank_correlation_by_hand() -> None:
    # Ranks 1 2 3 4 and 1 3 2 4: 1 - 6 * 2 / (4 * 15) = 0.8.
    assert spearman(np.array([1.0, 2, 3, 4]), np.array([10.0, 30, 20, 99])) == pytest.approx(0.8)
    assert np.isnan(spearman(np.array([1.0, 1.0]), np.array([1.0, 2.0])))


def test_a_telling_quality_beats_a_deaf_score_beyond_its_interval() -> None:
    rng = np.random.default_rng(0)
    samples, found = [], []
    for index in range(40):
        samples.append(sample([[10.0 * i, 0, 10.0 * i + 9, 9] for i in range(8)], [0] * 8))
        heights = rng.uniform(3, 9, 8)
        boxes = [[10.0 * i, 0, 10.0 * i + 9, float(h)] for i, h in enumerate(heights)]
        noisy = (heights / 9 + rng.normal(0, 0.1, 8)).clip(0.01, 0.99)
        found.append((index, detections(boxes, [0] * 8, rng.uniform(0.1, 0.9, 8).tolist(), noisy.tolist())))
    judged = judge(found, samples, 1, by_root=False)
    told = correlations(judged, np.ones(len(judged.p), bool))
    assert told["v"][0] > 0.7
    assert abs(told["p"][0]) < 0.2
    assert told["v"][1] < told["v"][0] < told["v"][2]
    assert told["v - p"][1] > 0.3
    assert correlations(judged, np.ones(len(judged.p), bool)) == told  # the same draws every time


@pytest.mark.slow
def test_a_report_from_checkpoints(tiny: dict[str, object], tmp_path: Path) -> None:
    detector = {"name": "retinanet", "fpn_channels": 16, "head_convs": 1, "codec": "bucket", "buckets": 4}
    trainer = SemiTrainer(load_config("train", {**tiny, "detector": detector, "iters": 4, "burn_in": 2, "conf": 0.001}))
    model = Path(trainer.train()["folder"]) / "weights" / "last.pt"
    script = Path(__file__).with_name("mechanism.py")
    words = [sys.executable, str(script), "--data", str(tiny["data"]), "--models", str(model), "--without", str(model)]
    done = subprocess.run(
        [*words, "--conf", "0.001", "--out", str(tmp_path / "m.json")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "m.json").read_text())
    (figures,) = report["models"].values()
    assert {"p", "v", "v - p"} <= set(figures["correlation"]["all"])
    assert {row["by"] for row in figures["thresholds"]} == {"p", "v", "p*v", "sqrt(p*v)"}
    assert all(gain == [0.0] or gain == [None] for row in report["classes"] for gain in [row["AP"]["gain"]])
    assert "| class | boxes |" in done.stdout
