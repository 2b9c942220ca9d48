"""What a strategy says of each box is what becomes of it: the same boxes, the same weights, and no trace left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import K, batch, detector, on_labeled, on_unlabeled, strategy, view
from torch import Tensor

from ssod.ops.views import into_view
from ssod.strategies import build_strategy
from ssod.strategies.balance import Balance
from ssod.strategies.base import Plan, Strategy
from ssod.strategies.comining import CoMining
from ssod.strategies.verdicts import FLOOR, Verdict, compared, scores
from ssod.structures import Instances, SemiBatch, View

Recorded = list[tuple[list[Instances], Any]]
Record = Callable[[Strategy], Recorded]


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Record:
    """The targets, and the alpha where there is one, of every loss of the student from now on."""

    def start(s: Strategy) -> Recorded:
        seen: Recorded = []
        cls, alphas = type(s.student), [None]
        loss, balanced = cls.loss, Balance.loss

        def noted(self: Any, output: Any, targets: list[Instances], weigh: Any = None) -> dict[str, Tensor]:
            seen.append((targets, alphas[-1]))
            return loss(self, output, targets, weigh)

        def weighed(self: Any, student: Any, output: Any, targets: Any, alpha: Any, own: Any = None) -> Any:
            alphas.append(alpha)
            return balanced(self, student, output, targets, alpha, own)

        monkeypatch.setattr(cls, "loss", noted)
        monkeypatch.setattr(Balance, "loss", weighed)
        return seen

    return start


def tuned(s: Strategy, **parts: float) -> Strategy:
    """The strategy with thresholds that so large a part of its untrained teacher's boxes reaches."""
    by = s.student if s.teacher is None else s.teacher
    with torch.no_grad():
        found = s.eval().label(view(2), 0.0, by)
    every = torch.cat([scores(f) for f in found]).sort(descending=True).values.tolist()
    own = {name: round(every[int(part * len(every))], 6) for name, part in parts.items()}
    s.options = s.options.model_copy(update=own)
    return s.train()


def state(s: Strategy) -> list[Any]:
    values = [v.clone() for v in s.state_dict().values()]
    return [*values, torch.get_rng_state(), *(m.training for m in s.modules())]


def same(a: list[Any], b: list[Any]) -> bool:
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a, b, strict=True))


def verdicts(s: Strategy, of: View | None, step: int = 0) -> list[Verdict]:
    """Of one view; nothing of the strategy has changed after it."""
    assert of is not None
    before = state(s)
    found = s.verdicts([of], step)
    assert same(before, state(s))
    for v in found:
        assert len(v.reasons) == len(v.found) == len(v.kept)
    return found


def learned(v: list[Verdict], b: SemiBatch, weights: str = "both") -> list[Instances]:
    """What the verdicts say that the student learns from, in the strong view."""
    assert b.weak is not None
    assert b.strong is not None
    out = []
    for one in v:
        assert one.cls_weight is not None
        assert one.box_weight is not None
        kept = one.kept if weights == "both" else (one.cls_weight if weights == "cls" else one.box_weight) > 0
        assert (one.cls_weight[~one.kept] == 0).all()
        assert (one.box_weight[~one.kept] == 0).all()
        marked = Instances(one.found.boxes, one.found.labels, None, None, one.cls_weight, one.box_weight)
        out.append(marked[kept])
    return into_view(out, b.weak, b.strong)


