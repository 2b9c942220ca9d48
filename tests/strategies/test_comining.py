"""Co-mining: what is mined by hand, who teaches whom, which images are mined, and what each detector makes of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from small import OPTIONS, SIZE, K, detector, strategy, view

from ssod.errors import UserError
from ssod.ops.boxes import iou_matrix
from ssod.ops.views import into_view
from ssod.strategies.comining import confident, exchanged, joined, statistics, unannotated
from ssod.structures import DenseOutput, Instances, Pyramid, SemiBatch, SlotOutput, View

BOXES = [[4.0, 4, 30, 40], [30, 20, 60, 60]]
TAU = {"fcos": 0.0099, "retinanet": 0.0099, "faster_rcnn": 0.25, "deformable_detr": 0.01}  # what untrained ones reach


def sparse(complete: list[bool] | None = None, flip: bool = False) -> View:
    """Two images of noise in two views: the second one brighter, or mirrored. The first image has BOXES."""
    first, second = view(1, BOXES), view(1, BOXES, flip=flip)
    first.complete = second.complete = complete
    if flip:
        mirrored = torch.tensor([[SIZE - x2, y1, SIZE - x1, y2] for x1, y1, x2, y2 in BOXES])
        second.targets[0] = second.targets[0].with_boxes(mirrored)
    else:
        second.images = second.images // 2 + 100
    return View.cat([first, second])


def rows_of(v: View, rows: slice) -> View:
    complete = None if v.complete is None else v.complete[rows]
    return View(v.images[rows], v.sizes[rows], v.matrices[rows], v.targets[rows], v.indices[rows], complete)


def halves(v: View) -> tuple[View, View]:
    half = len(v) // 2
    return rows_of(v, slice(half)), rows_of(v, slice(half, None))


def boxes_of(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32).view(-1, 4)


# ---- mining, by hand


def dense_of(probabilities: torch.Tensor, boxes: torch.Tensor, middle: torch.Tensor | None) -> DenseOutput:
    """What RetinaNet or FCOS says: P anchors that are the boxes themselves, class probabilities [P, K], centerness."""
    count = len(boxes)
    codes = torch.zeros(1, count, 4)
    if middle is not None:  # FCOS: half the anchor's side to each of its sides
        codes += 0.5
    quality = None if middle is None else middle.logit()[None]
    pyramid = Pyramid({}, (100, 100), torch.full((1, 2), 100))
    return DenseOutput(probabilities.logit()[None], codes, boxes, {8: slice(0, count)}, pyramid, quality)


def test_steps_1_and_2_on_retinanet() -> None:
    # tau 0.6: anchor 2 falls. NMS at 0.5, by class: anchor 1 overlaps anchor 0 by 90 / 110 = 0.82, has its class and a
    # lower score: it falls. Anchor 3 overlaps anchor 0 likewise, but is of class 1. Anchor 4 overlaps it by
    # 60 / 140 = 0.43: it stays.
    boxes = boxes_of([0, 0, 10, 10], [1, 0, 11, 10], [50, 50, 60, 60], [1, 0, 11, 10], [4, 0, 14, 10])
    p = torch.full((5, K), 0.01)
    p[[0, 1, 2, 3, 4], [0, 0, 0, 1, 0]] = torch.tensor([0.9, 0.8, 0.59, 0.7, 0.61])
    (found,) = confident(detector("retinanet"), dense_of(p, boxes, None), 0.6, 0.5, 100)
    assert found.labels.tolist() == [0, 1, 0]
    torch.testing.assert_close(found.boxes, boxes[[0, 3, 4]])
    assert found.scores is not None
    assert found.scores.tolist() == pytest.approx([0.9, 0.7, 0.61])
    (few,) = confident(detector("retinanet"), dense_of(p, boxes, None), 0.6, 0.5, 2)
    assert few.labels.tolist() == [0, 1]


def test_fcos_holds_tau_against_the_class_score_and_ranks_by_centerness_too() -> None:
    # tau 0.5. Point 0: p 0.6, centerness 0.1, ranked by sqrt(0.06) = 0.245; point 1, same place but for 1 px: p 0.55,
    # centerness 0.8, sqrt(0.44) = 0.663, so that point 0 falls in the NMS (IoU 0.82). Point 2: p 0.45, centerness 1
    # (sqrt: 0.67): its class score is too low. Point 3: p 0.51, centerness 0.04, sqrt(0.0204) = 0.143: it stays.
    boxes = boxes_of([0, 0, 10, 10], [1, 0, 11, 10], [50, 50, 60, 60], [80, 80, 90, 90])
    p = torch.full((4, K), 0.01)
    p[:, 0] = torch.tensor([0.6, 0.55, 0.45, 0.51])
    middle = torch.tensor([0.1, 0.8, 0.9999, 0.04])
    (found,) = confident(detector("fcos"), dense_of(p, boxes, middle), 0.5, 0.6, 100)
    torch.testing.assert_close(found.boxes, boxes[[1, 3]])
    assert found.scores is not None
    assert found.scores.tolist() == pytest.approx([0.44**0.5, 0.0204**0.5], rel=1e-4)


def test_queries_are_suppressed_by_class() -> None:
    # cxcywh of 100 px: queries 0 and 1 overlap by 90 / 110 = 0.82 in class 2; query 2 likewise, of class 0 (0.65); the
    # other classes of all queries, and query 3, are below tau. The last decoder layer counts.
    places = torch.tensor(
        [[0.05, 0.05, 0.1, 0.1], [0.06, 0.05, 0.1, 0.1], [0.06, 0.05, 0.1, 0.1], [0.5, 0.5, 0.1, 0.1]]
    )
    p = torch.full((4, K), 0.01)
    p[[0, 1, 2, 3], [2, 2, 0, 0]] = torch.tensor([0.8, 0.9, 0.65, 0.55])
    logits = torch.stack([torch.zeros(4, K), p.logit()])[:, None]  # [L, B, Q, K]
    pyramid = Pyramid({}, (100, 100), torch.full((1, 2), 100))
    output = SlotOutput(logits, places.expand(2, 1, 4, 4), torch.zeros(1, 4, 8), pyramid)
    (found,) = confident(detector("deformable_detr"), output, 0.6, 0.5, 100)
    assert found.labels.tolist() == [2, 0]
    torch.testing.assert_close(found.boxes, boxes_of([1, 0, 11, 10], [1, 0, 11, 10]))


def test_step_3_drops_annotated_objects() -> None:
    # IoU with the annotated box of class 1, 10 x 10 at (0, 0): shifted by 4, 60 / 140 = 0.429 > 0.4: known. By 5,
    # 50 / 150 = 0.333: new. The same place with class 0: new.
    annotated = Instances(boxes_of([0, 0, 10, 10]), torch.tensor([1]))
    boxes = boxes_of([4, 0, 14, 10], [5, 0, 15, 10], [0, 0, 10, 10])
    found = Instances(boxes, torch.tensor([1, 1, 0]), torch.tensor([0.9, 0.8, 0.7]))
    left, lower, all_new, none = (
        unannotated([found] * 3 + [found[:0]], [annotated, annotated, Instances.empty(), annotated], bound)[i]
        for i, bound in enumerate((0.4, 0.3, 0.4, 0.4))
    )
    torch.testing.assert_close(left.boxes, boxes[1:])
    assert len(lower) == 1
    assert len(all_new) == 3
    assert len(none) == 0


def test_equation_1_is_a_union() -> None:
    annotated = Instances(boxes_of([0, 0, 10, 10]), torch.tensor([1]))
    mined = Instances(boxes_of([20, 0, 30, 10]), torch.tensor([2]), torch.tensor([0.9]), quality=torch.tensor([0.5]))
    both = joined(annotated, mined)
    assert both.boxes.tolist() == [[0, 0, 10, 10], [20, 0, 30, 10]]
    assert both.labels.tolist() == [1, 2]
    assert (both.cls_weight, both.box_weight) == (None, None)  # no weight: an ordinary box


def test_boxes_travel_between_views_of_any_geometry() -> None:
    # View b is view a at twice the size, mirrored in 128 px, then cut to 100 px: x -> 128 - 2 x, y -> 2 y. The box
    # (20, 10, 30, 20) is (68, 20, 88, 40) there; (1, 10, 11, 20) is (106, 20, 126, 40), outside of the 100 px.
    a, b = view(1), view(1)
    b.matrices = torch.tensor([[-2.0, 0, 128], [0, 2, 0], [0, 0, 1]], dtype=torch.float64).repeat(2, 1, 1)
    b.sizes = torch.full((2, 2), 100)
    found = Instances(boxes_of([20, 10, 30, 20], [1, 10, 11, 20]), torch.tensor([0, 1]), torch.tensor([0.9, 0.8]))
    there, empty = into_view([found, found[:0]], a, b)
    assert there.boxes.tolist() == [[68, 20, 88, 40]]
    assert there.scores is not None
    assert there.scores.tolist() == pytest.approx([0.9])
    assert len(empty) == 0
    assert into_view([found, found], a, a)[1].boxes.tolist() == found.boxes.tolist()  # the paper's: no other geometry


# ---- who teaches whom


def taught_by(s: Any) -> list[tuple[Any, list[Instances]]]:
    """The (output, targets) of every call of the student's loss from now on."""
    calls: list[tuple[Any, list[Instances]]] = []
    own = s.student.loss

    def loss(output: Any, targets: list[Instances]) -> dict[str, torch.Tensor]:
        calls.append((output, targets))
        return own(output, targets)

    s.student.loss = loss
    return calls


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("flip", [False, True])
def test_each_view_learns_what_the_other_found(name: str, flip: bool) -> None:
    s = strategy("comining", name, tau=TAU[name])
    taught, batch = taught_by(s), sparse([False, False], flip)
    out = s(SemiBatch(batch), 0)
    views = halves(batch)
    assert len(taught) == 2
    outputs = [output for output, _ in taught]
    found = [s.mine(o, v, [True, True]) for o, v in zip(outputs, views, strict=True)]
    count = 0
    for own, other in ((0, 1), (1, 0)):
        expected = into_view(found[other], views[other], views[own])
        for y, p, c in zip(views[own].targets, expected, taught[own][1], strict=True):
            torch.testing.assert_close(c.boxes, torch.cat([y.boxes, p.boxes]))
            assert c.labels.tolist() == y.labels.tolist() + p.labels.tolist()
            count += len(p)
    assert out.stats["mined/per_image"] == count / 4
    assert count > 0
    assert [len(f) for f in found[0]] != [len(f) for f in found[1]] or any(
        not torch.equal(a.boxes, b.boxes) for a, b in zip(*found, strict=True)
    )  # the views do not find the same, so that it matters who teaches whom
    if not flip:  # what is mined overlaps no annotated box of its class by more than theta2
        mined = taught[0][1][0]
        y, p = mined[: len(BOXES)], mined[len(BOXES) :]
        assert not ((iou_matrix(p.boxes, y.boxes) > 0.4) & (p.labels[:, None] == y.labels)).any()


