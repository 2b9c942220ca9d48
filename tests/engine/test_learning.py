"""Does it learn? Minutes long: `make test-slow`. The bounds are far below what was seen; no win is asserted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ssod.config import load_config
from ssod.engine.trainer import SemiTrainer

pytestmark = pytest.mark.slow


def train(tmp_path: Path, **overrides: Any) -> dict[str, Any]:
    fixed = {"cfg": "demo.yaml", "project": str(tmp_path), "plots": False, "device": "cpu", "val_interval": 1000}
    return SemiTrainer(load_config("train", fixed | overrides)).train()


def test_fcos_learns_the_drawn_set_and_pseudo_labels_do_no_harm(tmp_path: Path) -> None:
    """Seen: AP50 0.49 after 200 supervised steps (seed 0), rising with pseudo labels."""
    summary = train(tmp_path, iters=260, burn_in=200)
    start, end = summary["burn_in"], summary["final"]["student"]
    assert start["AP50"] > 0.3
    assert end["AP50"] > 0.8 * start["AP50"]


def test_faster_rcnn_learns_the_drawn_set(tmp_path: Path) -> None:
    detector = {"name": "faster_rcnn", "fpn_channels": 64, "box_head_width": 256, "roi_samples": 64}
    summary = train(tmp_path, detector=detector, strategy="supervised", iters=250)
    assert summary["final"]["student"]["AP50"] > 0.15
