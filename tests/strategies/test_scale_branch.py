"""The half-size branch of SED on other strategies: what it adds, to whom, and at what cost."""

from __future__ import annotations

import pytest
import torch
from small import SIZE, K, batch, strategy, unsupervised
from torch import Tensor, nn

from ssod.errors import UserError
from ssod.ops.half import half_size
from ssod.strategies.base import Strategy
from ssod.strategies.distillation import Distillation
from ssod.strategies.teacher_student import to_weak
from ssod.structures import Instances, SemiBatch, View

ON = {"scale_weight": 1.0}
# kind, detector, its options, those of the strategy beside `scale_weight`: everything that has a teacher
PAIRS = [
    *[("mean_teacher", name, {}, {"tau": 0.9}) for name in ("fcos", "retinanet", "faster_rcnn", "deformable_detr")],
    ("unbiased_teacher", "faster_rcnn", {}, {"tau": 0.2}),
    ("soft_teacher", "faster_rcnn", {}, {"candidates": 0.2, "tau": 0.2, "spread": 1.0}),
    ("rpl", "fcos", {"codec": "bucket"}, {}),
    ("prc", "faster_rcnn", {"codec": "gaussian"}, {"tau": 0.2}),
    ("lsm", "retinanet", {}, {"tau": 0.005, "alpha": 0.003}),
]


def built(kind: str, name: str, detector: dict[str, object], options: dict[str, object]) -> Strategy:
    return strategy(kind, name, {"half_scale": True} | detector, **options)


def step(s: Strategy, b: SemiBatch | None = None) -> dict[str, Tensor]:
    torch.manual_seed(0)  # the samplers' draws
    return s(b or batch(), step=0).losses


def says(logits: nn.Module, probabilities: list[float]) -> None:
    """The layer gives every anchor of every place these class probabilities."""
    assert isinstance(logits, nn.Conv2d)
    with torch.no_grad():
        logits.weight.zero_()
        logits.bias.view(-1, K).copy_(torch.tensor(probabilities).logit())  # type: ignore[union-attr]


# ---- what it adds


def test_by_hand() -> None:
    """A student that says (0.5, 0.4, 0.6) everywhere, a teacher that says (0.8, 0.2, 0.1): w = 0.8 everywhere.

    BCE: ln 2 = 0.693147; 0.2 * -ln 0.4 + 0.8 * -ln 0.6 = 0.183258 + 0.408661; 0.1 * -ln 0.6 + 0.9 * -ln 0.4 = 0.051083
    + 0.824662; sum 2.160811. Times scale_weight 0.5 and w_u 3: 3.241216. Both give the same boxes: 1 - IoU = 0.
    """
    s = built("mean_teacher", "retinanet", {}, {"scale_weight": 0.5, "weight": 3.0, "tau": 0.9})
    assert s.teacher is not None
    says(s.student.cls_logits, [0.5, 0.4, 0.6])  # type: ignore[arg-type]
    says(s.teacher.cls_logits, [0.8, 0.2, 0.1])  # type: ignore[arg-type]
    for model in (s.student, s.teacher):
        nn.init.zeros_(model.box_codes.weight)  # type: ignore[union-attr, arg-type]
        nn.init.zeros_(model.box_codes.bias)  # type: ignore[union-attr, arg-type]
    b = batch()
    losses = step(s, SemiBatch(b.labeled, b.weak, b.weak))
    assert losses["unsup/half/cls"].item() == pytest.approx(3.241216, abs=1e-4)
    assert losses["unsup/half/box"].item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize(("kind", "name", "detector", "options"), PAIRS)
def test_it_is_the_distillation_from_the_teachers_full_size(kind, name, detector, options) -> None:  # type: ignore[no-untyped-def]
    s = built(kind, name, detector, options | ON).eval()  # no dropout
    assert s.teacher is not None
    b = batch()
    assert b.weak is not None
    assert b.strong is not None
    losses = step(s, b)
    weight = s.options.weight  # type: ignore[attr-defined]
    student, teacher = s.student, s.teacher
    images, sizes = half_size(b.strong)
    half = student.head(student.features(images, sizes, shift=1))
    seen = teacher.head(teacher.features(b.weak.images, b.weak.sizes))
    expected = Distillation()(student, half, teacher, seen, to_weak(b))
    assert {k for k in losses if "half/" in k} == {f"unsup/half/{k}" for k in expected}
    for key, value in expected.items():
        assert losses[f"unsup/half/{key}"].item() == pytest.approx(weight * value.item(), rel=1e-4, abs=1e-6)
    assert losses["unsup/half/cls"] > 0


@pytest.mark.parametrize(("kind", "name", "detector", "options"), PAIRS)
def test_the_other_losses_stay_as_they_are(kind, name, detector, options) -> None:  # type: ignore[no-untyped-def]
    with_it = step(built(kind, name, detector, options | ON))
    without = step(built(kind, name, detector, options))
    assert not any("half/" in k for k in without)
    assert without.keys() < with_it.keys()
    assert all(torch.equal(with_it[k], without[k]) for k in without)


