"""LER/PRC: equations 10 to 14 by hand, who learns from what, and what the idea means on each detector."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import OPTIONS, SIZE, K, batch, candidates, detector, on_labeled, strategy, unsupervised

from ssod.detectors import build_detector
from ssod.detectors.base import HasDense
from ssod.errors import UserError
from ssod.ops.codecs import GaussianCodec
from ssod.ops.places import same_place
from ssod.ops.views import map_boxes
from ssod.strategies import build_strategy
from ssod.strategies.base import Plan
from ssod.strategies.prc import mean_over_foreground, own_means
from ssod.strategies.reliability import (
    WeakView,
    dense_reliability,
    query_reliability,
    region_reliability,
)
from ssod.structures import Candidates, Instances, Pyramid, SlotOutput, Weights

GAUSSIAN: dict[str, object] = {"codec": "gaussian"}
CONV = ("fcos", "retinanet", "faster_rcnn")
TAU = {"fcos": 0.02, "retinanet": 0.005, "faster_rcnn": 0.2, "deformable_detr": 0.005}  # what untrained ones reach
FLIP = torch.tensor([[-1.0, 0, SIZE], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)


# ---- equations


def test_equation_10_is_a_mean_over_foreground() -> None:
    # 5 regions, 2 of them foreground; KL losses (0.7, 0.3) become (0.7 + 0.3) / 2, not / 5
    found = mean_over_foreground(candidates(2, 3, "roi"))
    assert found.box is not None
    kl = torch.tensor([0.7, 0.3, 0, 0, 0])
    assert (found.box * kl).sum().item() / 5 == pytest.approx(0.5)
    assert found.cls is None
    assert found.learn_quality  # labelled boxes teach the variances
    assert mean_over_foreground(candidates(2, 3, "rpn")).box is None  # the paper speaks of the region head
    none = mean_over_foreground(candidates(0, 3, "roi"))
    assert none.box is not None
    assert torch.isfinite(none.box).all()
    # a dense head divides by its foreground already
    assert mean_over_foreground(candidates(2, 30, "dense", divisor=2.0)).box.unique().tolist() == [1.0]


def test_equation_10_in_the_labelled_loss() -> None:
    found = {}
    for ler in (True, False):
        s = strategy("prc", "faster_rcnn", GAUSSIAN, ler=ler)
        torch.manual_seed(3)  # the sampler's draws
        found[ler] = on_labeled(s, batch())
    seen: list[Candidates] = []
    labeled = batch().labeled
    torch.manual_seed(3)
    s.student.loss(s.student_output(labeled), labeled.targets, lambda c: seen.append(c) or Weights())
    roi = next(c for c in seen if c.stage == "roi")
    count, foreground = len(roi.labels), int((roi.matched >= 0).sum())
    assert found[True]["box"].item() == pytest.approx(found[False]["box"].item() * count / foreground, rel=1e-5)
    for key in ("cls", "rpn_cls", "rpn_box"):
        assert found[True][key].item() == found[False][key].item()


def test_equation_11() -> None:
    # An anchor of 10 x 10 has units of 1 px. Pseudo box 0 is 2 px off on one side: smooth L1 = 2 - 1/2, s_loc 0.4;
    # pseudo box 1 is 0.5 px off on two sides: 2 * 0.125 = 0.25, s_loc 0.2. Mean: (0.4 * 1.5 + 0.2 * 0.25) / 2 = 0.325
    s = strategy("prc", "faster_rcnn", GAUSSIAN)
    anchors = torch.tensor([[0.0, 0, 10, 10]] * 2)
    boxes = torch.tensor([[2.0, 0, 10, 10], [0, 0.5, 10, 9.5]])
    codes = torch.zeros(2, 8)
    codes[:, 4:] = 1.7  # whatever the student's own variances are
    pseudo = Instances(boxes, torch.tensor([0, 1]), torch.tensor([0.9, 0.9]), quality=torch.tensor([0.4, 0.2]))
    target = s.as_targets(pseudo)
    assert target.box_weight is not None
    weights = s.weigher(lambda c: torch.ones(len(c.labels)), {})(candidates(2, 3, "roi"))
    assert weights.box is not None
    assert not weights.learn_quality
    loss = GaussianCodec().loss(codes, anchors, boxes, target.box_weight * weights.box[:2], weights.learn_quality)
    assert loss.item() / 5 == pytest.approx(0.325)
    assert strategy("prc", "faster_rcnn", GAUSSIAN, ler=False).as_targets(pseudo).box_weight is None


def constant_teacher(probabilities: list[float], log_variance: float) -> torch.nn.Module:
    """A Faster R-CNN that says the same of every region: these class probabilities, this variance."""
    model = detector("faster_rcnn", **GAUSSIAN).eval()
    with torch.no_grad():
        model.roi_logits.weight.zero_()
        model.roi_logits.bias.copy_(torch.tensor(probabilities).log())
        model.roi_codes.weight.zero_()
        model.roi_codes.bias.view(K, 8)[:, 4:] = log_variance
    return model


def seen_by(model: torch.nn.Module, matrix: torch.Tensor | None = None) -> WeakView:
    b = batch()
    assert b.weak is not None
    with torch.no_grad():
        output = model.head(model.features(b.weak.images, b.weak.sizes))
    if matrix is None:
        matrix = torch.eye(3, dtype=torch.float64)
    return WeakView(output, matrix.repeat(2, 1, 1), b.weak.sizes)


def test_equations_12_and_13() -> None:
    # max_c p = 0.5; sigma^2 = 2 on each side: s_loc = 1 - sigmoid(2) = 1 / (1 + e^2) = 0.119203; background 0.3
    teacher = constant_teacher([0.1, 0.5, 0.1, 0.3], math.log(2.0))
    found = region_reliability(teacher, seen_by(teacher), candidates(2, 3, "roi"))
    assert found.tolist() == pytest.approx([0.5 * 0.119203] * 2 + [0.3] * 3, rel=1e-5)
    assert region_reliability(teacher, seen_by(teacher), candidates(0, 2, "roi")).tolist() == pytest.approx([0.3] * 2)
    only = region_reliability(teacher, seen_by(teacher), candidates(2, 0, "roi"))
    assert only.tolist() == pytest.approx([0.5 * 0.119203] * 2, rel=1e-5)
    assert not found.requires_grad


def test_the_inverse_transform_leads_to_the_teachers_view() -> None:
    teacher = detector("faster_rcnn", **GAUSSIAN).eval()
    torch.nn.init.normal_(teacher.roi_logits.weight, std=0.3)  # an answer that depends on the place
    view, c = seen_by(teacher, FLIP), candidates(1, 3, "roi")
    c = replace(c, image=torch.tensor([1, 0, 1, 0]))
    mirrored = map_boxes(c.boxes, FLIP).clamp(0, SIZE)
    with torch.no_grad():
        there = [mirrored[c.image == 0], mirrored[c.image == 1]]
        background = [p[:, -1] for p in teacher.classify(view.output, there)]
        own = teacher.refine(view.output, [mirrored[:0], mirrored[:1]])[1]
        here = teacher.classify(view.output, [c.boxes[c.image == 0], c.boxes[c.image == 1]])
    found = region_reliability(teacher, view, c)
    torch.testing.assert_close(found[[1, 3]], background[0])
    torch.testing.assert_close(found[2], background[1][1])
    torch.testing.assert_close(found[0], (own.scores * own.quality)[0])
    assert not torch.allclose(found[[1, 3]], here[0][:, -1])


def test_equation_14() -> None:
    # foreground: reliability (0.4, 0.2), CE (1, 2): mean 0.4; background: (0.9, 0.6, 0.3), CE (0.1, 0.2, 1): mean 0.17
    s = strategy("prc", "faster_rcnn", GAUSSIAN)
    reliability = torch.tensor([0.4, 0.2, 0.9, 0.6, 0.3])
    surprise = torch.tensor([1.0, 2, 0.1, 0.2, 1])
    stats: dict[str, object] = {}
    weights = s.weigher(lambda c: reliability, stats)(candidates(2, 3, "roi"))
    assert weights.cls is not None
    assert (weights.cls * surprise).sum().item() / 5 == pytest.approx(0.4 + 0.17)  # the detector divides by 5
    assert {k: round(float(v), 4) for k, v in stats.items()} == {
        "reliability/foreground": 0.3,
        "reliability/background": 0.6,
    }
    # each group by its own count, not by the sum of its weights
    assert (weights.cls / reliability).tolist() == pytest.approx([2.5, 2.5, 5 / 3, 5 / 3, 5 / 3])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 30), st.integers(0, 300), st.floats(1, 1000))
def test_each_group_of_equation_14_has_its_own_mean(foreground: int, background: int, divisor: float) -> None:
    shares = own_means(candidates(foreground, background, "roi", divisor)) / divisor
    assert shares[:foreground].sum().item() == pytest.approx(min(foreground, 1), rel=1e-4)
    assert shares[foreground:].sum().item() == pytest.approx(min(background, 1), rel=1e-4)


@pytest.mark.parametrize(("foreground", "background"), [(0, 4), (4, 0)])
def test_equation_14_with_one_group_only(foreground: int, background: int) -> None:
    c = candidates(foreground, background, "roi")
    assert own_means(c).tolist() == [1.0] * 4  # a mean over all four
    s = strategy("prc", "faster_rcnn", GAUSSIAN)
    weights = s.weigher(lambda c: torch.full((4,), 0.5), stats := {})(c)  # type: ignore[var-annotated]
    assert weights.cls.tolist() == [0.5] * 4
    assert all(math.isfinite(float(v)) for v in stats.values())


def test_switches() -> None:
    both = strategy("prc", "faster_rcnn", GAUSSIAN, ler=False, prc=False)
    c = candidates(2, 3, "roi")
    found = both.weigher(lambda c: torch.zeros(5), {})(c)
    assert found.cls is None
    assert found.box is None
    assert not found.learn_quality  # the variances learn from labelled images alone, whatever is switched off
    rpn = strategy("prc", "faster_rcnn", GAUSSIAN).weigher(lambda c: torch.zeros(5), {})(replace(c, stage="rpn"))
    assert rpn.cls is None
    assert rpn.box is None


# ---- who learns from what


@pytest.mark.parametrize("name", CONV)
def test_unlabelled_images_teach_boxes_but_no_variances(name: str) -> None:
    s = strategy("prc", name, GAUSSIAN, tau=TAU[name])
    out = s(batch(), step=0)
    assert out.stats["pseudo/per_image"] > 0
    unsupervised(out.losses).backward()
    layer = s.student.roi_codes if name == "faster_rcnn" else s.student.box_codes
    rows = layer.bias.grad.view(-1, 8)
    assert rows[:, :4].abs().max() > 0
    assert not rows[:, 4:].any()
    assert not layer.weight.grad.view(-1, 8, layer.weight[0].numel())[:, 4:].any()
    assert all(p.grad is None for p in s.teacher.parameters())
    s.zero_grad()
    torch.stack(list(on_labeled(s, batch()).values())).sum().backward()
    assert layer.bias.grad.view(-1, 8)[:, 4:].any()


@pytest.mark.parametrize("name", [*CONV, "deformable_detr"])
def test_no_pseudo_box_gives_a_finite_loss_and_gradient(name: str) -> None:
    options = {"ler": False} if name == "deformable_detr" else {}
    s = strategy("prc", name, {} if options else GAUSSIAN, tau=1.0, **options)
    out = s(batch(), step=0)
    assert out.stats["pseudo/per_image"] == 0
    assert out.stats["reliability/foreground"] == 0
    assert torch.isfinite(unsupervised(out.losses))
    unsupervised(out.losses).backward()
    assert all(torch.isfinite(p.grad).all() for p in s.student.parameters() if p.grad is not None)


def test_a_surer_teacher_makes_box_and_class_loss_heavier() -> None:
    losses = []
    for log_variance in (2.0, -4.0):
        s = strategy("prc", "faster_rcnn", GAUSSIAN, tau=0.2)
        s.teacher.load_state_dict(constant_teacher([0.1, 0.5, 0.1, 0.3], log_variance).state_dict())
        torch.manual_seed(0)
        losses.append(s(batch(), step=0).losses)
    # s_loc = 1 / (1 + exp(sigma^2)): sigma^2 = e^2 = 7.389 and e^-4 = 0.0183
    ratio = (1 + math.exp(math.exp(2.0))) / (1 + math.exp(math.exp(-4.0)))
    assert (losses[1]["unsup/box"] / losses[0]["unsup/box"]).item() == pytest.approx(ratio, rel=1e-3)
    assert losses[1]["unsup/cls"] > losses[0]["unsup/cls"]
    assert losses[1]["sup/box"] == losses[0]["sup/box"]


# ---- dense heads


@pytest.mark.parametrize(("name", "per_cell"), [("fcos", 1), ("retinanet", 9)])
def test_the_same_place_in_a_mirrored_view(name: str, per_cell: int) -> None:
    output = seen_by(detector(name, **GAUSSIAN).eval()).output
    everywhere = torch.arange(output.anchors.shape[0])
    assert torch.equal(same_place(output, output, torch.eye(3).repeat(2, 1, 1))[1], everywhere)
    mirrored = same_place(output, output, FLIP.repeat(2, 1, 1))[0]
    # stride 8: 8 cells across, the first centred at x = 0: row 1, column 2 lies at x = 16 and moves to 48: column 6;
    # the anchors of a cell keep their number
    last = per_cell - 1
    assert mirrored[(1 * 8 + 2) * per_cell + last] == (1 * 8 + 6) * per_cell + last
    for stride, span in output.spans.items():
        moved, found = map_boxes(output.anchors[span], FLIP), output.anchors[mirrored[span]]
        inside = (moved[:, 0] + moved[:, 2]) / 2 < SIZE  # x = 0 moves to 64, where the last centre is at 56
        torch.testing.assert_close(found[inside], moved[inside], atol=1e-3, rtol=0)
        assert ((found - moved).abs().amax(1)[~inside] <= max(stride, SIZE) + 1e-3).all()


def test_the_same_place_in_a_view_of_twice_the_size_is_one_level_up() -> None:
    model = detector("fcos", **GAUSSIAN).eval()
    small = seen_by(model).output
    large = model.head(model.features(torch.zeros(2, 3, 2 * SIZE, 2 * SIZE)))
    place = same_place(small, large, torch.diag(torch.tensor([2.0, 2, 1])).repeat(2, 1, 1))[0]
    for stride, span in small.spans.items():
        above = large.spans.get(2 * stride, large.spans[128])
        assert ((place[span] >= above.start) & (place[span] < above.stop)).all()
    # stride 8, row 3, column 5 of 8 x 8 lies at (44, 28) -> (88, 56): stride 16, row 3, column 5 of 8 x 8
    assert place[3 * 8 + 5] == large.spans[16].start + 3 * 8 + 5


@pytest.mark.parametrize("name", ["fcos", "retinanet"])
def test_reliability_on_a_dense_head_is_the_teachers_map(name: str) -> None:
    model = detector(name, **GAUSSIAN).eval()
    assert isinstance(model, HasDense)
    view = seen_by(model)
    output, count = view.output, 2 * len(view.output.anchors)
    matched = torch.full((count,), -1)
    matched[7] = matched[-3] = 0
    c = Candidates(
        output.anchors.repeat(2, 1), torch.arange(2).repeat_interleave(count // 2), matched, matched, "dense"
    )
    found = dense_reliability(model, view, c, output)
    probability = output.logits.sigmoid().amax(-1).flatten()
    variance = output.codes.flatten(0, 1)[:, 4:].exp().mean(1)
    assert found[0].item() == pytest.approx(1 - probability[0].item())
    for i in (7, -3):
        assert found[i].item() == pytest.approx((probability[i] * (1 - variance[i].sigmoid())).item(), rel=1e-4)


# ---- queries


def test_reliability_of_queries_by_hand() -> None:
    model = detector("deformable_detr")
    # In 100 x 100 pixels two queries of the teacher: [0, 0, 20, 20] with p = 0.8, which is the pseudo box, and
    # [50, 50, 90, 90] with p = 0.6, which no threshold let through.
    pyramid = Pyramid({}, (100, 100), torch.full((1, 2), 100))
    probability = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.6, 0.1]])
    boxes = torch.tensor([[0.1, 0.1, 0.2, 0.2], [0.7, 0.7, 0.4, 0.4]])
    seen = SlotOutput(probability.logit()[None, None], boxes[None, None], torch.zeros(1, 2, 8), pyramid)
    view = WeakView(seen, torch.eye(3, dtype=torch.float64)[None], pyramid.sizes)
    c = Candidates(
        torch.tensor([[0.0, 0, 20, 10], [0, 0, 20, 20], [50, 50, 90, 90], [50, 50, 90, 70], [30, 30, 40, 40]]),
        torch.zeros(5, dtype=torch.int64),
        torch.tensor([0, K, K, K, K]),
        torch.tensor([0, -1, -1, -1, -1]),
        "query",
    )
    pseudo = [Instances(torch.tensor([[0.0, 0, 20, 20]]), torch.tensor([0]))]
    # foreground: IoU 0.5 * 0.8; a duplicate of the pseudo box is background without doubt; on the other object
    # 1 - 0.6; on half of it 1 - 0.6 * 0.5; nothing there: 1
    found = query_reliability(model, view, c, pseudo)
    assert found.tolist() == pytest.approx([0.4, 1.0, 0.4, 0.7, 1.0], rel=1e-5)
    assert query_reliability(model, view, c, [Instances.empty()])[1].item() == pytest.approx(0.2)


# ---- refusals


@pytest.mark.parametrize(
    ("name", "detector_options", "options", "message"),
    [
        ("faster_rcnn", {}, {}, r"detector.codec=l1 gives none; set detector.codec=gaussian\."),
        ("fcos", {"codec": "bucket"}, {"ler": False}, "detector.codec=bucket gives none; set detector.codec=gaussian"),
        ("deformable_detr", {}, {}, r"DeformableDETR does not have; set strategy.ler=false, or choose fcos"),
    ],
)
def test_boxes_without_a_variance_are_refused(name, detector_options, options, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=message) as error:
        strategy("prc", name, detector_options, **options)
    assert "\n" not in str(error.value)
    strategy("prc", name, detector_options, ler=False, prc=False)  # nothing to be refused: plain pseudo labels


@pytest.mark.parametrize(("name", "tau"), [("faster_rcnn", 0.3), ("fcos", 0.02)])
def test_one_class(name: str, tau: float) -> None:
    torch.manual_seed(0)
    student = build_detector(name, 1, "test_resnet", OPTIONS[name] | GAUSSIAN)
    s = build_strategy("prc", student, {"tau": tau}, Plan(10, 0, 0.9)).train()
    b = batch()
    for target in b.labeled.targets:
        target.labels.zero_()
    out = s(b, step=0)
    assert out.stats["pseudo/per_image"] > 0
    assert 0 < out.stats["reliability/foreground"] < 0.5
    assert torch.isfinite(torch.stack(list(out.losses.values()))).all()