def test_the_loss_is_the_sum_of_both_views_each_divided_by_its_own_count() -> None:
    s = strategy("comining", "retinanet", mine=False)
    batch = sparse([False, False])
    with torch.no_grad():
        out = s(SemiBatch(batch), 0)
        raw = s.student_output(batch)
        first, second = (
            s.student.loss(own, targets)
            for own, targets in zip(raw.split([2, 2]), (batch.targets[:2], batch.targets[2:]), strict=True)
        )
    for name in ("cls", "box"):
        assert out.losses[f"sup/{name}"].item() == pytest.approx((first[name] + second[name]).item(), rel=1e-5)


@pytest.mark.parametrize("name", ["fcos", "retinanet"])
def test_no_gradient_reaches_a_view_from_what_it_found_itself(name: str) -> None:
    """P_o moves C_a alone: to the loss of a its boxes are constants, and mining has no gradient at all."""
    s = strategy("comining", name, tau=TAU[name])
    batch = sparse([False, False])
    raw = s.student_output(batch)
    views = halves(batch)
    both = replace(raw, logits=raw.logits.detach().requires_grad_(), codes=raw.codes.detach().requires_grad_())
    outputs = [
        replace(p, logits=p.logits.detach().requires_grad_(), codes=p.codes.detach().requires_grad_())
        for p in raw.split([2, 2])
    ]
    found = s.mine(outputs[0], views[0], [True, True])
    assert sum(map(len, found)) > 0
    assert all(not f.boxes.requires_grad for f in found)
    targets = [joined(y, p) for y, p in zip(views[1].targets, into_view(found, views[0], views[1]), strict=True)]
    alone = torch.autograd.grad(
        torch.stack(list(s.student.loss(outputs[1], targets).values())).sum(), [outputs[1].logits, outputs[1].codes]
    )
    losses, _ = s.learn(both, batch, [True] * 4)
    whole = torch.autograd.grad(torch.stack(list(losses.values())).sum(), both.logits)[0]
    # the gradient of a is that of its own loss under C_a = Y + P_o, to the last bit: o's boxes are constants there
    assert torch.equal(whole[2:], alone[0])
    assert whole[:2].abs().sum() > 0
    blind = replace(both, logits=both.logits - torch.tensor([20.0, 20, 0, 0]).view(4, 1, 1))
    nothing = s.learn(blind, batch, [True] * 4)[0]
    changed = torch.autograd.grad(torch.stack(list(nothing.values())).sum(), both.logits)[0][2:]
    assert not torch.equal(changed, alone[0])  # where o finds nothing, a learns from Y alone


