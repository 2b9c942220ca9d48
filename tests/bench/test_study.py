"""The study runner with real, tiny runs: nothing twice, nothing lost; tables whose numbers are worked out by hand."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from study import Study, commits, in_use, main, seconds_of
from study_grid import Grid, Run, digest, read_grid, runs_of
from study_page import BEGIN, END, differences_table, figures_table, write_page

from ssod.checkpoint import load_checkpoint
from ssod.config import load_config
from ssod.engine.setup import build_student
from ssod.errors import UserError
from ssod.report.table import Table
from ssod.strategies import build_strategy, strategy_class
from ssod.strategies.base import Plan

STUDY = Path(__file__).with_name("study.py")
GRIDS = sorted(STUDY.parent.glob("grids/*.yaml"))


@pytest.fixture
def grid(tiny: dict[str, object], tmp_path: Path) -> Path:
    """Two arms of six steps at 64 pixels."""
    base = {k: v for k, v in tiny.items() if k not in ("project", "device", "strategy")}
    arms = {
        "supervised": {"strategy": {"name": "supervised", "ema": True}},
        "teacher": {"strategy": tiny["strategy"]},
    }
    path = tmp_path / "small.yaml"
    content = {"title": "Small", "base": base, "control": "supervised", "seeds": [0], "arms": arms}
    path.write_text(yaml.safe_dump(content))
    return path


def study(grid: Path, *words: str) -> int:
    return main([str(grid), f"out={grid.parent / 'out'}", "device=cpu", "jobs=2", *words])


def records(grid: Path) -> list[dict[str, Any]]:
    path = grid.parent / "out" / "runs.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def test_a_study_does_what_it_can_once_and_goes_on(grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = yaml.safe_load(grid.read_text())
    content["arms"]["starving"] = {"unlabeled": "none", "strategy": {"name": "mean_teacher"}}
    grid.write_text(yaml.safe_dump(content))
    assert study(grid, "arms=starving,teacher") == 1
    said = capsys.readouterr()
    assert "starving-0" in said.err
    assert "given up" in said.err
    assert "done teacher-0" in said.out
    (found,) = records(grid)
    assert (found["arm"], found["seed"], found["steps"]) == ("teacher", 0, 6)
    assert set(found["final"]) == {"student", "teacher"}
    assert {"AP", "AP50", "AP75", "APs", "APm", "APl"} <= set(found["final"]["student"])
    assert found["seconds"] > 0
    assert found["versions"]["torch"]
    assert [point[0] for point in found["curve"]["student"]] == [3, 6]
    page = (grid.parent / "out" / "small.md").read_text()
    assert "1 of 2 runs; **1 missing**" in page
    assert str(grid.parent) not in page  # no folder of this machine
    assert (grid.parent / "out" / "small.png").is_file()

    assert study(grid, "arms=teacher", "seeds=0,1") == 0
    assert [(r["arm"], r["seed"]) for r in records(grid)] == [("teacher", 0), ("teacher", 1)]

    # A study killed between the end of a run and its line: the run is found finished.
    lines = (grid.parent / "out" / "runs.jsonl").read_text().splitlines()
    (grid.parent / "out" / "runs.jsonl").write_text(lines[0] + "\n" + lines[1][:40])
    capsys.readouterr()
    assert study(grid, "arms=teacher", "seeds=0,1") == 0
    assert "started" not in capsys.readouterr().out
    again = (grid.parent / "out" / "runs.jsonl").read_text().splitlines()[-1]
    assert json.loads(again) == json.loads(lines[1])


@pytest.mark.slow
def test_a_killed_run_is_resumed_and_a_stopped_study_leaves_all_saved(grid: Path) -> None:
    words = [sys.executable, str(STUDY), str(grid), f"out={grid.parent / 'out'}", "device=cpu", "jobs=1"]
    words += ["iters=100000", "arms=supervised", "val_interval=100000"]
    running = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        folder = wait_for(lambda: next((grid.parent / "out" / "train").glob("*/weights/last.pt"), None)).parents[1]
        first = owner(folder)
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: owner(folder) not in (first, 0))
        second = owner(folder)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=120)
    finally:
        running.kill()
    assert running.returncode == 130, err
    assert "ended with code -9, tried again" in err
    assert "resumed supervised-0" in out
    assert not alive(second)
    assert records(grid) == []
    assert load_checkpoint(folder / "weights" / "last.pt")["train"]["step"] >= 1


def test_a_run_that_another_process_works_on_is_left_to_it(tmp_path: Path) -> None:
    run = Run("a", 0, tmp_path / "a.yaml", "c0ffee00")
    study = Study([run], tmp_path, 1, {"device": "cpu"})
    lock = study.folder(run) / ".lock"
    lock.parent.mkdir(parents=True)
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a+'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    try:
        assert in_use(lock.parent)
        assert not study._begin_one()
        assert (list(study.waiting), study.active) == ([run], [])
    finally:
        holder.communicate("\n")
    assert not in_use(lock.parent)


def test_mistakes_are_said_before_anything_runs(grid: Path) -> None:
    content = yaml.safe_load(grid.read_text())
    with pytest.raises(UserError, match=r"no arm 'teachr'[.] Did you mean 'teacher'"):
        read_grid(grid, {}, ["teachr"])
    content["arms"]["teacher"]["strategy"]["tua"] = 0.5
    grid.write_text(yaml.safe_dump(content))
    wrong = read_grid(grid, {})
    with pytest.raises(UserError, match=r"arm teacher: .*strategy[.]tua.*strategy[.]tau"):
        runs_of(wrong, grid.parent / "out")
    grid.write_text(yaml.safe_dump(content | {"arm": {}}))
    with pytest.raises(UserError, match="'arm' is not a key"):
        read_grid(grid, {})


def test_the_hash_tells_what_is_learned_and_nothing_else(tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt"):
        (tmp_path / name).write_bytes(b"same")
    one = {"iters": 5, "strategy": {"name": "x", "teacher_weights": str(tmp_path / "a.pt")}, "device": "cpu"}
    two = {"strategy": {"teacher_weights": str(tmp_path / "b.pt"), "name": "x"}, "iters": 5, "data_path": "d"}
    assert digest(one) == digest(two)
    assert digest(one) != digest(one | {"iters": 6})
    (tmp_path / "b.pt").write_bytes(b"other")
    assert digest(one) != digest(two)


def test_the_clock_of_a_resumed_run_is_added_up(tmp_path: Path) -> None:
    table = Table(tmp_path / "results.csv")
    for step, clock in ((1, 5.0), (2, 9.0), (3, 2.0), (4, 6.5)):  # resumed after step 2: 9 + 6.5
        table.add({"step": step, "seconds": clock})
    assert seconds_of(table) == pytest.approx(15.5)


def test_commits_of_all_parts_are_kept(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_text("# commit abc\n# ssod train\nstep 1\n# commit def+\n# commit abc\n")
    assert commits(log) == ["abc", "def+"]


def test_a_broken_line_loses_one_record_only(tmp_path: Path) -> None:
    (tmp_path / "runs.jsonl").write_text('{"arm": "a", "seed": 0, "config": "c"}\n{"arm": "b", "se')
    assert [r["arm"] for r in Study([], tmp_path, 1, {"device": "cpu"}).records()] == ["a"]


def record(arm: str, seed: int, ap: float) -> dict[str, Any]:
    figures = {"AP": ap, "AP50": 2 * ap, "AP75": 0.0, "APs": None, "APm": ap, "APl": ap}
    return {
        "arm": arm,
        "seed": seed,
        "config": "c",
        "commit": ["abc"],
        "device": "CPU",
        "versions": {"torch": "2"},
        "burn_in": None,
        "final": {"student": figures},
        "curve": {"student": [[5, ap, 0, 0], [10, ap, 0, 0]]},
        "seconds": 60.0,
        "steps": 10,
        "labeled": 1,
        "unlabeled": 2,
        "val": 3,
    }


RECORDS = [record("control", s, ap) for s, ap in enumerate((0.1, 0.2, 0.3))]
RECORDS += [record("new", s, ap) for s, ap in enumerate((0.11, 0.22, 0.33))]


def test_the_tables_by_hand() -> None:
    # Means 20 and 22, deviations 10 and 11.
    text = figures_table(RECORDS)
    assert "| control | student | 3 | 20.0 ± 10.0 | 40.0 ± 20.0 | 0.0 ± 0.0 | - | 20.0 ± 10.0 |" in text
    assert "| 22.0 ± 11.0 | 44.0 ± 22.0 |" in text
    # Paired: +1, +2, +3, so 2 ± 1 although each arm spreads by 10; t(0.975, 2) = 4.3027, 4.3027 / sqrt(3) = 2.484.
    text = differences_table(RECORDS, "control")
    assert "| new | student | 3 | +2.0 ± 1.0 | +4.0 ± 2.0 | +0.0 ± 0.0 | - |" in text
    assert "| -0.5 .. +4.5 | +1.0, +2.0, +3.0 |" in text


def test_a_loss_is_shown_as_one_and_missing_seeds_are_not_paired() -> None:
    worse = [record("control", 0, 0.3), record("control", 1, 0.3), record("new", 1, 0.2)]
    text = differences_table(worse, "control")
    assert "| new | student | 1 | -10.0 | -20.0 |" in text


def test_a_page_keeps_what_people_wrote_around_it(tmp_path: Path) -> None:
    page = tmp_path / "p.md"
    grid = Grid("A title", "control", (0, 1, 2), {})
    write_page(page, grid, RECORDS, 6, ["grid.yaml", f"data_path={tmp_path / 'bccd'}", "jobs=2"])
    page.write_text(page.read_text().replace(BEGIN, f"Before.\n{BEGIN}") + "After.\n")
    write_page(page, grid, RECORDS[:3], 6, ["grid.yaml"])
    text = page.read_text()
    assert text.startswith("# A title")
    assert text.index("Before.") < text.index(BEGIN) < text.index("3 missing") < text.index(END) < text.index("After.")
    assert text.count(BEGIN) == 1


@pytest.mark.parametrize("path", GRIDS, ids=lambda p: p.stem)
def test_every_arm_of_every_grid_can_be_built_and_takes_as_many_steps(path: Path, tmp_path: Path) -> None:
    grid = read_grid(path, {"backbone": "test_resnet"})  # small; what goes together does not depend on it
    runs = runs_of(grid, tmp_path)
    assert len({r.name for r in runs}) == len(runs) == len(grid.arms) * len(grid.seeds)
    assert grid.control in grid.arms
    assert not [key for values in grid.arms.values() for key in ("data_path", "weights") if key in values]
    plans, steps = set(), {}
    for arm in grid.arms:
        config = load_config("train", {"cfg": str(tmp_path / "arms" / f"{arm}.yaml")})
        student, _ = build_student(config, ["a", "b", "c"])
        two_stages = strategy_class(config.strategy.name).two_stages
        plan = Plan(config.iters, int(config.burn_in), config.ema_decay, two_stages)
        build_strategy(config.strategy.name, student, config.strategy.options, plan)
        plans.add((config.batch, config.unlabeled_per_step, config.imgsz, None if two_stages else config.burn_in))
        # A teacher's own stage may come on top of the steps that the student takes.
        steps[arm] = {plan.iters, plan.iters - plan.burn_in} if two_stages else {plan.iters}
    assert len({p[:3] for p in plans}) == 1
    assert len({p[3] for p in plans} - {None}) == 1
    assert all(steps[grid.control] <= found for found in steps.values())


def wait_for(what: Callable[[], Any], seconds: float = 120) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.05)
    raise AssertionError("waited too long")


def owner(folder: Path) -> int:
    """The process that trains in a run folder, 0 while the folder changes hands."""
    words = (folder / ".lock").read_text().split()
    return int(words[1]) if len(words) == 2 else 0


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] != "Z"
