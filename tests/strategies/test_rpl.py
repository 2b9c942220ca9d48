"""RPL: what is thresholded, what is weighed, what the running sums hold, and who learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import on_unlabeled

from ssod.detectors import build_detector
from ssod.errors import UserError
from ssod.ops.certainty import class_thresholds, class_weights
from ssod.strategies import build_strategy
from ssod.strategies.balance import MEMORY
from ssod.strategies.base import Plan
from ssod.strategies.foreground import foreground_certainty
from ssod.strategies.rpl import RPL
from ssod.structures import Candidates, Instances, SemiBatch, View, Weights

SIZE, K = 64, 3
BUCKET = {"codec": "bucket", "buckets": 8, "rank_by_quality": True, "fpn_channels": 32}
OPTIONS: dict[str, dict[str, Any]] = {
    "fcos": BUCKET | {"head_convs": 1},
    "retinanet": BUCKET | {"head_convs": 1},
    "faster_rcnn": BUCKET | {"box_head_width": 32, "roi_samples": 64, "train_proposals": 64},
    "deformable_detr": {"width": 32, "heads": 2, "feed_forward": 32, "encoder_layers": 1, "decoder_layers": 2}
    | {"queries": 12},
}
CERTAIN = ["fcos", "retinanet", "faster_rcnn"]


def detector(name: str = "fcos", **options: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_detector(name, K, "test_resnet", OPTIONS[name] | options)


def view(seed: int, boxes: list[list[float]] | None, flip: bool = False) -> View:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 255, (2, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    matrix = torch.eye(3, dtype=torch.float64)
    if flip:
        matrix = torch.tensor([[-1.0, 0, SIZE], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)
    target = Instances(torch.tensor(boxes), torch.arange(len(boxes)) % K) if boxes else Instances.empty()
    sizes = torch.full((2, 2), SIZE)
    return View(images, sizes, matrix.repeat(2, 1, 1), [target, Instances.empty()], [0, 1])


LABELED = [[4.0, 4, 30, 40], [30, 20, 60, 60]]


def batch(unlabeled: bool = True, boxes: list[list[float]] | None = LABELED) -> SemiBatch:
    labeled = view(1, boxes)
    return SemiBatch(labeled, view(2, None), view(2, None, flip=True)) if unlabeled else SemiBatch(labeled)


def strategy(name: str = "fcos", burn_in: int = 2, detector_options: dict[str, Any] | None = None, **more: Any) -> RPL:
    plan = Plan(iters=10, burn_in=burn_in, ema_decay=0.75, two_stages=True)
    built = build_strategy("rpl", detector(name, **detector_options or {}), more, plan)
    assert isinstance(built, RPL)
    return built.train()


def found(*rows: tuple[int, float, float]) -> Instances:
    """One teacher's detection for each label, score, quality."""
    table = torch.tensor(rows)
    boxes = torch.tensor([[2.0, 10, 20, 30]]).repeat(len(rows), 1)
    return Instances(boxes, table[:, 0].long(), table[:, 1], table[:, 2])


# ---- gradient, finiteness


@pytest.mark.parametrize(("name", "certainty"), [*((n, True) for n in CERTAIN), ("deformable_detr", False)])
def test_a_step_learns_from_both_kinds_and_the_teacher_gets_no_gradient(name: str, certainty: bool) -> None:
    # Every box passes: sqrt(p v) of an untrained dense head is about sqrt(0.01 * 0.5) = 0.07, a query's p about 0.01.
    on = {"threshold_on": "sqrt_pv"} if certainty else {}
    s = strategy(name, certainty=certainty, tau=0.05, gamma1=0.0, max_boxes=5, **on)
    with torch.no_grad():
        for head in (getattr(s.teacher, n, None) for n in ("cls_logits", "roi_logits")):
            if head is not None:
                head.bias += 2
        if name == "deformable_detr":
            for head in s.teacher.cls_heads:
                head.bias += 4
    out = s(batch(), step=2)
    assert {k.split("/")[0] for k in out.losses} == {"sup", "unsup"}
    assert out.stats["pseudo/per_image"] > 0
    torch.stack(list(out.losses.values())).sum().backward()
    assert all(p.grad is None for p in s.teacher.parameters())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in s.student.parameters() if p.requires_grad)
    assert s.balance.sums[1].sum() > 0
    assert bool((s.balance.sums[0] <= s.balance.sums[1]).all())
    assert not s.balance.sums.requires_grad
    assert not s.teacher.training