def test_it_grows_with_w_u_and_its_own_weight_and_the_ramp() -> None:
    def half(**options: object) -> float:
        return step(built("mean_teacher", "fcos", {}, {"tau": 0.9} | options))["unsup/half/cls"].item()

    one = half(scale_weight=1.0)
    assert half(scale_weight=0.25) == pytest.approx(one / 4)
    assert half(scale_weight=1.0, weight=3.0) == pytest.approx(3 * one)
    assert half(scale_weight=1.0, ramp=4) == pytest.approx(one / 4)  # the first of four steps


# ---- who learns, and what it costs


@pytest.mark.parametrize(("kind", "name", "detector", "options"), PAIRS)
def test_the_student_learns_and_the_teacher_does_not(kind, name, detector, options) -> None:  # type: ignore[no-untyped-def]
    s = built(kind, name, detector, options | ON)
    losses = step(s)
    torch.stack([v for k, v in losses.items() if "half/" in k]).sum().backward()
    assert s.teacher is not None
    assert all(p.grad is None for p in s.teacher.parameters())
    reached = {n.split(".")[0] for n, p in s.student.named_parameters() if p.grad is not None and p.grad.any()}
    assert "backbone" in reached
    assert {"cls_logits", "roi_logits", "cls_heads"} & reached
    aux = getattr(s, "aux", None)
    assert aux is None or all(p.grad is None for p in aux.parameters())  # of LSM the main classifier


def test_two_students_learn_each_from_its_own_teacher() -> None:
    s = built("rpl", "fcos", {"codec": "bucket"}, {"ensemble": 2} | ON)
    losses = step(s)
    assert {"unsup/half/cls", "unsup/2/half/cls"} <= set(losses)
    losses["unsup/2/half/cls"].backward()
    assert all(p.grad is None for p in s.student.parameters())
    (_, teacher), (second, teacher2) = s.pairs()
    assert any(p.grad is not None and p.grad.any() for p in second.parameters())
    assert all(p.grad is None for t in (teacher, teacher2) for p in t.parameters())


@pytest.mark.parametrize(("kind", "name", "detector", "options"), PAIRS)
def test_the_teacher_looks_once(kind, name, detector, options) -> None:  # type: ignore[no-untyped-def]
    looks: list[tuple[str, tuple[int, ...]]] = []
    s = built(kind, name, detector, options | ON)
    assert s.teacher is not None
    for who, model in (("student", s.student), ("teacher", s.teacher)):
        model.backbone.register_forward_hook(lambda m, x, y, who=who: looks.append((who, tuple(x[0].shape[-2:]))))
    step(s)
    full, half = (SIZE, SIZE), (SIZE // 2, SIZE // 2)
    of_lsm = [("student", half)] * 2 if kind == "lsm" else []  # its own branch, labelled and unlabelled
    assert sorted(looks) == sorted(
        [("student", full), ("student", full), ("student", half), ("teacher", full), *of_lsm]
    )


def test_running_statistics_are_those_of_full_size_images() -> None:
    norms = []
    for options in (ON, {}):
        s = built("mean_teacher", "fcos", {}, {"tau": 0.9} | options)
        step(s)
        norms.append({k: v for k, v in s.student.state_dict().items() if "running" in k})
    assert norms[0]
    assert all(torch.equal(norms[0][k], norms[1][k]) for k in norms[0])


# ---- edges


@pytest.mark.parametrize("name", ["fcos", "retinanet", "faster_rcnn", "deformable_detr"])
def test_odd_sizes_no_label_and_no_pseudo_box(name: str) -> None:
    def odd(view: View) -> View:
        """Frames of 61 x 53, of which the second image fills 47 x 35."""
        sizes = torch.tensor([[61, 53], [47, 35]])
        targets = [Instances.empty(), Instances.empty()]
        return View(view.images[..., :61, :53], sizes, view.matrices, targets, view.indices)

    s = built("mean_teacher", name, {}, {"tau": 1.0} | ON)
    b = batch()
    assert b.weak is not None
    assert b.strong is not None
    out = s(SemiBatch(odd(b.labeled), odd(b.weak), odd(b.strong)), step=0)
    assert out.stats["pseudo/per_image"] == 0
    assert all(torch.isfinite(v) for v in out.losses.values())
    unsupervised(out.losses).backward()
    assert all(torch.isfinite(p.grad).all() for p in s.student.parameters() if p.grad is not None)


def test_a_teacher_that_sees_nothing_teaches_nothing() -> None:
    s = built("mean_teacher", "retinanet", {}, {"tau": 0.9} | ON)
    assert s.teacher is not None
    says(s.teacher.cls_logits, [1e-30] * K)  # type: ignore[arg-type]
    losses = step(s)
    assert losses["unsup/half/cls"].item() == pytest.approx(0, abs=1e-4)
    assert torch.isfinite(losses["unsup/half/box"])


@pytest.mark.parametrize("kind", ["mean_teacher", "unbiased_teacher", "sed"])
def test_without_the_level_it_is_refused_in_one_sentence(kind: str) -> None:
    for name in ("fcos", "deformable_detr"):
        with pytest.raises(
            UserError, match=r"^strategy.scale_weight=2.0 looks .* set detector.half_scale=true, or"
        ) as e:
            strategy(kind, name, scale_weight=2.0)
        assert "\n" not in str(e.value)
        assert strategy(kind, name, scale_weight=0.0)(batch(), step=0).losses