def assert_same_targets(
    told: list[Instances], targets: list[Instances], alpha: Tensor | None = None, with_weights: bool = True
) -> None:
    for a, b in zip(told, targets, strict=True):
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.boxes, b.boxes)
        each = torch.ones(len(b)) if alpha is None else alpha[b.labels]
        if with_weights:
            assert torch.equal(a.cls_weight, each if b.cls_weight is None else each * b.cls_weight)  # type: ignore[arg-type]
            assert torch.equal(a.box_weight, each if b.box_weight is None else each * b.box_weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("box_loss", [False, True])
def test_mean_teacher_with_one_threshold(record: Record, box_loss: bool) -> None:
    s, b = tuned(strategy("mean_teacher", "fcos", box_loss=box_loss), tau=0.3, tau_low=0.6), batch()
    said = verdicts(s, b.weak)
    seen = record(s)
    out = on_unlabeled(s, b)
    assert sum(int(v.kept.sum()) for v in said) > 3
    assert_same_targets(learned(said, b), seen[0][0])
    assert_same_targets(learned(said, b), out.used)
    for v, f in zip(said, out.found, strict=True):
        assert torch.equal(v.found.boxes[: len(f)], f.boxes), "first what the step found, then what is below"
        said_of = {r.split(" ", 2)[2].split(":")[-1] for r, k in zip(v.reasons, v.kept.tolist(), strict=True) if not k}
        doubted = [": neither" in r for r in v.reasons]
        assert sum(doubted) == len(f) - int(v.kept.sum())
        assert said_of <= {" neither object nor background", " background"}


def test_mean_teacher_with_automatic_thresholds(record: Record) -> None:
    s, b = strategy("mean_teacher", "fcos", tau_low=0.2), batch()
    s.teacher.cls_logits.weight.data *= 60  # type: ignore[union-attr, operator]
    on_labeled(s, b)
    s.label_counts.fill_(12)  # type: ignore[operator]
    before = verdicts(s, b.weak)
    seen = record(s)
    on_unlabeled(s, b)
    after = verdicts(s, b.weak)
    # Before the first step there are no statistics: those of the images themselves, which are here those of the step.
    for said in (before, after):
        assert_same_targets(learned(said, b), seen[0][0])
        assert any("its class's threshold" in r for v in said for r in v.reasons)
    tau = s.thresholds_in_force()
    assert tau is not None
    assert torch.equal(after[0].tau, tau)  # type: ignore[arg-type]
    assert 0 < sum(int(v.kept.sum()) for v in after) < sum(len(v.found) for v in after)


@pytest.mark.parametrize("box_loss", [False, True])
def test_unbiased_teacher(record: Record, box_loss: bool) -> None:
    s, b = tuned(strategy("unbiased_teacher", "retinanet", box_loss=box_loss), tau=0.3), batch()
    said = verdicts(s, b.weak)
    seen = record(s)
    on_unlabeled(s, b)
    assert_same_targets(learned(said, b), seen[0][0])
    weights = torch.cat([v.box_weight[v.kept] for v in said])  # type: ignore[index]
    assert len(weights)
    assert (weights == float(box_loss)).all()


@pytest.mark.parametrize("jitters", [0, 4])
def test_soft_teacher(record: Record, jitters: int) -> None:
    b = batch()
    s = tuned(strategy("soft_teacher", "faster_rcnn", jitters=jitters, spread=0.028), tau=0.2, candidates=0.6)
    said = verdicts(s, b.weak)
    seen = record(s)
    torch.manual_seed(0)  # what the copies of the verdict are drawn by
    on_unlabeled(s, b)
    assert_same_targets(learned(said, b, "cls"), seen[0][0], with_weights=False)
    assert_same_targets(learned(said, b, "box"), seen[1][0], with_weights=False)
    kept = {(bool(c), bool(x)) for v in said for c, x in zip(v.cls_weight, v.box_weight, strict=True)}  # type: ignore[arg-type]
    assert kept >= ({(True, False), (False, True), (False, False)} if jitters else {(True, True), (False, False)})
    assert all(
        bool(v.kept[i]) == ("teaches classes" in r or ": teaches its" in r)
        for v in said
        for i, r in enumerate(v.reasons)
    )


@pytest.mark.parametrize("threshold_on", ["p", "sqrt_pv"])
def test_rpl(record: Record, threshold_on: str) -> None:
    options: dict[str, Any] = {"threshold_on": threshold_on, "gamma1": 0.05, "gamma2": 0.6}
    bucket: dict[str, object] = {"codec": "bucket", "rank_by_quality": False}
    s, b = strategy("rpl", "fcos", bucket, **options, tau={"p": 0.5, "sqrt_pv": 0.55}[threshold_on]), batch()
    bias = {"p": [0.2, -0.2, -1.5], "sqrt_pv": [8.0, 0.0, -2.0]}[threshold_on]
    s.teacher.cls_logits.bias.data.copy_(torch.tensor(bias))  # type: ignore[union-attr, operator]
    s.balance.sums.copy_(torch.tensor([[3.0, 1.0, 0.02], [4.0, 4.0, 4.0]]))  # type: ignore[operator, union-attr]
    said = verdicts(s, b.weak)
    seen = record(s)
    on_unlabeled(s, b)
    targets, alpha = seen[0]
    assert alpha is not None
    assert len(set(alpha.tolist())) == K
    assert_same_targets(learned(said, b), targets, alpha)
    assert 0 < sum(map(len, targets)) < sum(len(v.found) for v in said)
    name = {"p": "score", "sqrt_pv": "certainty sqrt(p*v)"}[threshold_on]
    assert all(r.startswith(name) and "its class's threshold" in r for v in said for r in v.reasons)


@pytest.mark.parametrize("ler", [False, True])
def test_prc(record: Record, ler: bool) -> None:
    s, b = tuned(strategy("prc", "fcos", {"codec": "gaussian"}, ler=ler, gamma2=0.5), tau=0.3), batch()
    s.balance.sums.copy_(torch.tensor([[3.0, 1.0, 0.2], [4.0, 4.0, 4.0]]))  # type: ignore[operator, union-attr]
    said = verdicts(s, b.weak)
    seen = record(s)
    on_unlabeled(s, b)
    targets, alpha = seen[0]
    assert sum(map(len, targets)) > 3
    assert_same_targets(learned(said, b), targets, alpha)
    if ler:
        weight = torch.cat([v.box_weight / v.cls_weight for v in said])  # type: ignore[operator, arg-type]
        quality = torch.cat([v.found.quality for v in said])  # type: ignore[misc]
        kept = torch.cat([v.kept for v in said])
        torch.testing.assert_close(weight[kept], quality[kept])


def test_lsm_and_its_lower_threshold(record: Record) -> None:
    half: dict[str, object] = {"half_scale": True}
    s, b = tuned(strategy("lsm", "fcos", half), tau=0.2, alpha=0.6), batch()
    said = verdicts(s, b.weak)
    seen = record(s)
    on_unlabeled(s, b)
    (main, _), (mined, _) = seen
    assert sum(map(len, mined)) > sum(map(len, main)) > 0
    assert_same_targets(learned(said, b), mined)
    both = [["half size" not in r for r, k in zip(v.reasons, v.kept.tolist(), strict=True) if k] for v in said]
    assert_same_targets([t[torch.tensor(m)] for t, m in zip(learned(said, b), both, strict=True)], main)
    s.options = s.options.model_copy(update={"pim": False, "distill": False})
    assert_same_targets(learned(verdicts(s, b.weak), b), main)


def sparse(s: Strategy, flip: bool, partly: bool = True) -> View:
    """Two images of which the first has an annotation, at a box that the untrained student finds."""
    mine = view(5, flip=flip)
    with torch.no_grad():
        box = s.eval().label(mine, 0.0, s.student)[0][:1]
    s.train()
    mine.targets[0] = Instances(box.boxes, box.labels)
    mine.complete = [not partly, not partly]
    return mine


def test_comining_mines_what_nobody_has_annotated(record: Record) -> None:
    s = strategy("comining", "fcos")
    assert isinstance(s, CoMining)
    one, two = sparse(s, False), sparse(s, True)
    # The student's batch norm sees both views at once while it trains; verdicts are of the network as it labels.
    s.student.eval()
    with torch.no_grad():  # of FCOS the score of a detection is not what tau is held against
        tau = s.student_output(one).logits.sigmoid().flatten().quantile(0.9).item()
    s.options = s.options.model_copy(update={"tau": tau})
    said = verdicts(s, one), verdicts(s, two)
    seen = record(s)
    both = View.cat([one, two])
    s.learn(s.student_output(both), both, [True] * 4)
    for own, other, told, (targets, _) in ((one, two, said[1], seen[0]), (two, one, said[0], seen[1])):
        carried = learned(told, SemiBatch(one, other, own))
        for annotated, c, t in zip(own.targets, carried, targets, strict=True):
            assert_same_targets([c], [t[len(annotated) :]])
        assert sum(map(len, carried)) > 1
    whole = [r for v in said[0] for r in v.reasons]
    assert [sum(start in r for r in whole) > 0 for start in ("annotated box of", "nobody has", "does not reach")] == [
        True
    ] * 3


def test_comining_where_nothing_is_mined() -> None:
    s = strategy("comining", "fcos")
    partly, whole = sparse(s, False), sparse(s, False, partly=False)
    plain = s.options.model_copy(update={"tau": 0.001})
    for options, image, words in (
        ({"mine": False}, partly, "annotations alone"),
        ({"mine_from": 7}, partly, "mined from step 7"),
        ({}, whole, "counts as annotated"),
    ):
        s.options = plain.model_copy(update=options)
        for v in verdicts(s, image, 6):
            assert len(v.found)
            assert not v.kept.any()
            assert all(words in r for r in v.reasons)
    s.options = plain.model_copy(update={"mine_from": 7})
    assert verdicts(s, partly, 7)[0].kept.any()
    free = view(5)  # unlabelled: mined from the first step on that there are any
    assert verdicts(s, free, 6)[0].kept.any()


@pytest.mark.parametrize("name", ["fcos", "faster_rcnn"])
def test_sed_says_that_no_box_is_kept_or_dropped(name: str) -> None:
    s = strategy("sed", name, {"half_scale": True})
    for v in verdicts(s, batch().weak):
        assert len(v.found)
        assert not v.kept.any()
        assert v.cls_weight is v.box_weight is v.tau is None
        assert set(v.reasons) == {"sed learns from all candidates; no box is kept or dropped"}


@pytest.mark.parametrize("kind", ["mean_teacher", "rpl", "soft_teacher"])
def test_during_burn_in_it_is_the_student_that_labels(kind: str) -> None:
    on = "faster_rcnn" if kind == "soft_teacher" else "fcos"
    options = {"certainty": False} if kind == "rpl" else {}
    s = build_strategy(kind, detector(on), options, Plan(10, 4, 0.9)).train()
    with torch.no_grad():
        for p in s.student.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    image = batch().weak
    assert image is not None
    early, late = verdicts(s, image, 3), verdicts(s, image, 4)
    s.eval()
    for said, network in ((early, s.student), (late, s.teacher)):
        assert network is not None
        for v, f in zip(said, s.label(image, FLOOR, network), strict=True):
            assert torch.equal(v.found.boxes, f.boxes)
    assert not torch.equal(early[0].found.boxes[:3], late[0].found.boxes[:3])


def test_numbers_in_a_sentence_differ() -> None:
    found = Instances(torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), torch.tensor([0.43, 0.6996, 0.7]))
    kept = torch.tensor([False, False, True])
    said = compared(found, torch.full((3,), 0.7), kept, "tau", below=": background")
    assert said == [
        "score 0.43 is below tau 0.70: background",
        "score 0.6996 is below tau 0.7000: background",
        "score 0.70 reaches tau 0.70",
    ]
