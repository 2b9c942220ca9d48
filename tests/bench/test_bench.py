"""The benchmarks run, small, and leave their rows; what a row says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bench import SCRIPTS
from common import Row

HERE = Path(__file__).parent


def test_a_row_knows_its_goal() -> None:
    assert Row("a", 1.0, 2.0, 0.55).reached
    assert not Row("a", 1.2, 2.0, 0.55).reached
    assert Row("a", 12.0, 2.0, 6.0, more=True).reached
    assert Row("a", 1.0, 2.0).reached is None
    assert Row("a", 1.0, None, 0.1).reached is None
    assert Row("a", 1.0, 2.0, 0.55).text() == "| a | 1 | 2 | ms | 0.5 | <= 0.55 | yes |"
    assert Row("a", 1.0, None, 6.0, more=True).text() == "| a | 1 | - | ms | - | >= 6 | - |"


def test_every_script_of_the_folder_is_run_or_asks_for_something() -> None:
    asking = {"bench_predict.py", "bench_ultralytics.py"}  # a model; a package that is no dependency
    assert {p.name for p in HERE.glob("bench_*.py")} == {s[0] for s in SCRIPTS.values()} | asking


@pytest.mark.slow
def test_predict_against_the_bare_model() -> None:
    student = HERE.parent.parent / "ssod" / "zoo" / "weights" / "shapes_fcos.safetensors"
    words = [sys.executable, str(HERE / "bench_predict.py"), str(student), "--rounds", "1", "--batches", "1"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| shapes_fcos.safetensors |" in done.stdout


@pytest.mark.slow
def test_all_scripts_run(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    words = [sys.executable, str(HERE / "bench.py"), "--quick", "--out", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (file,) = tmp_path.glob("*.json")
    kept = json.loads(file.read_text(encoding="utf-8"))
    assert kept["failed"] == {}
    assert {r["script"] for r in kept["rows"]} == set(SCRIPTS)
    assert all(r["ours"] > 0 for r in kept["rows"])
