"""SED: its losses by hand, who learns from what, at which scale, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from small import SIZE, batch, detector, strategy, unsupervised, view
from torch import Tensor

from ssod.engine.watch.diagnosis.probe import Scores
from ssod.engine.watch.diagnosis.supply import Supply
from ssod.errors import UserError
from ssod.nn.ema import ema_decay_at
from ssod.strategies import build_strategy
from ssod.strategies.base import Plan
from ssod.strategies.distillation import Distillation, statistics
from ssod.strategies.pairing import Paired
from ssod.strategies.teacher_student import to_weak
from ssod.structures import Instances, SemiBatch, View

ALL = ("fcos", "retinanet", "faster_rcnn", "deformable_detr")
HALF: dict[str, object] = {"half_scale": True}
MAIN = {"cls", "box"}
NAMES = {
    "fcos": MAIN | {"centerness"},
    "retinanet": MAIN,
    "faster_rcnn": MAIN | {"rpn_cls", "rpn_box"},
    "deformable_detr": MAIN | {"encoder_cls", "encoder_box"},
}


def paired(mine: list[list[float]], theirs: list[list[float]], stage: str = "dense") -> Paired:
    """Candidates of one image with these probabilities; each box of the learner shares a third with the judge's."""
    count, exclusive = len(mine), stage == "roi"
    a = torch.tensor([[0.0, 0, 10, 10]]).repeat(count, 1).requires_grad_()
    b = torch.tensor([[5.0, 0, 15, 10]]).repeat(count, 1)
    logits, target = torch.tensor(mine), torch.tensor(theirs)
    logits = logits.log() if exclusive else logits.logit()
    target = target.log() if exclusive else target.logit()
    image = torch.zeros(count, dtype=torch.int64)
    return Paired(stage, image, logits.requires_grad_(), target, exclusive, lambda rows: (a[rows], b[rows]))


# ---- the formulas


def test_sigmoids() -> None:
    # w = (0.8, 0.2). BCE: (ln 2 + 0.500402) and (0.2 * -ln 0.4 + 0.8 * -ln 0.6 + ln 2) = 0.591917 + 0.693147
    # L_cls = (0.8 * 1.193549 + 0.2 * 1.285064) / 1 = 1.211852; L_loc = 1 - 1/3
    found = Distillation().losses([paired([[0.5, 0.2], [0.4, 0.5]], [[0.8, 0.2], [0.2, 0.1]])])
    assert set(found) == MAIN
    assert found["cls"].item() == pytest.approx(1.211852, abs=1e-5)
    assert found["box"].item() == pytest.approx(2 / 3, abs=1e-5)


def test_regions_with_background_in_the_kl_but_not_in_the_weight() -> None:
    # w = (0.5, 0.1): 0.1 of the second is its best foreground class, 0.85 its background
    # KL((0.5, 0.25, 0.25) || (0.25, 0.25, 0.5)) = 0.25 ln 2 = 0.173287
    # KL((0.1, 0.05, 0.85) || (0.2, 0.2, 0.6)) = 0.1 ln 0.5 + 0.05 ln 0.25 + 0.85 ln (0.85 / 0.6) = 0.157431
    pair = paired([[0.25, 0.25, 0.5], [0.2, 0.2, 0.6]], [[0.5, 0.25, 0.25], [0.1, 0.05, 0.85]], "roi")
    found = Distillation(box_weight=3.0).losses([pair])
    assert found["cls"].item() == pytest.approx((0.5 * 0.173287 + 0.1 * 0.157431) / 0.6, abs=1e-5)
    assert found["box"].item() == pytest.approx(3 * 2 / 3, abs=1e-5)


def test_without_reweighting_all_count_alike() -> None:
    pair = paired([[0.5], [0.4]], [[0.9], [0.1]])
    # BCE: ln 2; 0.1 * -ln 0.4 + 0.9 * -ln 0.6 = 0.551372; means with w = (0.9, 0.1) and w = 1
    assert Distillation().losses([pair])["cls"].item() == pytest.approx(0.9 * math.log(2) + 0.0551372, abs=1e-5)
    alike = Distillation(reweight=False).losses([pair])["cls"].item()
    assert alike == pytest.approx((math.log(2) + 0.551372) / 2, abs=1e-5)


