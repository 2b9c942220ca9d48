"""Soft Teacher: whose background counts, which boxes are steady, and what learns from which pseudo boxes."""

from __future__ import annotations

import math

import pytest
import torch
from small import SIZE, batch, candidates, on_unlabeled, strategy, unsupervised

from ssod.detectors.base import Detector
from ssod.errors import UserError
from ssod.strategies.reliability import WeakView
from ssod.strategies.soft_teacher import SoftTeacher, _spread, jittered, weigh_boxes
from ssod.structures import Instances


def soft(**options: object) -> SoftTeacher:
    built = strategy("soft_teacher", "faster_rcnn", **options)
    assert isinstance(built, SoftTeacher)
    return built


def sure_of(model: Detector, probabilities: list[float]) -> None:
    """Every region gets these class probabilities and stays where it is."""
    with torch.no_grad():
        for layer in (model.roi_logits, model.roi_codes):
            layer.weight.zero_()
            layer.bias.zero_()
        model.roi_logits.bias.copy_(torch.tensor(probabilities).log())


def weak_view(s: SoftTeacher) -> WeakView:
    b = batch()
    return WeakView.of(b, s.teacher_output(b.weak))


def test_backgrounds_weigh_what_the_teacher_thinks_of_them() -> None:
    s = soft()
    sure_of(s.teacher, [0.2, 0.1, 0.1, 0.6])
    weights = s.weigh_classes(weak_view(s))(candidates(2, 3, "roi"))
    # w = (1, 1, .6, .6, .6), sum 3.8: what the detector divides by 5 becomes sum(w CE) / 3.8
    assert weights.cls is not None
    assert (weights.cls / 5).tolist() == pytest.approx([1 / 3.8] * 2 + [0.6 / 3.8] * 3)
    assert weights.box is not None
    assert not weights.box.any()  # boxes are learned from other targets
    rpn = s.weigh_classes(weak_view(s))(candidates(2, 3, "rpn"))
    assert rpn.cls is None
    assert rpn.box is None


def test_backgrounds_without_any_foreground() -> None:
    s = soft()
    sure_of(s.teacher, [0.4, 0.3, 0.2, 0.1])
    weights = s.weigh_classes(weak_view(s))(candidates(0, 3, "roi"))
    # w = (.1, .1, .1): the sum 0.3 counts as 1, else three doubtful backgrounds would weigh as much as sure ones
    assert weights.cls is not None
    assert (weights.cls / 3).tolist() == pytest.approx([0.1] * 3)
    hard = soft(soft_background=False).weigh_classes(weak_view(s))(candidates(2, 3, "roi"))
    assert hard.cls is not None
    assert hard.cls.tolist() == [1.0] * 5  # the plain mean


def test_spread_by_hand() -> None:
    # one box, two copies: x1 = 0, 2; x2 = 20, 22; y equal, height 10. Mean width 20; std of (0, 2) is sqrt(2):
    # (sqrt(2) / 20 + 0 + sqrt(2) / 20 + 0) / 4 = 0.03536
    copies = torch.tensor([[[0.0, 0, 20, 10]], [[2.0, 0, 22, 10]]])
    assert _spread(copies).tolist() == pytest.approx([2 * math.sqrt(2) / 20 / 4])
    # sides below one pixel count as one
    assert _spread(copies / 1000).tolist() == pytest.approx([2 * math.sqrt(2) / 1000 / 4])


def test_jittered_copies() -> None:
    torch.manual_seed(0)
    boxes = torch.tensor([[100.0, 100, 200, 150], [0, 0, 0.1, 0.1]])
    copies = jittered(boxes, 4000, 0.06)
    assert copies.shape == (4000, 2, 4)
    # 6 % of 100 and of 50 pixels, and of at least one pixel
    assert copies.std(0)[0].tolist() == pytest.approx([6, 3, 6, 3], rel=0.05)
    assert copies.std(0)[1].tolist() == pytest.approx([0.06] * 4, rel=0.05)
    torch.testing.assert_close(copies.mean(0), boxes, atol=0.5, rtol=0)