# ---- which images


def test_complete_images_are_not_mined() -> None:
    s = strategy("comining", "retinanet", tau=TAU["retinanet"])
    taught = taught_by(s)
    out = s(SemiBatch(sparse([True, False])), 0)
    for _, targets in taught:
        assert len(targets[0]) == len(BOXES)  # complete: what is annotated is all there is
        assert len(targets[1]) > 0
    new = sum(len(t[1]) for _, t in taught)
    assert out.stats["mined/per_image"] == new / 2  # of one image in two views
    assert out.stats["mined/share"] == 1.0
    for complete in (None, [True, True]):
        taught.clear()
        out = s(SemiBatch(sparse(complete)), 0)
        assert [len(t) for _, targets in taught for t in targets] == [2, 0, 2, 0]
        assert out.stats == {}


@pytest.mark.parametrize("name", OPTIONS)
def test_joint_is_two_views_without_mining(name: str) -> None:
    joint = strategy("comining", name, tau=TAU[name], mine=False)
    blind = strategy("comining", name, tau=1.0)  # nothing is that sure
    found = {}
    for key, s in (("joint", joint), ("blind", blind)):
        torch.manual_seed(3)
        out = s(SemiBatch(sparse([False, False])), 0)
        found[key] = {k: v.item() for k, v in out.losses.items()}
        assert out.stats == ({} if key == "joint" else {"mined/per_image": 0.0, "mined/share": 0.0})
    assert found["joint"] == found["blind"]
    assert all(torch.isfinite(torch.tensor(v)) for v in found["joint"].values())


