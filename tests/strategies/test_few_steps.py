"""Every strategy with a teacher, on every detector it is for: a few steps of training."""

from __future__ import annotations

import pytest
import torch
from small import batch, strategy

GAUSSIAN = {"codec": "gaussian"}
RUNS = [
    *[("unbiased_teacher", name, {}, {}) for name in ("fcos", "retinanet", "faster_rcnn", "deformable_detr")],
    ("unbiased_teacher", "faster_rcnn", {"roi_focal_gamma": 1.5}, {}),
    ("soft_teacher", "faster_rcnn", {}, {"candidates": 0.2, "spread": 1.0}),
    ("soft_teacher", "faster_rcnn", {"class_agnostic": True, "codec": "gaussian"}, {"candidates": 0.2, "jitters": 2}),
    *[("prc", name, GAUSSIAN, {}) for name in ("fcos", "retinanet", "faster_rcnn")],
    ("prc", "faster_rcnn", GAUSSIAN, {"prc": False}),
    ("prc", "faster_rcnn", GAUSSIAN, {"ler": False}),
    ("prc", "deformable_detr", {}, {"ler": False}),
]
TAU = {"fcos": 0.02, "retinanet": 0.005, "faster_rcnn": 0.2, "deformable_detr": 0.005}  # what untrained ones reach


@pytest.mark.parametrize(("kind", "name", "detector", "options"), RUNS)
def test_a_few_steps_move_student_and_teacher(kind, name, detector, options) -> None:  # type: ignore[no-untyped-def]
    s = strategy(kind, name, detector, tau=TAU[name], **options)
    optimizer = torch.optim.SGD([p for p in s.parameters() if p.requires_grad], lr=0.002, momentum=0.9)
    start = {k: v.clone() for k, v in s.state_dict().items()}
    supervised, found = [], 0.0
    for step in range(4):
        torch.manual_seed(step)
        out = s(batch(), step)
        total = torch.stack(list(out.losses.values())).sum()
        assert torch.isfinite(total)
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(s.parameters(), 10)
        optimizer.step()
        s.after_step(step)
        supervised.append(sum(v.item() for k, v in out.losses.items() if k.startswith("sup/")))
        found += float(out.stats["pseudo/per_image"])
        assert float(out.stats["pseudo/labeled_per_image"]) == 1.0
    assert found > 0
    assert supervised[-1] < supervised[0]
    moved = {k for k, v in s.state_dict().items() if v.is_floating_point() and not torch.equal(v, start[k])}
    assert any(k.startswith("student.") for k in moved)
    assert any(k.startswith("teacher.") for k in moved)
    assert all(torch.isfinite(v).all() for v in s.state_dict().values())