def test_the_spread_of_a_head_that_moves_nothing_is_the_jitter() -> None:
    s = soft(jitters=50)
    sure_of(s.teacher, [0.1, 0.7, 0.1, 0.1])
    torch.manual_seed(0)
    boxes = torch.tensor([[20.0, 20, 40, 44]] * 30)
    found = [Instances(boxes, torch.ones(30, dtype=torch.int64), torch.full((30,), 0.7)), Instances.empty()]
    found[1].scores = torch.zeros(0)
    spreads = s.spreads(weak_view(s).output, found)
    assert [len(x) for x in spreads] == [30, 0]
    assert spreads[0].mean().item() == pytest.approx(0.06, rel=0.05)
    marked = s.mark_steady(weak_view(s).output, found)
    assert not marked[0].box_weight.any()  # 0.06 > 0.02
    assert soft(jitters=50, spread=0.2).mark_steady(weak_view(s).output, found)[0].box_weight.all()
    nothing = s.spreads(weak_view(s).output, [found[1], found[1]])
    assert [len(x) for x in nothing] == [0, 0]


def test_classes_and_boxes_learn_from_different_pseudo_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sure box that moves teaches its class, an unsure one that stays teaches its sides."""
    s = soft()
    boxes = torch.tensor([[4.0, 4, 30, 30], [30, 30, 60, 60], [10, 10, 50, 50]])
    found = Instances(boxes, torch.tensor([0, 1, 2]), torch.tensor([0.95, 0.6, 0.6]))
    monkeypatch.setattr(SoftTeacher, "decode", lambda self, seen, conf: [found, found[:0]])
    monkeypatch.setattr(
        SoftTeacher, "spreads", lambda self, seen, found, *_: [torch.tensor([0.5, 0.01, 0.5]), torch.zeros(0)]
    )
    asked: list[list[Instances]] = []
    loss = s.student.loss
    monkeypatch.setattr(s.student, "loss", lambda out, t, weigh=None: asked.append(t) or loss(out, t, weigh))
    out = on_unlabeled(s, batch())
    classes, sides = (t[0] for t in asked)
    assert classes.labels.tolist() == [0]
    assert sides.labels.tolist() == [1]
    # mirrored at width 64
    assert classes.boxes.tolist() == [[SIZE - 30, 4, SIZE - 4, 30]]
    assert out.losses["box"] > 0
    assert out.stats["pseudo/per_image"] == 0.5
    assert out.stats["pseudo/boxes_per_image"] == 0.5
    # the second set teaches the regions' boxes alone
    assert weigh_boxes(candidates(1, 1, "roi")).box is None
    assert not weigh_boxes(candidates(1, 1, "roi")).cls.any()
    rpn = weigh_boxes(candidates(1, 1, "rpn"))
    assert not rpn.cls.any()
    assert not rpn.box.any()


def test_without_jitter_the_score_chooses_boxes_too() -> None:
    s = soft(jitters=0, tau=0.65)
    found = Instances(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), torch.tensor([0.7, 0.6]))
    assert s.mark_steady(None, [found])[0].box_weight.tolist() == [1, 0]
    with pytest.raises(UserError, match=r"jitters=1 has no spread; give at least 2"):
        soft(jitters=1)


@pytest.mark.parametrize("tau", [0.2, 1.0])
def test_a_step_is_finite_and_the_teacher_gets_no_gradient(tau: float) -> None:
    s = soft(candidates=tau, tau=tau, spread=1.0)
    out = s(batch(), step=0)
    assert (out.stats["pseudo/per_image"] > 0) is (tau < 1)
    assert set(out.losses) == {f"{a}/{b}" for a in ("sup", "unsup") for b in ("cls", "box", "rpn_cls", "rpn_box")}
    assert torch.isfinite(unsupervised(out.losses))
    assert (out.losses["unsup/box"] > 0) == (tau < 1)
    torch.stack(list(out.losses.values())).sum().backward()
    assert all(p.grad is None for p in s.teacher.parameters())
    assert all(torch.isfinite(p.grad).all() for p in s.student.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["fcos", "retinanet", "deformable_detr"])
def test_detectors_without_regions_are_refused(name: str) -> None:
    with pytest.raises(
        UserError, match=r"needs a detector with HasRegions, which \w+ does not have; choose faster_rcnn"
    ):
        strategy("soft_teacher", name)