def test_mining_may_begin_later() -> None:
    s = strategy("comining", "retinanet", tau=TAU["retinanet"], mine_from=3)
    batch = SemiBatch(sparse([False, False]), view(2), view(2, flip=True))
    before, after = s(batch, 2).stats, s(batch, 3).stats
    assert not any(k in before for k in ("mined/per_image", "mined/share"))
    assert before["mined/unlabeled/per_image"] > 0  # those wait for burn_in only: unmined they are all background
    assert after["mined/per_image"] > 0


def test_without_any_annotation_and_any_mined_box() -> None:
    for name in OPTIONS:
        s = strategy("comining", name, tau=0.99)
        batch = sparse([False, False])
        batch.targets = [Instances.empty() for _ in batch.targets]
        out = s(SemiBatch(batch), 0)
        total = torch.stack(list(out.losses.values())).sum()
        assert torch.isfinite(total)
        total.backward()
        assert all(torch.isfinite(p.grad).all() for p in s.parameters() if p.grad is not None)
        assert out.stats == {"mined/per_image": 0.0, "mined/share": 0.0}


@pytest.mark.parametrize("name", OPTIONS)
def test_unlabelled_images_beside_sparse_ones(name: str) -> None:
    s = strategy("comining", name, tau=TAU[name], weight=0.5)
    taught = taught_by(s)
    batch = SemiBatch(sparse([False, True]), view(2), view(2, flip=True))
    out = s(batch, 0)
    names = {k.removeprefix("sup/") for k in out.losses if k.startswith("sup/")}
    assert names == {k.removeprefix("unsup/") for k in out.losses if k.startswith("unsup/")}
    assert out.stats["mined/unlabeled/per_image"] > 0
    assert len(taught) == 4
    (weak_output, weak_targets), (strong_output, strong_targets) = taught[2:]
    from_weak = into_view(s.mine(weak_output, batch.weak, [True, True]), batch.weak, batch.strong)
    from_strong = into_view(s.mine(strong_output, batch.strong, [True, True]), batch.strong, batch.weak)
    for taught_boxes, expected in ((strong_targets, from_weak), (weak_targets, from_strong)):
        for t, e in zip(taught_boxes, expected, strict=True):
            torch.testing.assert_close(t.boxes, e.boxes)
    if name != "faster_rcnn":  # whose sampler draws
        weak, strong = s.student.loss(weak_output, weak_targets), s.student.loss(strong_output, strong_targets)
        for k in names:
            assert out.losses[f"unsup/{k}"].item() == pytest.approx(0.5 * (weak[k] + strong[k]).item(), rel=1e-5)


