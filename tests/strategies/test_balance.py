"""RPL's thresholds and weights as a part: Eq. 6 by hand, and what it does inside LER/PRC."""

from __future__ import annotations

import pytest
import torch
from small import K, batch, candidates, on_labeled, on_unlabeled, strategy

from ssod.errors import UserError
from ssod.strategies.balance import MEMORY, Balance, BalanceOptions
from ssod.strategies.foreground import foreground_certainty
from ssod.strategies.prc import PRC
from ssod.structures import Candidates, Instances, Weights

GAUSSIAN: dict[str, object] = {"codec": "gaussian"}
TAU = {"fcos": 0.02, "retinanet": 0.005, "faster_rcnn": 0.2, "deformable_detr": 0.005}  # what untrained ones reach
RPL: dict[str, object] = {"gamma1": 0.05, "gamma2": 0.6}
# counts 1, 1, 4: n = 2; c = 0.5, 2, 3.6: ratios 0.25, 1, 1.8
SUMS = torch.tensor([[0.5, 2.0, 3.6], [1.0, 1.0, 4.0]])


def balance(**options: float) -> Balance:
    part = Balance(K, BalanceOptions(**options), with_quality=False)
    part.sums.copy_(SUMS)
    return part


def prc(name: str, **options: object) -> PRC:
    """LER/PRC whose untrained teacher is sure enough for a threshold, which Eq. 6 keeps at 0.4 or above."""
    on_queries = name == "deformable_detr"
    s = strategy("prc", name, {} if on_queries else GAUSSIAN, **({"ler": False} if on_queries else {}), **options)
    assert isinstance(s, PRC)
    with torch.no_grad():
        for head in (getattr(s.teacher, n, None) for n in ("cls_logits", "roi_logits")):
            if head is not None:
                head.bias[1] += 6  # one class: a softmax over all would stay as it is
        for head in getattr(s.teacher, "cls_heads", []):
            head.bias += 6
    return s


# ---- the part


def test_equation_6_by_hand() -> None:
    part = balance(gamma1=0.5, gamma2=0.5)
    # roots of the ratios 0.5, 1, 1.342, times 0.7: 0.35 -> 0.4, 0.7, 0.939 -> 0.9; their inverses 2, 1, 0.745
    assert part.thresholds(0.7).tolist() == pytest.approx([0.4, 0.7, 0.9])
    assert part.weights().tolist() == pytest.approx([2.0, 1.0, 0.745356])
    assert part.lowest(0.7) == 0.4
    curves = part.by_class(0.7)
    assert curves["certainty"].tolist() == pytest.approx([0.25, 1.0, 1.8])
    stats = {k: float(v) for k, v in part.stats(curves["tau"], curves["alpha"]).items()}
    assert stats == pytest.approx(
        {"pseudo/tau_min": 0.4, "pseudo/tau_max": 0.9, "pseudo/alpha_min": 0.745356, "pseudo/alpha_max": 2.0}
    )


def test_a_class_never_seen_gets_the_bound() -> None:
    part = balance(gamma2=0.6, max_weight=3.0)
    part.sums[:, 0] = 0
    assert part.weights()[0].item() == 3.0
    part.sums.zero_()  # no class was ever seen: nothing is known, nothing is weighed
    assert part.weights().tolist() == [1.0] * K


def test_each_switch_is_off_at_0() -> None:
    weights_only, thresholds_only, none = balance(gamma2=0.5), balance(gamma1=0.5), balance()
    assert weights_only.thresholds(0.3).tolist() == pytest.approx([0.3] * K)  # below the range of dynamic ones
    assert weights_only.lowest(0.3) == 0.3
    assert thresholds_only.weights().tolist() == [1.0] * K
    assert weights_only.active
    assert thresholds_only.active
    assert not none.active


def test_sums_fade_as_steps_go_by() -> None:
    part = balance(gamma1=0.5)
    part.fade(2)  # 2 / (2 + 2)
    torch.testing.assert_close(part.sums, SUMS / 2)
    part.fade(100_000)
    torch.testing.assert_close(part.sums, SUMS / 2 * MEMORY)
    part.fade(0)
    assert not part.sums.any()


