"""What a run says about partly labelled images, and to whom it says it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ssod.cli import main
from ssod.config import load_config
from ssod.data.annotations.sources import load_data
from ssod.engine.setup import build_data
from ssod.strategies import strategy_class


@pytest.fixture(scope="module")
def sparse(shapes_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sparse") / "out"
    assert main(["split", f"data={shapes_data}", f"out={out}", "sparse=hard"]) == 0
    return out / "hard" / "fold0" / "data.yaml"


@pytest.fixture
def mixed(sparse: Path, shapes_data: Path, tmp_path: Path) -> Path:
    """train: the 8 drawn images of val; partial: the 24 of train with half of their boxes."""
    file, root = tmp_path / "mixed.yaml", shapes_data.parent
    partial = f"partial: {sparse.parent}/labeled.json"
    file.write_text(f"path: {root}\ntrain: images/val\n{partial}\nval: images/val\n")
    return file


def notes(data: Path, **more: Any) -> list[str]:
    return build_data(load_config("train", {"data": str(data), "strategy": {"name": "supervised"}, **more})).notes


def test_a_run_counts_its_partly_labelled_images_and_warns(sparse: Path, mixed: Path) -> None:
    boxes = len(load_data(sparse, "train").samples.objects()[0])
    said = notes(sparse)
    assert f"24 labelled images, 24 of them partly, with {boxes} boxes, 0 unlabelled, 8 for validation" in said
    (warning,) = (line for line in said if line.startswith("WARNING"))
    assert "strategy=supervised learns as background what is not annotated in the 24 partly labelled images" in warning
    assert "strategy=comining" in warning
    assert any(line.startswith("32 labelled images, 24 of them partly,") for line in notes(mixed))


def test_those_that_became_unlabelled_do_not_count(mixed: Path) -> None:
    """Of 32 images 8 stay labelled; the other 24 lose their boxes, and what is missing there misleads nobody."""
    config = load_config("train", {"data": str(mixed), "labeled": "25%", "strategy": {"name": "mean_teacher"}})
    data = build_data(config)
    partly = sum(not s.complete for s in data.labeled)
    assert 0 < partly < 8
    assert any(line.startswith(f"8 labelled images, {partly} of them partly,") for line in data.notes)
    assert any("24 unlabelled" in line for line in data.notes)


def test_no_word_where_all_are_complete_or_the_strategy_mines(
    shapes_data: Path, sparse: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not any("partly" in line or line.startswith("WARNING") for line in notes(shapes_data))
    monkeypatch.setattr(strategy_class("supervised"), "mines", True)
    said = notes(sparse)
    assert any("24 of them partly" in line for line in said)
    assert not any(line.startswith("WARNING") for line in said)
