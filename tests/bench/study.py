"""Compare settings over seeds: run every arm of a grid with every seed, then write a page of means and spreads.

    python tests/bench/study.py GRID.yaml jobs=2 data_path=DIR weights=FILE
    python tests/bench/study.py GRID.yaml jobs=12 device=cuda labeled=5% name=bccd5 pages=docs/results

name    of the study; default: the grid's
out     its folder: train/ with the runs, runs.jsonl with a line a finished run (default: runs/NAME)
jobs    runs side by side, each a process of its own with one thread
arms    arms=a,b: only these arms of the grid; seeds=0,1: only these seeds
pages   folder of NAME.md and NAME.png (default: out)
Any other word is a value of `ssod train` for all arms. docs: tests/bench/study_grid.py tells what a grid holds.

Start it again with the same words and it goes on: what is in runs.jsonl is not repeated, half a run is resumed. A run
whose process dies is tried again. Ctrl-C and SIGTERM stop the runs at a step's end, saved; a second one kills them. A
changed grid runs anew: its runs have another hash. Exit code 1 when a run failed for good.

Runs take the code of the checkout that this file lies in, as it is when each begins, and note its commit. Where that
code goes on changing, run a study of hours in a checkout of its own: git worktree add DIR.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import torch
from study_grid import Grid, Run, read_grid, runs_of
from study_page import summary_text, write_page

from ssod.config import parse_words
from ssod.deploy.infer import pick_device
from ssod.engine.run import lock_run, unlock_run
from ssod.engine.signals import SignalWatch
from ssod.errors import UserError
from ssod.report.table import Table

ROOT = Path(__file__).resolve().parents[2]
OWN = ("name", "out", "jobs", "arms", "seeds", "pages")
TRIES = 3  # starts of one run in one go
PAUSE = 0.2  # seconds between two looks at the processes
FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl")


@dataclass
class Child:
    run: Run
    process: subprocess.Popen[bytes]
    log: IO[str]
    resumed: bool


class Study:
    """The processes of a study. `given`: words for every run that say where data lie and what it runs on."""

    def __init__(self, runs: Sequence[Run], out: Path, jobs: int, given: dict[str, Any]) -> None:
        self.out = out
        self.jobs = jobs
        self.place = [f"{k}={given[k]}" for k in ("device", "data_path") if k in given]
        self.device = device_name(str(given.get("device", "auto")))
        known = {(r["arm"], r["seed"], r["config"]) for r in self.records()}
        self.waiting = deque(r for r in runs if (r.arm, r.seed, r.digest) not in known)
        self.total = len(self.waiting)
        self.active: list[Child] = []
        self.starts: dict[Run, int] = {}
        self.afresh: set[Run] = set()  # their checkpoint cannot be resumed
        self.failed: list[Run] = []

    def records(self) -> list[dict[str, Any]]:
        """Finished runs, oldest first. A line cut off by a crash is left out: its run is found finished again."""
        path = self.out / "runs.jsonl"
        found = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                print(f"study: {path} has a broken line; that run is looked at again.", file=sys.stderr)
        return found

    def work(self) -> int:
        """Run all that waits; 0, 1 when a run failed for good, 130 or 143 when asked to stop."""
        with SignalWatch() as watch:
            try:
                while self.waiting or self.active:
                    if watch.asked is not None:
                        self._stop()
                        return 128 + watch.asked
                    while self.waiting and len(self.active) < self.jobs and self._begin_one():
                        pass
                    self._look()
                    time.sleep(PAUSE)
            finally:
                for child in self.active:  # a second Ctrl-C, or a fault of this program
                    child.process.kill()
        return 1 if self.failed else 0

    def _begin_one(self) -> bool:
        """Start or collect the first waiting run that no other process works on; False when there is none."""
        for _ in range(len(self.waiting)):
            run = self.waiting.popleft()
            if not in_use(self.folder(run)):
                if (self.folder(run) / "metrics.json").is_file():
                    self._collect(run)
                else:
                    self._start(run)
                return True
            self.waiting.append(run)  # left by a study that was killed, or of another one: wait for it
        return False

    def _start(self, run: Run) -> None:
        folder, log = self.folder(run), self.log(run)
        resumed = run not in self.afresh and any((folder / "weights").glob("*.pt"))
        command = [sys.executable, "-m", "ssod", "train", *self.place]
        if resumed:
            command.append(f"resume={folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
            command += [f"cfg={run.config}", f"seed={run.seed}", f"project={self.out}", f"name={run.name}"]
            command.append("exist_ok=true")
        file = open(log, "a" if resumed else "w")  # noqa: SIM115 - closed when the process has ended
        file.write(f"# commit {commit()}\n# {shlex.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},  # the code whose commit is noted
            start_new_session=True,  # Ctrl-C reaches the study, which then asks each run once
        )
        self.starts[run] = self.starts.get(run, 0) + 1
        self.active.append(Child(run, process, file, resumed))
        print(f"{'resumed' if resumed else 'started'} {run.name}", flush=True)

    def _look(self) -> None:
        """Deal with the processes that have ended."""
        for child in [c for c in self.active if c.process.poll() is not None]:
            self.active.remove(child)
            child.log.close()
            code, run = child.process.returncode, child.run
            if code == 0:
                self._collect(run)
                continue
            if code == 2 and child.resumed:
                self.afresh.add(run)
            again = self.starts[run] < TRIES and (code != 2 or child.resumed)
            what = "tried again" if again else "given up"
            print(f"study: {run.name} ended with code {code}, {what}; output in {self.log(run)}.", file=sys.stderr)
            if again:
                self.waiting.appendleft(run)
            else:
                self.failed.append(run)

    def _collect(self, run: Run) -> None:
        record = self._record(run)
        path = self.out / "runs.jsonl"
        whole = not path.is_file() or path.read_bytes()[-1:] in (b"", b"\n")
        with open(path, "a", encoding="utf-8") as file:
            file.write(("" if whole else "\n") + json.dumps(record) + "\n")
        left = len(self.waiting) + len(self.active)
        scores = ", ".join(f"{n} AP {100 * f['AP']:.1f}" for n, f in record["final"].items())
        print(f"done {run.name}: {scores}, {record['seconds'] / 60:.1f} min; {left} of {self.total} left", flush=True)

    def _record(self, run: Run) -> dict[str, Any]:
        folder = self.folder(run)
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        lines = (folder / "env.txt").read_text(encoding="utf-8").splitlines()
        last = metrics["steps"]
        return {
            "arm": run.arm,
            "seed": run.seed,
            "config": run.digest,
            "commit": commits(self.log(run)),
            "device": self.device,
            "versions": dict(line.split(" ", 1) for line in lines),
            "seconds": seconds_of(Table(folder / "results.csv", last)),
            **{k: metrics[k] for k in ("steps", "labeled", "unlabeled", "val", "best")},
            "burn_in": metrics["burn_in"] and {k: metrics["burn_in"][k] for k in FIGURES},
            "final": {n: {k: v for k, v in f.items() if k != "per_class"} for n, f in metrics["final"].items()},
            "per_class": {n: f["per_class"] for n, f in metrics["final"].items()},
            "curve": {
                n: [[h["step"], *(h[n][k] for k in FIGURES[:3])] for h in metrics["history"] if n in h]
                for n in metrics["final"]
            },
        }

    def _stop(self) -> None:
        print("study: asked to stop; the runs are saving. The same command goes on.", file=sys.stderr)
        for child in self.active:
            child.process.send_signal(signal.SIGTERM)
        for child in self.active:
            child.process.wait()
            child.log.close()
        self.active.clear()

    def folder(self, run: Run) -> Path:
        return self.out / "train" / run.name

    def log(self, run: Run) -> Path:
        return self.out / f"{run.name}.log"


def in_use(folder: Path) -> bool:
    """Whether a living process trains in this run folder."""
    if not folder.is_dir():
        return False
    try:
        lock_run(folder)
    except UserError:
        return True
    unlock_run(folder)
    return False


def commit() -> str:
    """Commit of the checkout, with a + where the package or its configs differ from it."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    return (git("rev-parse", "--short=9", "HEAD") or "unknown") + ("+" if git("status", "-s", "ssod", "cfg") else "")