@pytest.mark.parametrize("name", ["fcos", "faster_rcnn"])
def test_no_box_at_all_gives_a_finite_loss_and_leaves_the_sums(name: str) -> None:
    s = strategy(name, tau=0.9)
    out = s(batch(boxes=None), step=2)
    assert out.stats["pseudo/per_image"] == 0
    total = torch.stack(list(out.losses.values())).sum()
    total.backward()
    assert all(torch.isfinite(p.grad).all() for p in s.student.parameters() if p.grad is not None)
    assert s.balance.sums.tolist() == [[0] * K, [0] * K]
    assert s.balance.weights().tolist() == [1] * K
    assert s.balance.thresholds(s.options.tau).tolist() == pytest.approx([0.9] * K)


# ---- certainty and thresholds


@pytest.mark.parametrize(
    ("on", "ranked", "expected"),
    [
        # p = 0.81, v = 0.64: p v = 0.5184, sqrt = 0.72; a detector that ranks by quality hands out 0.72 itself
        ("p", True, 0.81),
        ("pv", True, 0.5184),
        ("sqrt_pv", True, 0.72),
        ("p", False, 0.81),
        ("pv", False, 0.5184),
        ("sqrt_pv", False, 0.72),
    ],
)
def test_what_is_held_against_the_threshold_by_hand(on: str, ranked: bool, expected: float) -> None:
    s = strategy(threshold_on=on, detector_options={"rank_by_quality": ranked})
    given = s._confident(found((1, 0.72 if ranked else 0.81, 0.64)))
    assert given.scores is not None
    assert given.quality is not None
    assert given.scores.item() == pytest.approx(expected)
    assert given.quality.item() == pytest.approx(0.64)


def test_without_certainty_the_score_stands() -> None:
    s = strategy(certainty=False, detector_options={"codec": "giou", "rank_by_quality": False})
    assert s._confident(found((1, 0.72, 0.64))).scores.item() == pytest.approx(0.72)  # type: ignore[union-attr]


def test_each_class_has_its_own_threshold_for_pseudo_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    s = strategy(tau=0.7, gamma1=0.5, gamma2=0.0)
    # counts 1, 1, 4: n = 2; c = 0.5, 2, 3.6: ratios 0.25, 1, 1.8, their roots 0.5, 1, 1.342; times 0.7:
    # 0.35 -> 0.4, 0.7, 0.939 -> 0.9
    s.balance.sums.copy_(torch.tensor([[0.5, 2.0, 3.6], [1.0, 1.0, 4.0]]))
    assert s.balance.thresholds(s.options.tau).tolist() == pytest.approx([0.4, 0.7, 0.9])
    detections = found((0, 0.45, 0.5), (0, 0.39, 0.5), (1, 0.75, 0.5), (1, 0.69, 0.5), (2, 0.91, 0.5), (2, 0.89, 0.5))
    seen: list[list[Instances]] = []
    monkeypatch.setattr(s, "detect", lambda seen, conf: [detections, detections[:0]])
    monkeypatch.setattr(s, "learn", lambda *given: seen.append(given[2]) or {"cls": torch.zeros(())})
    out = on_unlabeled(s, batch(), 2)
    assert seen[0][0].labels.tolist() == [0, 1, 2]
    assert seen[0][0].scores.tolist() == pytest.approx([0.45, 0.75, 0.91])
    # flipped at width 64: x1 = 64 - 20, x2 = 64 - 2; the quality goes with the label
    torch.testing.assert_close(seen[0][0].boxes, torch.tensor([[44.0, 10, 62, 30]] * 3))
    assert seen[0][0].quality.tolist() == [0.5] * 3
    assert len(seen[0][1]) == 0
    stats = {k: float(v) for k, v in out.stats.items()}
    assert stats["pseudo/per_image"] == 1.5
    assert stats["pseudo/kept"] == 0.5
    assert (stats["pseudo/tau_min"], stats["pseudo/tau_max"]) == pytest.approx((0.4, 0.9))


# ---- the running sums


@pytest.mark.parametrize("name", CERTAIN)
@pytest.mark.parametrize("with_quality", [True, False])
def test_certainty_of_foreground_equals_one_candidate_at_a_time(name: str, with_quality: bool) -> None:
    model = detector(name).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    pictures = view(1, None).images
    output = model.head(model.features(pictures))
    asked: list[Candidates] = []
    target = Instances(torch.tensor(LABELED), torch.tensor([0, 2]))
    model.loss(output, [target, target], lambda c: asked.append(c) or Weights())
    candidates = next(c for c in asked if c.stage in ("dense", "roi"))
    order = torch.randperm(len(candidates.labels), generator=torch.Generator().manual_seed(0))
    if name == "faster_rcnn":  # its candidates may come in any order
        candidates = Candidates(
            *(t[order] for t in (candidates.boxes, candidates.image, candidates.labels, candidates.matched)), "roi"
        )
    labels, certainty = foreground_certainty(model, output, candidates, with_quality)
    fg = (candidates.matched >= 0).nonzero().squeeze(1)
    assert labels.tolist() == candidates.labels[fg].tolist()
    assert len(fg) > 2
    assert set(candidates.image[fg].tolist()) == {0, 1}
    expected = []
    for m, label in zip(fg.tolist(), labels.tolist(), strict=True):
        box, image = candidates.boxes[m], int(candidates.image[m])
        if name == "faster_rcnn":
            ask = [torch.zeros(0, 4), torch.zeros(0, 4)]
            ask[image] = box[None]
            p = model.classify(output, ask)[image][0, label]
            v = model.refine(output, ask)[image].quality[0]
        else:
            anchor = m - image * len(output.anchors)
            p = output.logits[image, anchor, label].sigmoid()
            v = model.codec.decode(output.codes[image, anchor], output.anchors[anchor])[1]
        expected.append((p * v if with_quality else p).item())
    torch.testing.assert_close(certainty, torch.tensor(expected), rtol=1e-4, atol=1e-5)
    assert not certainty.requires_grad


