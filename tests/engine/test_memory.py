"""Memory: what the log and the page say of it, and that a long run does not grow."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path
from typing import Any

import pytest

from ssod.config import load_config
from ssod.engine.memory import resident
from ssod.engine.trainer import SemiTrainer
from ssod.report.memory import memory
from ssod.report.overview import facts
from ssod.report.run import Run, read_run

Tiny = dict[str, Any]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux says it")


def test_resident_memory_is_what_this_process_has() -> None:
    before = resident()["memory/rss"]
    with mmap.mmap(-1, 100_000_000) as block:  # of the system, not from what was freed before
        for _ in range(100):
            block.write(bytes([1]) * 1_000_000)
        assert resident()["memory/rss"] - before == pytest.approx(100, abs=10)


def rows(sizes: list[float], seconds: list[float] | None = None) -> list[dict[str, str]]:
    """A log line every 30 steps."""
    times = seconds or [float(i) for i in range(len(sizes))]
    return [
        {"step": str(30 * (i + 1)), "seconds": str(t), "memory/rss": str(size)}
        for i, (size, t) in enumerate(zip(sizes, times, strict=True))
    ]


def test_a_leak_is_told_from_what_is_loaded_at_the_start(tmp_path: Path) -> None:
    start = [300.0 + 10 * i for i in range(25)]
    flat = memory(Run(tmp_path, {}, rows=rows(start + [550.0] * 75)))
    assert flat is not None
    assert (flat.end, flat.first, flat.last) == (550, 26 * 30, 3000)
    assert flat.slope == pytest.approx(0)
    leak = memory(Run(tmp_path, {}, rows=rows(start + [550 + 0.06 * i for i in range(75)])))
    assert leak is not None
    assert leak.slope == pytest.approx(2)
    assert "changed by +2.0 MB in 1,000 steps" in str(leak)


def test_a_resumed_run_is_another_process(tmp_path: Path) -> None:
    twice = rows([900.0] * 20 + [500.0] * 20, [float(i % 20) for i in range(40)])
    found = memory(Run(tmp_path, {}, rows=twice))
    assert found is not None
    assert (found.end, found.last) == (500, 1200)
    assert found.first > 600
    assert found.slope == pytest.approx(0)


def test_a_short_run_has_no_slope_and_an_old_one_no_memory(tmp_path: Path) -> None:
    assert str(memory(Run(tmp_path, {}, rows=rows([400.0])))) == "400 MB of RAM at the end, in the first process"
    assert memory(Run(tmp_path, {}, rows=[{"step": "30", "seconds": "1"}])) is None


@pytest.mark.slow
def test_three_thousand_steps_hold_their_memory(tiny: Tiny) -> None:
    """With all that watches by default, validations, saves and the films of pseudo boxes."""
    config = tiny | {
        "backbone": "test_resnet",
        "detector": {"name": "fcos", "fpn_channels": 16, "head_convs": 0, "pre_nms": 50},
        "imgsz": 32,
        "iters": 3000,
        "burn_in": 300,
        "val_interval": 300,
        "val_fraction": 0.25,
        "max_det": 10,
        "save_interval": 300,
        "lr0": 0.001,
    }
    trainer = SemiTrainer(load_config("train", config))
    trainer.train()
    run = read_run(trainer.folder)
    found = memory(run)
    assert found is not None
    assert found.slope is not None
    assert found.slope < 1, str(found)
    assert dict(facts(run))["Memory"] == str(found)
