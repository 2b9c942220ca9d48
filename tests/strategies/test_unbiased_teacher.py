"""Unbiased Teacher: hard pseudo boxes, classes only, on every detector."""

from __future__ import annotations

import pytest
import torch
from small import SIZE, batch, on_unlabeled, strategy, unsupervised

from ssod.strategies.unbiased_teacher import UnbiasedTeacher
from ssod.structures import Instances

TAU = {"fcos": 0.02, "retinanet": 0.005, "faster_rcnn": 0.2, "deformable_detr": 0.005}  # what untrained ones reach
BOX_LOSSES = {"box", "rpn_box", "centerness", "l1", "giou"}


@pytest.mark.parametrize("name", TAU)
def test_pseudo_boxes_teach_classes_only(name: str) -> None:
    s = strategy("unbiased_teacher", name, tau=TAU[name])
    out = s(batch(), step=0)
    assert out.stats["pseudo/per_image"] > 0
    boxes = [k for k in out.losses if k.startswith("unsup/") and k.split("/")[1] in BOX_LOSSES]
    assert boxes
    assert all(out.losses[k] == 0 for k in boxes)
    assert out.losses["unsup/cls"] > 0
    unsupervised(out.losses).backward()
    assert all(p.grad is None for p in s.teacher.parameters())
    learned = strategy("unbiased_teacher", name, tau=TAU[name], box_loss=True)(batch(), step=0)
    assert all(learned.losses[k] > 0 for k in boxes)


@pytest.mark.parametrize("name", TAU)
def test_no_pseudo_box_gives_a_finite_loss(name: str) -> None:
    s = strategy("unbiased_teacher", name, tau=1.0)
    out = s(batch(), step=0)
    assert out.stats["pseudo/per_image"] == 0
    assert torch.isfinite(unsupervised(out.losses))


def test_one_hard_threshold_and_the_papers_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    s = strategy("unbiased_teacher", "faster_rcnn")
    asked: list[float] = []
    found = Instances(torch.tensor([[2.0, 10, 20, 30]]), torch.tensor([1]), scores=torch.tensor([0.71]))
    monkeypatch.setattr(UnbiasedTeacher, "decode", lambda self, seen, conf: asked.append(conf) or [found, found[:0]])
    seen: list[list[Instances]] = []
    loss = s.student.loss
    monkeypatch.setattr(s.student, "loss", lambda out, targets: seen.append(targets) or loss(out, targets))
    out = on_unlabeled(s, batch())
    assert asked == [0.7]
    assert out.stats["pseudo/weight"] == 4
    assert seen[0][0].boxes.tolist() == [[SIZE - 20, 10, SIZE - 2, 30]]
    assert seen[0][0].cls_weight is None


def test_the_focal_loss_belongs_to_the_detector() -> None:
    losses = []
    for gamma in (0.0, 1.5):
        s = strategy("unbiased_teacher", "faster_rcnn", {"roi_focal_gamma": gamma}, tau=0.2)
        torch.manual_seed(0)
        losses.append(s(batch(), step=0).losses)
    for kind in ("sup", "unsup"):
        assert losses[1][f"{kind}/cls"] < losses[0][f"{kind}/cls"]
        assert losses[1][f"{kind}/rpn_cls"] == losses[0][f"{kind}/rpn_cls"]