class Asks(torch.nn.Module):
    """Gives its candidates to `weigh` and keeps the answer: the half of a detector's loss that matters here."""

    num_classes = K

    def __init__(self, asked: Candidates) -> None:
        super().__init__()
        self.asked = asked

    def loss(self, output, targets, weigh):  # type: ignore[no-untyped-def]
        self.answer: Weights = weigh(self.asked)
        return {"cls": torch.zeros(())}


def test_alpha_multiplies_the_strategys_own_weights_of_foreground() -> None:
    # 2 foreground candidates of class 1, 2 of the background; alpha_1 = 3
    asked = candidates(2, 2, "aux")  # a stage that is weighed and not counted
    student, part = Asks(asked), balance(gamma2=0.5)
    own = Weights(cls=torch.tensor([0.5, 0.25, 0.9, 0.6]), learn_quality=False)
    part.loss(student, None, [], torch.tensor([7.0, 3.0, 7.0]), lambda c: own)  # type: ignore[arg-type]
    assert student.answer.cls is not None
    assert student.answer.box is not None
    assert student.answer.cls.tolist() == pytest.approx([1.5, 0.75, 0.9, 0.6])
    assert student.answer.box.tolist() == [3.0, 3.0, 1.0, 1.0]
    assert not student.answer.learn_quality
    assert torch.equal(part.sums, SUMS)


@pytest.mark.parametrize("stage", ["rpn", "encoder"])
def test_candidates_without_a_class_keep_their_weights(stage: str) -> None:
    student, part = Asks(candidates(2, 2, stage)), balance(gamma2=0.5)
    own = Weights(box=torch.full((4,), 0.5))
    part.loss(student, None, [], torch.full((K,), 3.0), lambda c: own)  # type: ignore[arg-type]
    assert student.answer is own
    assert torch.equal(part.sums, SUMS)


# ---- inside LER/PRC


@pytest.mark.parametrize("name", TAU)
def test_off_by_default_and_then_nothing_but_ler_prc(name: str) -> None:
    on_queries = name == "deformable_detr"
    s = strategy("prc", name, {} if on_queries else GAUSSIAN, tau=TAU[name], **({"ler": False} if on_queries else {}))
    assert not s.balance.active
    assert s.by_class() == {}
    torch.manual_seed(0)
    out = s(batch(), step=0)
    assert "pseudo/alpha_max" not in out.stats
    assert not s.balance.sums.any()
    assert s.balance.thresholds(TAU[name]).tolist() == pytest.approx([TAU[name]] * K)


@pytest.mark.parametrize("name", TAU)
def test_certainty_is_p_alone(name: str) -> None:
    """s_loc <= 0.5 in the place of v would hold every class below 1."""
    s = prc(name, **RPL).eval()  # no dropout
    labeled = batch().labeled
    output = s.student_output(labeled)
    asked: list[Candidates] = []
    torch.manual_seed(3)
    s.student.loss(output, labeled.targets, lambda c: asked.append(c) or Weights())
    judged = next(c for c in asked if c.stage in ("dense", "roi", "query"))
    labels, p = foreground_certainty(s.student, output, judged, with_quality=False)
    torch.manual_seed(3)
    on_labeled(s, batch())
    expected = torch.zeros(2, K).index_add_(1, labels, torch.stack([p, torch.ones_like(p)]))
    torch.testing.assert_close(s.balance.sums, expected, rtol=1e-4, atol=1e-5)
    assert expected[1].sum() > 0


def test_class_weights_multiply_the_labelled_losses_of_ler() -> None:
    """The same as targets that carry them: alpha of each target's class, in the class loss and in the KL loss."""
    losses = []
    alpha = balance(gamma2=0.5).weights()
    for by_target in (False, True):
        s = prc("faster_rcnn", **({} if by_target else {"gamma2": 0.5}))
        s.balance.sums.copy_(SUMS)
        b = batch()
        if by_target:
            b.labeled.targets = [
                Instances(t.boxes, t.labels, cls_weight=alpha[t.labels], box_weight=alpha[t.labels])
                for t in b.labeled.targets
            ]
        torch.manual_seed(3)  # the samplers' draws
        losses.append(on_labeled(s, b))
    for key in ("cls", "box"):
        torch.testing.assert_close(losses[0][key], losses[1][key])
    assert alpha.max() > 1.9
    torch.manual_seed(3)
    plain = on_labeled(prc("faster_rcnn"), batch())
    assert losses[0]["box"] != plain["box"]
    assert losses[0]["rpn_box"] == plain["rpn_box"]  # its candidates have no class


