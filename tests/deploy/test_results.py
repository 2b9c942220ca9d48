"""Results: what they hold, what they write, and who else can read them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssod.data.draw import class_color, draw_boxes, sheet
from ssod.deploy.results import Boxes, Results
from ssod.errors import UserError

NAMES = ["cat", "dog"]


@pytest.fixture
def result(tmp_path: Path) -> Results:
    path = tmp_path / "é.png"
    Image.fromarray(np.full((80, 120, 3), 7, np.uint8)).save(path)
    boxes = Boxes(np.array([[30, 20, 60, 80], [0, 0, 12, 8.0]]), np.array([0.5, 0.25]), np.array([1, 0]), (80, 120))
    return Results(boxes, path, NAMES, {"inference": 1.0})


def test_boxes_in_every_form(result: Results) -> None:
    b = result.boxes
    np.testing.assert_allclose(b.xyxy, [[30, 20, 60, 80], [0, 0, 12, 8]])
    np.testing.assert_allclose(b.xywh, [[45, 50, 30, 60], [6, 4, 12, 8]])
    np.testing.assert_allclose(b.xyxyn, [[0.25, 0.25, 0.5, 1.0], [0, 0, 0.1, 0.1]])
    np.testing.assert_allclose(b.xywhn, [[0.375, 0.625, 0.25, 0.75], [0.05, 0.05, 0.1, 0.1]])
    assert [a.dtype for a in (b.xyxy, b.xywhn, b.conf, b.cls)] == [np.float32, np.float32, np.float32, np.int64]
    for array in (b.xyxy, b.xywh, b.xyxyn, b.xywhn, b.conf, b.cls):
        plain = array.cpu().numpy()
        assert type(plain) is np.ndarray
        np.testing.assert_array_equal(plain, array)
    assert b.id is None
    nothing = Boxes(np.zeros((0, 4)), np.zeros(0), np.zeros(0), (80, 120))
    assert nothing.xywhn.shape == (0, 4)


def test_some_of_the_boxes(result: Results) -> None:
    assert [int(box.cls) for box in result.boxes] == [1, 0], "as scripts for tensors write it"
    assert [float(box.conf) for box in result.boxes] == [0.5, 0.25]
    assert len(result) == 2
    assert [r.boxes.cls.tolist() for r in (result[0], result[-1], result[:1])] == [[1], [0], [1]]
    confident = result[result.boxes.conf > 0.3]
    assert (confident.verbose(), confident.path, confident.orig_shape) == ("1 dog", result.path, (80, 120))
    assert result.verbose() == "1 dog, 1 cat"
    with pytest.raises(IndexError):
        result[2]


def test_tables(result: Results, tmp_path: Path) -> None:
    first, second = result.summary()
    box = {"x1": 30.0, "y1": 20.0, "x2": 60.0, "y2": 80.0}
    assert first == {"name": "dog", "class": 1, "confidence": 0.5, "box": box}
    assert json.loads(result.to_json()) == [first, second]
    text = "1 0.375000 0.625000 0.250000 0.750000 0.50000\n0 0.050000 0.050000 0.100000 0.100000 0.25000\n"
    assert result.to_yolo() == text
    assert result.save_txt(tmp_path / "new" / "x.txt").read_text() == text


def test_data_frame(result: Results) -> None:
    pytest.importorskip("pandas")
    table = result.to_df()
    assert table.columns.tolist() == ["name", "class", "confidence", "x1", "y1", "x2", "y2"]
    assert table.iloc[0].tolist() == ["dog", 1, 0.5, 30, 20, 60, 80]
    assert result[:0].to_df().shape == (0, 7)


def test_without_pandas(result: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)  # as Python itself marks what cannot be imported
    with pytest.raises(UserError, match="pip install pandas"):
        result.to_df()


def test_the_image_is_read_again_unless_it_was_in_memory(result: Results) -> None:
    assert (result.orig_img == 7).all()
    Image.fromarray(np.full((80, 120, 3), 9, np.uint8)).save(result.path)
    assert (result.orig_img == 9).all()
    pixels = np.full((80, 120, 3), 5, np.uint8)
    kept = Results(result.boxes, Path("image0.jpg"), NAMES, {}, pixels)
    assert kept[:1].orig_img is pixels
    kept.plot()
    assert (pixels == 5).all(), "drawing leaves the image as it was"


def test_drawing(result: Results, tmp_path: Path) -> None:
    pixels = result.plot()
    assert pixels.shape == (80, 120, 3)
    assert tuple(pixels[60, 30]) == class_color(1)
    assert Image.open(result.save(tmp_path / "new" / "x.png")).size == (120, 80)
    blank = np.zeros((40, 40, 3), np.uint8)
    dashed = draw_boxes(blank, np.array([[4, 4, 36, 36]]), [0], [""], dashed=True)
    drawn = (dashed[4, 4:36] != 0).any(1)
    assert 0 < drawn.sum() < 32
    assert not blank.any(), "the image itself stays as it was"
    page = sheet([blank, blank[:20], blank], ["a", "b", "c"], columns=2)
    assert page.shape[1] == 2 * 48 + 8


READ_BY_SUPERVISION = """
import sys
import numpy as np
import supervision
from ssod.deploy.results import Boxes, Results
assert "av" not in sys.modules
boxes = Boxes(np.array([[30, 20, 60, 80], [0, 0, 12, 8.0]]), np.array([0.5, 0.25]), np.array([1, 0]), (80, 120))
result = Results(boxes, None, ["cat", "dog"], {})
found = supervision.Detections.from_ultralytics(result)
np.testing.assert_allclose(found.xyxy, [[30, 20, 60, 80], [0, 0, 12, 8]])
np.testing.assert_allclose(found.confidence, [0.5, 0.25])
assert (found.class_id.tolist(), found.data["class_name"].tolist()) == ([1, 0], ["dog", "cat"])
assert found.tracker_id is None
assert len(supervision.Detections.from_ultralytics(result[:0])) == 0
print("read", len(found))
"""


@pytest.mark.slow
def test_supervision_reads_them(tmp_path: Path) -> None:
    """The real library, fetched into a folder of its own without its dependency `av`, whose wheels hold GPL codecs."""
    fetch = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(tmp_path)]
    for words in (["--no-deps", "supervision>=0.29", "pydeprecate", "defusedxml", "scipy"], ["requests"]):
        subprocess.run([*fetch, *words], check=True)
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", READ_BY_SUPERVISION], env=env, capture_output=True, text=True)
    assert done.stdout == "read 2\n", done.stderr