def test_centerness_is_distilled_like_a_class() -> None:
    # w = (0.8, 0.2): 0.8 * ln 2 + 0.2 * (0.3 * -ln 0.6 + 0.7 * -ln 0.4) = 0.554518 + 0.2 * 0.794651
    pair = paired([[0.5], [0.4]], [[0.8], [0.2]])
    mine = torch.tensor([0.5, 0.6]).logit().requires_grad_()
    pair = replace(pair, quality=mine, target_quality=torch.tensor([0.9, 0.3]).logit())
    found = Distillation(box_weight=2.0).losses([pair])
    assert found["centerness"].item() == pytest.approx(2 * (0.554518 + 0.1589302), abs=1e-5)
    found["centerness"].backward()
    assert mine.grad is not None
    # w (p - t)
    assert mine.grad.tolist() == pytest.approx([2 * 0.8 * -0.4, 2 * 0.2 * 0.3], abs=1e-6)


def test_names_of_first_stages() -> None:
    pairs = [paired([[0.5]], [[0.8]], stage) for stage in ("rpn", "encoder")]
    found = Distillation().losses([*pairs, paired([[0.5, 0.5]], [[0.8, 0.2]], "roi")])
    assert set(found) == MAIN | {"rpn_cls", "rpn_box", "encoder_cls", "encoder_box"}


def test_no_threshold_decides_what_is_background() -> None:
    # An object that the teacher gives 0.3: the student, at 0.1, learns towards 0.3, not towards 0.
    pair = paired([[0.1], [0.1]], [[0.3], [0.05]])
    Distillation().losses([pair])["cls"].backward()
    assert pair.logits.grad is not None
    # w (p - t) / sum w, w = (0.3, 0.05)
    expected = [0.3 * -0.2 / 0.35, 0.05 * 0.05 / 0.35]
    assert pair.logits.grad.flatten().tolist() == pytest.approx(expected, abs=1e-6)