@pytest.mark.parametrize("name", TAU)
def test_a_step_with_both_papers_parts(name: str) -> None:
    s = prc(name, tau=0.5, **RPL)  # FCOS: sqrt(p * centerness), 0.63 or so
    s.balance.sums.copy_(SUMS)
    out = s(batch(), step=10_000)  # the sums stay: faded by 0.999, then a step's candidates are added
    assert out.stats["pseudo/per_image"] > 0
    assert 0.4 <= out.stats["pseudo/tau_min"] < out.stats["pseudo/tau_max"] <= 0.9
    assert 0 < out.stats["pseudo/alpha_min"] < out.stats["pseudo/alpha_max"] <= 10
    assert 0 < out.stats["reliability/foreground"] < 1
    assert (s.balance.sums[1] > 0.999 * SUMS[1]).any()
    assert not s.balance.sums.requires_grad
    total = torch.stack(list(out.losses.values())).sum()
    total.backward()
    assert all(p.grad is None for p in s.teacher.parameters())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in s.student.parameters() if p.requires_grad)
    assert set(s.by_class()) == {"certainty", "tau", "alpha"}
    assert "balance.sums" in s.state_dict()


def test_each_class_has_its_own_threshold() -> None:
    """One teacher, one view: which boxes teach follows from tau_m of their class, and from nothing else."""
    s = prc("fcos", tau=0.6, gamma1=0.5)
    # The teacher is to give 0.6 or so for class 1: its threshold is 0.6 * 0.25^0.5 = 0.3 -> 0.4, or 0.6 * 1.8^0.5 = 0.8
    kept = []
    for ratio in (0.25, 1.8):
        s.balance.sums.copy_(torch.tensor([[1.0, ratio, 1.0], [1.0, 1.0, 1.0]]))
        torch.manual_seed(0)
        out = on_unlabeled(s, batch())
        scores = torch.cat([d.scores for d in s.decode(s.teacher_output(batch().weak), 0.4)])  # type: ignore[arg-type, misc]
        tau = 0.4 if ratio < 1 else 0.6 * 1.8**0.5
        assert out.stats["pseudo/per_image"] == (scores >= tau).sum().item() / 2
        kept.append(out.stats["pseudo/per_image"])
    assert kept[0] > kept[1]


@pytest.mark.parametrize("name", TAU)
def test_no_pseudo_box_and_no_label_give_a_finite_loss_and_leave_the_sums(name: str) -> None:
    options = {"ler": False} if name == "deformable_detr" else {}
    s = strategy("prc", name, {} if options else GAUSSIAN, tau=0.9, **options, **RPL)
    empty = batch()
    empty.labeled.targets = [Instances.empty(), Instances.empty()]
    out = s(empty, step=1)
    assert out.stats["pseudo/per_image"] == 0
    assert torch.isfinite(torch.stack(list(out.losses.values()))).all()
    assert not s.balance.sums.any()
    assert s.balance.weights().tolist() == [1.0] * K


def test_weights_wait_for_unlabelled_images() -> None:
    """Burn-in learns as it does without; the sums gather meanwhile."""
    losses = []
    for options in (RPL, {}):
        s = prc("fcos", **options)
        s.balance.sums.copy_(SUMS)
        b = batch()
        b.weak = b.strong = None
        losses.append(s(b, step=5).losses)
    assert all(torch.equal(losses[0][k], losses[1][k]) for k in losses[1])
    assert s.by_class() == {}


def test_what_cannot_be_is_said_in_one_sentence() -> None:
    for options, match in (({"gamma1": -0.1}, r"strategy\.gamma1"), ({"max_weight": 0.5}, r"strategy\.max_weight")):
        with pytest.raises(UserError, match=match) as error:
            prc("fcos", **options)
        assert "\n" not in str(error.value)
