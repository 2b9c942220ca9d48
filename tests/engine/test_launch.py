"""`device=cpu,cpu`: two processes under the elastic launcher, which end together."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ssod.checkpoint import load_checkpoint
from ssod.engine.launch import devices_of
from ssod.errors import UserError

Tiny = dict[str, Any]
BOUND = 30  # seconds within which all processes are gone


def test_devices() -> None:
    assert devices_of("auto") == ["auto"]
    assert devices_of(0) == ["0"]
    assert devices_of("0, 2") == ["0", "2"]
    assert devices_of("cpu,cpu") == ["cpu", "cpu"]
    for wrong, reason in (("0,cpu", "as their numbers"), ("1,1", "twice"), ("0,", "as their numbers")):
        with pytest.raises(UserError, match=reason):
            devices_of(wrong)


class Job:
    """`ssod train` on two processes of the CPU, and what it prints."""

    def __init__(self, tiny: Tiny, folder: Path, **more: Any) -> None:
        config = folder / "two.yaml"
        config.write_text(yaml.safe_dump(tiny | {"batch": 4, "workers": 0} | more))
        self.log = folder / "log.txt"
        self.run = Path(str(tiny["project"])) / "train" / "exp"
        with open(self.log, "w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ssod", "train", f"cfg={config}", "device=cpu,cpu"],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )

    def said(self) -> str:
        return self.log.read_text()

    def ranks(self) -> list[int]:
        """Process ids of the workers, rank 0 first."""
        found = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return sorted(
            (int(p) for p in found if b"RANK=" in Path(f"/proc/{p}/environ").read_bytes()),
            key=lambda p: int(re.findall(rb"\0RANK=(\d+)", Path(f"/proc/{p}/environ").read_bytes())[0]),
        )

    def wait_for_checkpoint(self) -> None:
        last = self.run / "weights" / "last.pt"
        until = time.monotonic() + 180
        while not last.exists():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < until, self.said()
            time.sleep(0.1)


@pytest.fixture
def job(tiny: Tiny, tmp_path: Path) -> Iterator[Any]:
    jobs: list[Job] = []

    def start(**more: Any) -> Job:
        jobs.append(Job(tiny, tmp_path, **more))
        return jobs[-1]

    yield start
    for one in jobs:
        one.process.kill()
        one.process.wait()


def test_one_run_of_two_processes(job: Any) -> None:
    one = job()
    assert one.process.wait(200) == 0, one.said()
    assert [f.name for f in one.run.parent.iterdir()] == ["exp"]
    assert load_checkpoint(one.run / "weights" / "last.pt")["train"]["step"] == 6
    assert one.said().count("6 steps of 4 labelled") == 1, "one process speaks"
    assert "end, student" in one.said()


def test_a_mistake_is_said_once_before_anything_starts(tiny: Tiny, tmp_path: Path) -> None:
    out = subprocess.run(
        [sys.executable, "-m", "ssod", "train", "device=cpu,cpu", "epoch=3"], capture_output=True, text=True
    )
    assert out.returncode == 2
    assert out.stderr.count("Did you mean epochs") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("number", "rank"), [(signal.SIGKILL, 1), (signal.SIGKILL, 0), (signal.SIGSTOP, 1)])
@pytest.mark.fault(16)
def test_a_rank_that_dies_or_hangs_ends_the_run_with_a_good_checkpoint(job: Any, number: int, rank: int) -> None:
    one = job(iters=5000, save_interval=2, val_interval=5000)
    one.wait_for_checkpoint()
    os.kill(one.ranks()[rank], number)
    start = time.monotonic()
    assert one.process.wait(BOUND + 30) != 0
    assert time.monotonic() - start < BOUND, one.said()
    assert load_checkpoint(one.run / "weights" / "last.pt")["train"]["step"] >= 2
    if number == signal.SIGSTOP:
        assert "rank 1 has been silent" in one.said()


@pytest.mark.slow
@pytest.mark.fault(17)
def test_a_stop_is_one_step_of_all_ranks(job: Any) -> None:
    one = job(iters=5000, save_interval=5000, val_interval=5000, burn_in=1)
    until = time.monotonic() + 180
    table = one.run / "results.csv"  # there before the first step; its first row tells that steps are done
    while not (table.exists() and len(table.read_text().splitlines()) > 1) and time.monotonic() < until:
        time.sleep(0.1)
    one.process.send_signal(signal.SIGTERM)
    assert one.process.wait(BOUND) == 143, one.said()
    assert load_checkpoint(one.run / "weights" / "last.pt")["train"]["step"] >= 1


@pytest.mark.slow
@pytest.mark.fault(16)
def test_a_restart_goes_on_from_the_checkpoint(job: Any) -> None:
    one = job(iters=60, save_interval=2, val_interval=60, restarts=1)
    one.wait_for_checkpoint()
    os.kill(one.ranks()[1], signal.SIGKILL)
    assert one.process.wait(300) == 0, one.said()
    assert [f.name for f in one.run.parent.iterdir()] == ["exp"]
    assert load_checkpoint(one.run / "weights" / "last.pt")["train"]["step"] == 60
    assert one.said().count("60 steps of 4 labelled") == 2, "started twice"
