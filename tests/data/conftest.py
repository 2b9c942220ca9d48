"""The real data sets, where they are at hand, and small ones that the tests may spoil."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from small_sets import CocoFolder, VocFolder, YoloFolder

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def real_data() -> Callable[[str], tuple[Path, Path]]:
    """name -> (data YAML, folder) of a real set, or a skip that says where it was looked for."""

    def find(name: str) -> tuple[Path, Path]:
        home = Path(os.environ.get("SSOD_DATA") or REPOSITORY.parent / "shared" / "data")
        if not (home / name).is_dir():
            pytest.skip(f"no data set '{name}' in {home}; set SSOD_DATA to the folder that holds it")
        return REPOSITORY / "cfg" / "data" / f"{name}.yaml", home / name

    return find


@pytest.fixture
def coco_folder(tmp_path: Path) -> CocoFolder:
    return CocoFolder(tmp_path / "coco")


@pytest.fixture
def yolo_folder(tmp_path: Path) -> YoloFolder:
    return YoloFolder(tmp_path / "yolo")


@pytest.fixture
def voc_folder(tmp_path: Path) -> VocFolder:
    return VocFolder(tmp_path / "voc")