def commits(log: Path) -> list[str]:
    """The commits that a run was started and resumed at."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    return list(dict.fromkeys(w.removeprefix("# commit ") for w in lines if w.startswith("# commit ")))


def seconds_of(table: Table) -> float:
    """Training time of a run over all its parts: the clock of results.csv starts anew when a run is resumed.

    Start-up and the last validation are not in it.
    """
    _, clock = table.series("seconds")
    ends = [a for a, b in pairwise(clock) if b < a]
    return sum(ends) + (clock[-1] if clock else 0.0)


def device_name(choice: str) -> str:
    """The machine's part that the runs use, in words."""
    device = pick_device(choice)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    model = next((w.split(":", 1)[1].strip() for w in lines if w.startswith("model name")), platform.machine())
    return f"CPU, {model}"


def main(words: Sequence[str]) -> int:
    try:
        if not words or not Path(words[0]).is_file():
            raise UserError("a study begins with its grid: study.py GRID.yaml out=DIR jobs=2 ...")
        given = parse_words(words[1:])
        own = {k: given.pop(k) for k in OWN if k in given}
        path = Path(words[0])
        name = str(own.get("name", path.stem))
        out = Path(str(own.get("out", f"runs/{name}")))
        grid = read_grid(path, given, _list(own.get("arms")), _numbers(own.get("seeds")))
        runs = runs_of(grid, out)
        study = Study(runs, out, int(own.get("jobs", 2)), given)
    except UserError as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    code = study.work()
    page = Path(str(own.get("pages", out))) / f"{name}.md"
    report(grid, runs, study.records(), page, words)
    return code


def report(grid: Grid, runs: Sequence[Run], records: list[dict[str, Any]], page: Path, words: Sequence[str]) -> None:
    """Print and write what there is, whole or not; only the runs of this grid as it stands count."""
    wanted = {(r.arm, r.seed, r.digest): r for r in runs}
    found = {key: r for r in records if (key := (r["arm"], r["seed"], r["config"])) in wanted}
    if not found:
        return
    ordered = [found[key] for key in wanted if key in found]
    print(summary_text(ordered, grid.control))
    page.parent.mkdir(parents=True, exist_ok=True)
    write_page(page, grid, ordered, len(runs), words)


def _list(value: Any) -> list[str] | None:
    return None if value is None else [str(v) for v in value] if isinstance(value, list) else str(value).split(",")


def _numbers(value: Any) -> list[int] | None:
    names = _list(value)
    if names is not None and not all(n.isdigit() for n in names):
        raise UserError(f"seeds={value} are not numbers; give seeds=0,1,2.")
    return None if names is None else [int(n) for n in names]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
