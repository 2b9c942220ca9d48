"""Runs of Co-mining: from a sparse split to weights, without unlabelled images and with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ssod.cli import main
from ssod.config import load_config
from ssod.engine.setup import build_data
from ssod.engine.trainer import SemiTrainer
from ssod.errors import UserError
from ssod.report.table import Table

OWN = {"strategy": {"name": "comining", "tau": 0.01}, "labeled": "all", "augment": "comining"}


@pytest.fixture(scope="module")
def sparse(shapes_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sparse") / "out"
    assert main(["split", f"data={shapes_data}", f"out={out}", "sparse=hard"]) == 0
    return out / "hard" / "fold0" / "data.yaml"


def run(tiny: dict[str, object], **more: Any) -> tuple[SemiTrainer, dict[str, Any], Table]:
    trainer = SemiTrainer(load_config("train", {**tiny, **OWN, **more}))
    summary = trainer.train()
    return trainer, summary, Table(trainer.folder / "results.csv", summary["steps"])


def columns(table: Table, start: str) -> list[str]:
    return [c for c in table.columns if c.startswith(start)]


def test_a_run_without_unlabelled_images_mines(
    tiny: dict[str, object], sparse: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, summary, table = run(tiny, data=str(sparse), burn_in=0)
    assert (summary["labeled"], summary["unlabeled"], summary["steps"]) == (24, 0, 6)
    assert set(summary["final"]) == {"student"}
    assert max(table.series("mined/per_image")[1]) > 0
    assert columns(table, "unsup/") == []
    assert (trainer.folder / "weights" / "best.pt").is_file()
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if "WARNING" in line and "pseudo boxes an image" not in line] == []
    assert "mined/img" in said


def test_unlabelled_images_join_after_burn_in(tiny: dict[str, object], sparse: Path, shapes_data: Path) -> None:
    folder = str(shapes_data.parent / "images" / "val")
    _, summary, table = run(tiny, data=str(sparse), unlabeled=folder)
    assert summary["unlabeled"] == 8
    steps, values = table.series("mined/unlabeled/per_image")
    assert min(steps) > 3  # burn_in
    assert max(values) > 0
    assert {c.removeprefix("unsup/") for c in columns(table, "unsup/")} == {
        c.removeprefix("sup/") for c in columns(table, "sup/")
    }


def test_a_run_that_can_mine_nothing_says_so(tiny: dict[str, object]) -> None:
    notes = build_data(load_config("train", {**tiny, **OWN})).notes
    assert any(n.startswith("WARNING: strategy=comining finds no partly labelled") and "'partial'" in n for n in notes)
    some = build_data(load_config("train", {**tiny, **OWN, "labeled": "25%"}))
    assert len(some.unlabeled) == 18
    assert not any(n.startswith("WARNING") for n in some.notes)


def test_one_view_is_refused(tiny: dict[str, object], sparse: Path) -> None:
    with pytest.raises(UserError, match="set augment=comining"):
        run(tiny, data=str(sparse), augment={"labeled": "weak"})


def test_other_strategies_still_need_unlabelled_images(tiny: dict[str, object]) -> None:
    with pytest.raises(UserError, match="finds no unlabelled image"):
        build_data(load_config("train", {**tiny, "labeled": "all"}))