def test_boxes_of_little_weight_are_left_out_within_the_bound() -> None:
    asked: list[int] = []
    pair = paired([[0.5]] * 100, [[0.9]] * 10 + [[1e-4]] * 90)

    def boxes(rows: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(len(rows))
        return pair.boxes(rows)

    found = Distillation().losses([replace(pair, boxes=boxes)])
    assert asked == [10]
    # 9 of 9.009 of the weight is looked at
    assert found["box"].item() == pytest.approx(2 / 3 * 9 / 9.009, abs=1e-5)


def test_nothing_to_learn_from_is_zero_in_the_graph() -> None:
    empty = replace(paired([[0.5, 0.5]], [[0.5, 0.5]], "roi"))
    none = empty.logits.detach()[:0].requires_grad_()
    pair = replace(empty, image=empty.image[:0], logits=none, target=empty.target[:0])
    losses = Distillation().losses([pair])
    assert [v.item() for v in losses.values()] == [0, 0]
    torch.stack(list(losses.values())).sum().backward()
    assert none.grad is not None
    never = paired([[0.5], [0.5]], [[0.5], [0.5]])
    losses = Distillation().losses([replace(never, target=torch.full((2, 1), -300.0))])
    assert all(math.isfinite(v.item()) for v in losses.values())


def test_statistics() -> None:
    # two boxes of class 0 at one place are one, class 1 there is another; 0.4 is no object. w = (0.9, 0.8, 0.7, 0.4)
    pair = paired([[0.5, 0.5]] * 4, [[0.9, 0.1], [0.8, 0.1], [0.1, 0.7], [0.4, 0.1]])
    found = {k: float(v) for k, v in statistics([pair], 2, 0.6, 100).items()}
    assert found["distill/mean_weight"] == pytest.approx(0.7)
    assert found["distill/object_share"] == pytest.approx(2.4 / 2.8)
    assert found["distill/boxes_per_image"] == 1.0  # two boxes in two images
    assert float(statistics([pair], 2, 0.6, 1)["distill/boxes_per_image"]) == 0.5
    regions = paired([[0.5, 0.5]] * 2, [[0.1, 0.9], [0.6, 0.4]], "roi")
    found = {k: float(v) for k, v in statistics([regions], 1, 0.6, 100).items()}
    assert found["distill/boxes_per_image"] == 1.0
    assert found["distill/mean_weight"] == pytest.approx(0.35)


# ---- who learns from what


@pytest.mark.parametrize("name", ALL)
def test_both_scales_teach_the_student_and_nothing_the_teacher(name: str) -> None:
    s = strategy("sed", name, HALF)
    out = s(batch(), step=0)
    own = {k.removeprefix("unsup/") for k in out.losses if k.startswith("unsup/")}
    assert own == NAMES[name] | {f"half/{n}" for n in NAMES[name]}
    unsupervised(out.losses).backward()
    assert s.teacher is not None
    assert all(p.grad is None for p in s.teacher.parameters())
    grads = {n.split(".")[0] for n, p in s.student.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    heads = {
        "fcos": {"cls_logits", "box_codes", "centerness", "fpn"},
        "retinanet": {"cls_logits", "box_codes", "fpn"},
        "faster_rcnn": {"rpn_logits", "rpn_codes", "roi_logits", "roi_codes", "fpn"},
        "deformable_detr": {"cls_heads", "box_heads", "project"},
    }
    assert grads >= heads[name] | {"backbone"}


@pytest.mark.parametrize("name", ALL)
def test_every_parameter_has_a_gradient_after_a_labelled_step(name: str) -> None:
    s = strategy("sed", name, HALF)
    torch.stack(list(s(SemiBatch(batch().labeled), step=0).losses.values())).sum().backward()
    without = [n for n, p in s.student.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    extra = s.student.project if name == "deformable_detr" else s.student.fpn.lateral
    lowest = next(iter(extra.parameters()))
    assert lowest.grad is not None
    assert lowest.grad.abs().max() == 0


def test_only_the_half_size_teaches_the_level_below() -> None:
    for scale in (True, False):
        s = strategy("sed", "fcos", HALF, scale_weight=float(scale))
        out = s(batch(), step=0)
        assert any("half/" in k for k in out.losses) == scale
        unsupervised(out.losses).backward()
        grad = s.student.fpn.lateral["4"].weight.grad
        assert grad is not None
        assert bool(grad.abs().max() > 0) == scale


@pytest.mark.parametrize("term", ["cls", "box", "centerness"])
def test_each_term_reaches_its_own_layer(term: str) -> None:
    s = strategy("sed", "fcos", HALF)
    out = s(batch(), step=0)
    out.losses[f"unsup/{term}"].backward()
    layers = {"cls": s.student.cls_logits, "box": s.student.box_codes, "centerness": s.student.centerness}
    for name, layer in layers.items():
        grad = layer.weight.grad
        assert (grad is not None and bool(grad.abs().max() > 0)) == (name == term)


@pytest.mark.parametrize("name", ["fcos", "retinanet", "faster_rcnn"])
def test_who_agrees_with_the_teacher_has_nothing_to_learn(name: str) -> None:
    model = detector(name).eval()
    seen = view(2)
    output = model.head(model.features(seen.images, seen.sizes))
    losses = Distillation()(model, output, model, output, None)
    assert all(v.item() < 1e-4 for k, v in losses.items() if k.endswith("box"))
    torch.stack([v for k, v in losses.items() if not k.endswith("box")]).sum().backward()
    largest = max(p.grad.abs().max().item() for p in model.parameters() if p.grad is not None)
    assert largest < 1e-4


def test_running_statistics_are_those_of_full_size_images() -> None:
    norms = []
    for scale in (True, False):
        s = strategy("sed", "fcos", HALF, scale_weight=float(scale))
        s(batch(), step=0)
        norms.append({k: v for k, v in s.student.state_dict().items() if "running" in k})
    assert norms[0]
    assert all(torch.equal(norms[0][k], norms[1][k]) for k in norms[0])


# ---- the strategy


@pytest.mark.parametrize("name", ALL)
def test_a_few_steps(name: str) -> None:
    s = strategy("sed", name, HALF)
    optimizer = torch.optim.SGD([p for p in s.parameters() if p.requires_grad], lr=0.002, momentum=0.9)
    start = {k: v.clone() for k, v in s.state_dict().items()}
    supervised = []
    for step in range(4):
        torch.manual_seed(0)  # the same samples each time
        out = s(batch(), step)
        total = torch.stack(list(out.losses.values())).sum()
        assert torch.isfinite(total)
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(s.parameters(), 10)
        optimizer.step()
        s.after_step(step)
        supervised.append(sum(v.item() for k, v in out.losses.items() if k.startswith("sup/")))
        assert 0 < float(out.stats["distill/mean_weight"]) < 1
    assert supervised[-1] < supervised[0]
    moved = {k.split(".")[0] for k, v in s.state_dict().items() if not torch.equal(v, start[k])}
    assert {"student", "teacher"} <= moved


def test_the_teacher_is_the_average_of_the_student() -> None:
    s = build_strategy("sed", detector("fcos", **HALF), {}, Plan(10, 2, 0.9))
    weight, average = s.student.cls_logits.weight, s.teacher.cls_logits.weight  # type: ignore[union-attr]
    with torch.no_grad():
        weight += 1
        s.after_step(0)  # burn-in: nothing yet
        assert not torch.equal(weight, average)
        s.after_step(1)
        assert torch.equal(weight, average)
        weight += 1
        s.after_step(2)
    decay = ema_decay_at(2, 0.9)
    torch.testing.assert_close(average, weight - decay)


def odd(seen: View, h: int, w: int) -> View:
    return replace(seen, images=seen.images[:, :, :h, :w], sizes=torch.tensor([[h, w], [h - 7, w - 4]]))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("flip", [False, True])
def test_odd_sizes_and_no_annotation_at_all(name: str, flip: bool) -> None:
    s = strategy("sed", name, HALF)
    both = SemiBatch(view(1), odd(view(2), 61, 59), odd(view(2, flip=flip), 53, 59))
    both.labeled.targets = [Instances.empty(), Instances.empty()]
    losses = s(both, step=0).losses
    total = torch.stack(list(losses.values())).sum()
    assert torch.isfinite(total)
    total.backward()
    assert all(torch.isfinite(p.grad).all() for p in s.student.parameters() if p.grad is not None)


def test_where_the_views_differ() -> None:
    same = SemiBatch(view(1), view(2), view(2))
    assert to_weak(same) is None
    mirrored = to_weak(batch())
    assert mirrored is not None
    assert (mirrored @ torch.tensor([5.0, 7, 1], dtype=torch.float64)).tolist() == [[SIZE - 5, 7, 1]] * 2


def test_weights_multiply_their_terms() -> None:
    found = {}
    for key, options in {"1": {}, "w": {"weight": 3.0}, "s": {"scale_weight": 0.5}, "b": {"box_weight": 2.0}}.items():
        s = strategy("sed", "retinanet", HALF, **options)
        found[key] = {k: v.item() for k, v in s(batch(), step=0).losses.items()}
    for k, v in found["1"].items():
        learned = k.startswith("unsup/")
        assert found["w"][k] == pytest.approx(v * (3 if learned else 1), rel=1e-4)
        assert found["s"][k] == pytest.approx(v * (0.5 if "half/" in k else 1), rel=1e-4)
        assert found["b"][k] == pytest.approx(v * (2 if learned and k.endswith("box") else 1), rel=1e-4)


def test_the_weight_grows_over_the_ramp() -> None:
    s = build_strategy("sed", detector("fcos", **HALF), {"ramp": 4, "weight": 2.0}, Plan(20, 10, 0.9)).train()
    assert [float(s(batch(), step).stats["pseudo/weight"]) for step in (10, 11, 13, 19)] == [0.5, 1.0, 2.0, 2.0]


def test_the_alarm_for_missing_pseudo_boxes_stays_silent() -> None:
    s = strategy("sed", "fcos", HALF)
    out = s(batch(), step=0)
    values = {k: float(v) for k, v in out.stats.items()}
    assert values["distill/boxes_per_image"] == 0  # untrained: nothing above 0.5, and yet every candidate teaches
    supply = Supply()

    def refuse() -> Scores:
        raise AssertionError("an alarm")

    assert [list(supply.look(values, i, s.plan, 3.0, s.options, refuse)) for i in range(10)] == [[]] * 10


def test_half_size_images_need_their_level() -> None:
    for name in ALL:
        with pytest.raises(UserError, match=r"set detector.half_scale=true, or strategy.scale_weight=0\.$") as error:
            strategy("sed", name)
        assert "\n" not in str(error.value)
        assert strategy("sed", name, scale_weight=0.0)(batch(), step=0).losses
    with pytest.raises(UserError, match="tau"):
        strategy("sed", "fcos", HALF, tau=0.5)