@pytest.mark.parametrize("name", OPTIONS)
def test_odd_sizes(name: str) -> None:
    s = strategy("comining", name, tau=TAU[name])
    batch = sparse([False, False])
    batch.sizes = torch.tensor([[49, 63], [64, 37], [49, 63], [64, 37]])
    taught = taught_by(s)
    out = s(SemiBatch(batch), 0)
    torch.stack(list(out.losses.values())).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in s.parameters() if p.grad is not None)
    assert out.stats["mined/per_image"] > 0
    for _, targets in taught:
        for t, (h, w) in zip(targets, batch.sizes.tolist()[:2], strict=True):
            mined = t.boxes[2:] if t is targets[0] else t.boxes
            assert (mined >= 0).all()
            assert (mined[:, 2] <= w).all()
            assert (mined[:, 3] <= h).all()


@pytest.mark.parametrize("name", OPTIONS)
def test_a_few_steps_of_training(name: str) -> None:
    s = strategy("comining", name, tau=TAU[name])
    assert s.networks() == {"student": s.student}
    optimizer = torch.optim.SGD([p for p in s.parameters() if p.requires_grad], lr=0.002, momentum=0.9)
    losses = []
    for step in range(4):
        torch.manual_seed(step)
        out = s(SemiBatch(sparse([False, False])), step)
        total = torch.stack(list(out.losses.values())).sum()
        optimizer.zero_grad()
        total.backward()
        assert all(p.grad is not None for p in s.parameters() if p.requires_grad)
        torch.nn.utils.clip_grad_norm_(s.parameters(), 10)
        optimizer.step()
        s.after_step(step)
        losses.append(total.item())
    assert losses[-1] < losses[0]


# ---- statistics, refusals


def test_statistics() -> None:
    one = Instances(boxes_of([0, 0, 9, 9], [0, 0, 5, 5]), torch.tensor([0, 1]), torch.tensor([0.9, 0.6]))
    found = statistics([one, one[:0], one[:1], one[:0]], "mined")
    # 3 boxes in 4 images, 2 of which have one; (0.9 + 0.6 + 0.9) / 3 = 0.8
    assert {k: float(v) for k, v in found.items()} == pytest.approx(
        {"mined/per_image": 0.75, "mined/share": 0.5, "mined/score": 0.8}
    )
    assert statistics([], "mined") == {}
    assert set(statistics([one[:0]], "mined")) == {"mined/per_image", "mined/share"}


def test_two_views_are_needed() -> None:
    s = strategy("comining", "fcos")
    odd = sparse()
    for bad in (view(1, BOXES), replace(odd, indices=[0, 1, 1, 0]), rows_of(odd, slice(3)), rows_of(odd, slice(1))):
        with pytest.raises(UserError, match=r"augment\.labeled gives one; set augment=comining") as error:
            s(SemiBatch(bad), 0)
        assert "\n" not in str(error.value)


def test_what_is_found_goes_to_the_other_view() -> None:
    both = sparse(flip=True)  # x -> 64 - x
    rows = [[4.0, 0, 20, 9], [1, 2, 30, 40], [0, 0, 10, 10], [5, 5, 6, 7]]
    found = [Instances(boxes_of(row), torch.tensor([i % K]), torch.tensor([0.9])) for i, row in enumerate(rows)]
    there = exchanged(found, both)
    assert [t.boxes[0].tolist() for t in there] == [
        [54, 0, 64, 10],
        [58, 5, 59, 7],
        [44, 0, 60, 9],
        [34, 2, 63, 40],
    ]
    assert [t.labels.tolist() for t in there] == [[2], [0], [0], [1]]


def test_views_of_two_sizes_learn_in_one_batch() -> None:
    """The smaller one is padded, and padding is no part of an image: no box reaches into it."""
    s = strategy("comining", "retinanet", tau=1.0).eval()
    small = view(2)
    large = view(3)
    large.images = torch.nn.functional.pad(large.images, (0, 32, 0, 64), value=7)
    both = View.cat([small, large])
    assert both.images.shape == (4, 3, SIZE + 64, SIZE + 32)
    assert both.sizes.tolist() == [[SIZE, SIZE]] * 4
    assert both.indices == [0, 1, 0, 1]
    with torch.no_grad():
        found = s.student.decode(s.student_output(both), 0.0, 0.5, 50)
    assert all(len(f) == 50 for f in found)
    assert all(((f.boxes >= 0) & (f.boxes <= SIZE)).all() for f in found)
