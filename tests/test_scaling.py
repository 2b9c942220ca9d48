"""docs/scaling.md is what its script writes, by figures that are those of the models and of the other pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from scaling_page import BATCH, DETECTORS, ONNX, PAIRS, SEMI, all_reduce, page, share

DOCS = Path(__file__).resolve().parent.parent / "docs"


def test_the_page_is_what_the_script_writes() -> None:
    assert (DOCS / "scaling.md").read_text() == page({}), "python tests/scaling_page.py > docs/scaling.md"


def test_measured_steps_take_the_place_of_assumed_ones() -> None:
    line = next(row for row in page({"fcos": 0.5}).splitlines() if row.startswith("| fcos"))
    assert "500 measured" in line
    assert "measured" not in next(row for row in page({}).splitlines() if row.startswith("| fcos"))


def test_measured_figures_are_those_of_the_other_pages() -> None:
    text = (DOCS / "performance.md").read_text()
    names = {
        "FCOS": "fcos",
        "RetinaNet": "retinanet",
        "Faster R-CNN": "faster_rcnn",
        "Deformable DETR": "deformable_detr",
    }
    for said, name in names.items():
        cells = next(row for row in text.splitlines() if row.startswith(f"| {said} |")).split("|")
        assert int(cells[6].split(",")[0]) == round(1000 * DETECTORS[name].cpu), "ours bf16"
    assert re.search(rf"\| mean_teacher \| \d+ \| {SEMI:.2f} \|", text)
    assert re.search(rf"`fast`.*\| {PAIRS} \|", text)
    assert re.search(rf"\| FCOS \| \d+ \| \d+ \| {round(1000 * ONNX)} \|", text)
    assert "a million paths takes 16 s and 51 MB" in (DOCS / "label.md").read_text().replace("\n", " ")


def test_messages_and_shares() -> None:
    size = 210e9  # one second of NVLink at 70 %
    assert all_reduce(size, 8, 1e9) == pytest.approx(2 * 7 / 8)
    assert all_reduce(size, 64, 300e9) == pytest.approx(2 * 7 / 8 + 2 * 7 / 8)
    assert share(3, 1) == pytest.approx((0.75, 1))
    assert share(3, 3) == pytest.approx((0.5, 0.75))
    assert BATCH == 4, "as in the page's formula"


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTORS)
def test_weights_and_operations_are_those_of_the_models(name: str) -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from ssod.detectors import build_detector
    from ssod.ops.forms import plain_forms

    detector = build_detector(name, 80, "resnet50", {}, frozen_norm=True).eval()
    assert sum(p.numel() for p in detector.parameters() if p.requires_grad) == DETECTORS[name].weights
    with torch.no_grad(), FlopCounterMode(display=False) as counter, plain_forms():
        detector.head(detector.features(torch.zeros(1, 3, 640, 640)))
    assert counter.get_total_flops() == pytest.approx(DETECTORS[name].flops, rel=0.01)