def test_a_querys_certainty_is_its_probability() -> None:
    model = detector("deformable_detr").eval()
    output = model.head(model.features(view(1, None).images))
    asked: list[Candidates] = []
    target = Instances(torch.tensor(LABELED), torch.tensor([0, 2]))
    model.loss(output, [target, target], lambda c: asked.append(c) or Weights())
    candidates = next(c for c in asked if c.stage == "query")
    labels, certainty = foreground_certainty(model, output, candidates, False)
    assert sorted(labels.tolist()) == [0, 0, 2, 2]
    rows = (candidates.matched >= 0).nonzero().squeeze(1)
    for m, label, p in zip(rows.tolist(), labels.tolist(), certainty.tolist(), strict=True):
        assert output.logits[-1, m // 12, m % 12, label].sigmoid().item() == pytest.approx(p)


def test_the_sums_decay_and_gather_in_both_stages() -> None:
    s = strategy()
    s(batch(unlabeled=False), step=0)
    first = s.balance.sums.clone()
    assert (first[1] > 0).tolist() == [True, True, False]
    with torch.no_grad():  # the same batch by the same student
        s(batch(unlabeled=False), step=1)
        torch.testing.assert_close(s.balance.sums, first * (1 + 1 / 3))  # decay 1 / (1 + 2)
        s(batch(unlabeled=False), step=10_000)
    torch.testing.assert_close(s.balance.sums, first * (1 + MEMORY * (1 + 1 / 3)))
    assert "balance.sums" in s.state_dict()


def test_both_gammas_0_leave_the_sums_alone() -> None:
    s = strategy(gamma1=0.0, gamma2=0.0)
    s(batch(), step=2)
    assert s.balance.sums.abs().sum() == 0


# ---- re-weighting


@pytest.mark.parametrize("name", [*CERTAIN, "deformable_detr"])
def test_weights_multiply_both_losses_of_foreground_only(name: str) -> None:
    """Per-target weights reach the foreground that is matched with them and nothing else: the same as alpha."""
    s = strategy(name, certainty=name != "deformable_detr")
    alpha = torch.tensor([0.5, 3.0, 1.0])
    labeled = view(1, LABELED)
    weighted = [
        Instances(t.boxes, t.labels, cls_weight=alpha[t.labels], box_weight=alpha[t.labels]) for t in labeled.targets
    ]
    losses = []
    for targets, each in ((labeled.targets, alpha), (weighted, None), (labeled.targets, None)):
        torch.manual_seed(3)  # samples of anchors and regions
        losses.append(s.learn(s.student_output(labeled), labeled, targets, each))
    by_alpha, by_target, plain = losses
    for loss in by_alpha.keys() - {"rpn_cls", "rpn_box", "encoder"}:
        torch.testing.assert_close(by_alpha[loss], by_target[loss])
        assert by_alpha[loss] != plain[loss]
    for loss in by_alpha.keys() & {"rpn_cls", "rpn_box", "encoder"}:  # candidates without a class
        assert by_alpha[loss] == plain[loss]


def test_weights_act_in_stage_two_on_labelled_and_unlabelled_images(monkeypatch: pytest.MonkeyPatch) -> None:
    s = strategy(gamma2=0.5)
    s.balance.sums.copy_(torch.tensor([[0.5, 2.0, 3.6], [1.0, 1.0, 4.0]]))  # ratios 0.25, 1, 1.8
    given: list[torch.Tensor | None] = []
    monkeypatch.setattr(s, "learn", lambda *args: given.append(args[3]) or {"cls": torch.zeros(())})
    s(batch(unlabeled=False), step=1)
    s(batch(), step=2)
    assert given[0] is None
    for alpha in given[1:]:
        assert alpha is not None
        # 0.25^-0.5 = 2, 1, 1.8^-0.5 = 0.745356; the decay of the sums changes no ratio
        torch.testing.assert_close(alpha, torch.tensor([2.0, 1.0, 0.745356]))
    assert len(given) == 3


def test_curves_by_class_are_those_in_use() -> None:
    s = strategy()
    s.balance.sums.copy_(torch.tensor([[0.5, 2.0, 3.6], [1.0, 1.0, 4.0]]))
    curves = s.by_class()
    assert torch.equal(curves["tau"], class_thresholds(s.balance.sums, 0.7, 0.05))
    assert torch.equal(curves["alpha"], class_weights(s.balance.sums, 0.6, 10.0))
    torch.testing.assert_close(curves["certainty"], torch.tensor([0.25, 1.0, 1.8]))


# ---- teacher


def moved(s: RPL, step: int) -> None:
    with torch.no_grad():
        for student, _ in s.pairs():
            for p in student.parameters():
                p.add_(1.0)
    s.after_step(step)


@pytest.mark.parametrize("kind", ["frozen", "ema"])
def test_the_teacher_is_what_stage_one_left_and_then_stays_or_follows(kind: str) -> None:
    s = strategy(teacher=kind)
    weight = "cls_logits.bias"
    start = s.teacher.get_parameter(weight).clone()
    moved(s, 0)
    assert torch.equal(s.teacher.get_parameter(weight), start)
    moved(s, 1)
    torch.testing.assert_close(s.teacher.get_parameter(weight), start + 2)
    moved(s, 2)  # the average: 0.75 * 2 + 0.25 * 3 = 2.25 above the start
    torch.testing.assert_close(s.teacher.get_parameter(weight), start + (2 if kind == "frozen" else 2.25))
    torch.testing.assert_close(s.student.get_parameter(weight), start + 3)


# ---- two of each


def test_two_pairs_start_from_one_backbone_and_learn_from_boxes_of_both() -> None:
    s = strategy(ensemble=2, threshold_on="sqrt_pv", tau=0.05, gamma1=0.0)
    (first, teacher), (second, teacher2) = s.pairs()
    assert torch.equal(next(first.backbone.parameters()), next(second.backbone.parameters()))
    assert not torch.equal(first.cls_logits.weight, second.cls_logits.weight)
    with torch.no_grad():
        teacher.cls_logits.bias += 2
        teacher2.cls_logits.bias += 2
    out = s(batch(), step=2)
    assert {"sup/cls", "sup/2/cls", "unsup/cls", "unsup/2/cls"} <= set(out.losses)
    assert out.stats["pseudo/per_image"] > 0
    torch.stack(list(out.losses.values())).sum().backward()
    for student, teacher in s.pairs():
        assert all(p.grad is not None for p in student.parameters() if p.requires_grad)
        assert all(p.grad is None for p in teacher.parameters())
        assert not teacher.training
    moved(s, 1)
    for student, teacher in s.pairs():
        assert torch.equal(student.cls_logits.bias, teacher.cls_logits.bias)
    assert set(s.networks()) == {"student", "teacher", "student2"}


def test_both_students_detect_together() -> None:
    s = strategy(ensemble=2)
    together = s.together()["students"]
    images = view(1, None).images
    alone = [student.eval()(images, conf=0.02) for student, _ in s.pairs()]
    fused = together(images, conf=0.04)
    assert sum(map(len, fused)) > 0
    for one, two, both in zip(*alone, fused, strict=True):
        assert both.scores is not None
        assert one.scores is not None
        assert two.scores is not None
        assert both.scores.max() <= max(one.scores.max(), two.scores.max())
    assert s.state_dict().keys() == strategy(ensemble=2).state_dict().keys()  # a view of both: nothing of its own
    assert strategy().together() == {}


# ---- what is refused


@pytest.mark.parametrize(
    ("name", "changes", "options", "sentence"),
    [
        ("fcos", {"codec": "giou", "rank_by_quality": False}, {}, "codec=giou is not the paper's; set .*bucket, or"),
        ("fcos", {"codec": "gaussian"}, {}, "set detector.codec=bucket, or strategy.certainty=false"),
        ("deformable_detr", {}, {}, "detector=deformable_detr cannot give; set strategy.certainty=false"),
        ("fcos", {}, {"certainty": False, "threshold_on": "pv"}, "threshold_on=pv needs the boxes' quality"),
        ("fcos", {}, {"ensemble": 3}, r"strategy\.ensemble"),
        ("fcos", {}, {"tau": 0.0}, r"strategy\.tau"),
        ("fcos", {}, {"gamma": 0.6}, r"strategy\.gamma"),
    ],
)
def test_what_cannot_work_is_said_in_one_sentence(
    name: str, changes: dict[str, Any], options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence) as error:
        strategy(name, detector_options=changes, **options)
    assert "\n" not in str(error.value)
