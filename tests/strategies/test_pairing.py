"""Candidates that two networks speak of: who is paired with whom, in which pixels, with which gradient."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from small import SIZE, K, detector, view
from torch import Tensor

from ssod.detectors.base import Detector
from ssod.ops.half import half_size
from ssod.ops.places import same_place
from ssod.ops.set_matching import CostWeights, pair_costs
from ssod.strategies.pairing import REGIONS, Paired, pair
from ssod.structures import Pyramid, SlotOutput, View

ALL = ("fcos", "retinanet", "faster_rcnn", "deformable_detr")
STAGES = {
    "fcos": ["dense"],
    "retinanet": ["dense"],
    "faster_rcnn": ["rpn", "roi"],
    "deformable_detr": ["query", "encoder"],
}
FLIP = torch.tensor([[-1.0, 0, SIZE], [0, 1, 0], [0, 0, 1]], dtype=torch.float64).repeat(2, 1, 1)
AWAY = torch.tensor([[1.0, 0, 1000], [0, 1, 0], [0, 0, 1]], dtype=torch.float64).repeat(2, 1, 1)


def two(name: str, **options: object) -> tuple[Detector, Detector]:
    """A learner and a judge that differ, both without dropout and with fixed batch norms."""
    learner, judge = detector(name, **options).eval(), detector(name, **options).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in judge.parameters():
            p += 0.03 * torch.randn(p.shape, generator=generator)
    return learner, judge


def raw(model: Detector, seen: View) -> object:
    return model.head(model.features(seen.images, seen.sizes))


def raw_half(model: Detector, seen: View) -> object:
    images, sizes = half_size(seen)
    return model.head(model.features(images, sizes, shift=1))


def everything(p: Paired) -> Tensor:
    return torch.arange(len(p.image))


@pytest.mark.parametrize("name", ALL)
def test_stages_shapes_and_who_gets_a_gradient(name: str) -> None:
    learner, judge = two(name)
    pairs = pair(learner, raw(learner, view(2)), judge, raw(judge, view(3)), None)
    assert [p.stage for p in pairs] == STAGES[name]
    total = torch.zeros(())
    for p in pairs:
        width = {"roi": K + 1, "rpn": 1, "encoder": 1}.get(p.stage, K)
        assert p.exclusive == (p.stage == "roi")
        assert p.logits.shape == p.target.shape == (len(p.image), width)
        assert p.image.unique().tolist() == [0, 1]
        assert not p.target.requires_grad
        boxes, target = p.boxes(everything(p)[::2])
        assert boxes.shape == target.shape == (len(p.image[::2]), 4)
        assert boxes.requires_grad
        assert not target.requires_grad
        assert (p.quality is not None) == (name == "fcos")
        total = total + p.logits.sum() + boxes.sum() + (0 if p.quality is None else p.quality.sum())
        if p.target_quality is not None:
            assert not p.target_quality.requires_grad
    total.backward()
    assert all(p.grad is None for p in judge.parameters())
    used = {n.split(".")[0] for n, p in learner.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    heads = {"faster_rcnn": {"rpn_logits", "rpn_codes", "roi_logits", "roi_codes"}}
    own = {"cls_heads", "box_heads"} if name == "deformable_detr" else {"cls_logits", "box_codes"}
    assert used >= heads.get(name, own) | {"backbone"}


@pytest.mark.parametrize("name", ["fcos", "retinanet"])
def test_one_geometry_pairs_candidate_by_candidate_without_a_copy(name: str) -> None:
    learner, judge = two(name)
    output, seen = raw(learner, view(2)), raw(judge, view(3))
    (p,) = pair(learner, output, judge, seen, None)
    assert torch.equal(p.logits, output.logits.flatten(0, 1))
    assert torch.equal(p.target, seen.logits.flatten(0, 1))
    assert p.logits.data_ptr() == output.logits.data_ptr()
    count = len(output.anchors)
    rows = torch.tensor([0, 7, count - 1, count, 2 * count - 3])
    boxes, target = p.boxes(rows)
    for found, own, model in ((boxes, output, learner), (target, seen, judge)):
        expected = torch.cat([model.codec.decode(codes, own.anchors)[0] for codes in own.codes])[rows]
        torch.testing.assert_close(found, expected)
    assert p.image[rows].tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("size", [(64, 64), (61, 63), (33, 50)])
def test_half_and_full_size_pair_by_place(name: str, size: tuple[int, int]) -> None:
    model = detector(name, half_scale=True).eval()
    seen = view(2)
    h, w = size
    seen = replace(seen, images=seen.images[:, :, :h, :w], sizes=torch.tensor([[h, w], [h - 8, w - 3]]))
    full, half = raw(model, seen), raw_half(model, seen)
    for learner, judge in ((half, full), (full, half)):
        for p in pair(model, learner, model, judge, None):
            if p.stage in ("dense", "rpn"):
                assert torch.equal(p.logits, learner.logits.flatten(0, 1))
                assert torch.equal(p.target, judge.logits.flatten(0, 1))
            boxes, target = p.boxes(everything(p))
            assert torch.isfinite(boxes).all()
            assert torch.isfinite(target).all()
            assert len(boxes) > 0


def test_grids_that_differ_by_a_row_pair_by_place() -> None:
    learner, judge = two("fcos")
    seen = view(2)
    cut = replace(seen, images=seen.images[:, :, :55], sizes=torch.tensor([[55, SIZE]] * 2))
    output, other = raw(learner, cut), raw(judge, seen)
    (p,) = pair(learner, output, judge, other, None)
    assert len(p.image) == 2 * len(output.anchors)  # every candidate of the learner has one of the judge
    # stride 8: 7 rows of 8 cells here, 8 of 8 there; the second image's first candidate is 56 + 16 + 4 + 1 + 1 on
    torch.testing.assert_close(p.target[:56], other.logits[0, :56])
    assert torch.equal(p.target[len(output.anchors)], other.logits[1, 0])
    # level of stride 16: 4 x 4 cells in both
    torch.testing.assert_close(p.target[56:72], other.logits[0, 64:80])


@pytest.mark.parametrize("name", ["fcos", "retinanet"])
def test_a_mirrored_view(name: str) -> None:
    learner, judge = two(name)
    output, seen = raw(learner, view(2, flip=True)), raw(judge, view(2))
    (p,) = pair(learner, output, judge, seen, FLIP)
    place = same_place(output, seen, FLIP)
    centers = (output.anchors[:, :2] + output.anchors[:, 2:]) / 2
    shown = ((centers >= 0) & (centers <= SIZE)).all(1)
    assert len(p.image) == 2 * int(shown.sum())
    torch.testing.assert_close(p.target[p.image == 1], seen.logits[1, place[1, shown]])
    torch.testing.assert_close(p.logits[p.image == 1], output.logits[1, shown])
    _, target = p.boxes(everything(p))
    there = judge.codec.decode(seen.codes[0], seen.anchors)[0][place[0, shown]]
    mirrored = torch.stack([SIZE - there[:, 2], there[:, 1], SIZE - there[:, 0], there[:, 3]], 1).clamp(0, SIZE)
    torch.testing.assert_close(target[p.image == 0], mirrored, atol=1e-3, rtol=1e-5)


def test_only_what_both_views_show_is_paired() -> None:
    learner, judge = two("fcos")
    right = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    right[:, 0, 2] = 32  # the learner's left edge is the middle of the judge's view
    output, seen = raw(learner, view(2)), raw(judge, view(2))
    (p,) = pair(learner, output, judge, seen, right)
    _, target = p.boxes(everything(p))
    x = (output.anchors[:, 0] + output.anchors[:, 2]) / 2
    y = (output.anchors[:, 1] + output.anchors[:, 3]) / 2
    assert len(p.image) == 2 * int(((x <= 32) & (y <= SIZE)).sum()) < 2 * len(x)
    assert target.min() >= 0
    assert target.max() <= SIZE
    # stride 8, row 0: the learner's cells 0 to 3 are the judge's cells 4 to 7
    torch.testing.assert_close(p.target[:4], seen.logits[0, 4:8])


@pytest.mark.parametrize("name", ALL)
def test_views_without_anything_in_common(name: str) -> None:
    learner, judge = two(name)
    pairs = pair(learner, raw(learner, view(2)), judge, raw(judge, view(2)), AWAY)
    assert [p.stage for p in pairs] == STAGES[name]
    for p in pairs:
        assert len(p.image) == len(p.logits) == len(p.target) == 0
        boxes, target = p.boxes(everything(p))
        assert boxes.shape == target.shape == (0, 4)
        (p.logits.sum() + boxes.sum()).backward(retain_graph=True)


# ---- regions


def test_both_heads_read_the_judges_proposals() -> None:
    learner, judge = two("faster_rcnn")
    output, seen = raw(learner, view(2)), raw(judge, view(2))
    p = pair(learner, output, judge, seen, None)[1]
    proposals = [r[:REGIONS] for r in judge.proposals(seen)]
    assert len(p.image) == sum(map(len, proposals))
    assert torch.bincount(p.image).tolist() == [len(r) for r in proposals]
    torch.testing.assert_close(p.logits.softmax(1), torch.cat(learner.classify(output, proposals)))
    torch.testing.assert_close(p.target.softmax(1), torch.cat(judge.classify(seen, proposals)))
    # both boxes are of the class that the judge finds best
    best = [r.labels for r in judge.refine(seen, proposals)]
    boxes, target = p.boxes(everything(p))
    sizes = torch.tensor([SIZE, SIZE])
    for found, model, own in ((boxes, learner, output), (target, judge, seen)):
        expected = torch.cat([r.boxes for r in model.refine(own, proposals, best)])
        torch.testing.assert_close(found.clamp(min=0).minimum(sizes.repeat(2)), expected)


def test_regions_travel_between_views() -> None:
    learner, judge = two("faster_rcnn")
    output, seen = raw(learner, view(2, flip=True)), raw(judge, view(2))
    p = pair(learner, output, judge, seen, FLIP)[1]
    proposals = [r[:REGIONS] for r in judge.proposals(seen)]
    wide = [r[(r[:, 2] - r[:, 0]) * (r[:, 3] - r[:, 1]) >= 1] for r in proposals]  # smaller ones do not travel
    mirrored = [torch.stack([SIZE - r[:, 2], r[:, 1], SIZE - r[:, 0], r[:, 3]], 1) for r in wide]
    assert torch.bincount(p.image).tolist() == [len(r) for r in wide]
    torch.testing.assert_close(p.logits, learner.read(output, mirrored).logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(p.target, judge.read(seen, wide).logits, atol=1e-4, rtol=1e-4)


# ---- queries


def slots(logits: list[list[float]], boxes: list[list[float]]) -> SlotOutput:
    """One image of 100 x 100 pixels, one layer."""
    pyramid = Pyramid({}, (100, 100), torch.tensor([[100, 100]]))
    return SlotOutput(torch.tensor([[logits]]), torch.tensor([[boxes]]), torch.zeros(1, len(boxes), 8), pyramid)


def test_queries_are_matched_by_class_and_place() -> None:
    model = detector("deformable_detr", two_stage=False)
    a, b, c = [0.2, 0.2, 0.2, 0.2], [0.7, 0.7, 0.4, 0.4], [0.7, 0.7, 0.4, 0.4]
    mine = slots([[2.0, -3, -3], [-3, 2, -3], [-3, -3, 2]], [a, b, c])
    theirs = slots([[-3.0, -3, 2], [2, -3, -3], [-3, 2, -3]], [b, a, c])
    (p,) = pair(model, mine, model, theirs, None)
    assert p.image.tolist() == [0, 0, 0]
    assert torch.equal(p.logits, p.target)  # b and c lie alike: the class decides
    boxes, target = p.boxes(torch.tensor([0, 1]))
    torch.testing.assert_close(boxes, target)
    torch.testing.assert_close(boxes[0], torch.tensor([10.0, 10, 30, 30]))  # pixels


def test_a_network_pairs_its_queries_with_themselves() -> None:
    model = detector("deformable_detr").eval()
    output = raw(model, view(2))
    p = pair(model, output, model, output, None)[0]
    boxes, target = p.boxes(everything(p))
    torch.testing.assert_close(boxes, target)
    assert len(p.image) == output.logits.shape[1] * output.logits.shape[2]


def test_fewer_queries_on_one_side() -> None:
    model = detector("deformable_detr", two_stage=False)
    mine = slots([[2.0, -3, -3], [-3, 2, -3]], [[0.2, 0.2, 0.2, 0.2], [0.7, 0.7, 0.4, 0.4]])
    theirs = slots([[-3.0, 2, -3]], [[0.7, 0.7, 0.4, 0.4]])
    for learner, judge in ((mine, theirs), (theirs, mine)):
        (p,) = pair(model, learner, model, judge, None)
        assert p.logits.tolist() == p.target.tolist() == [[-3, 2, -3]]


def test_soft_labels_cost_what_each_class_costs() -> None:
    # p = 0.5: as object 0.25 * 0.25 * ln 2, as nothing 0.75 * 0.25 * ln 2: -0.125 ln 2 = -0.086643
    # p = 0.1: 0.25 * 0.81 * 2.302585 - 0.75 * 0.01 * 0.105361 = 0.465483; soft (0.8, 0.3): 0.070330
    logits = torch.tensor([[[0.5, 0.1]]]).logit()
    box = torch.tensor([[[0.5, 0.5, 0.2, 0.2]]])
    only_classes = CostWeights(1.0, 0.0, 0.0)
    found = pair_costs(logits, box, torch.tensor([[[0.8, 0.3]]]), box, only_classes)
    assert found.item() == pytest.approx(0.8 * -0.125 * math.log(2) + 0.3 * 0.465483, abs=1e-5)
    for label in (0, 1):
        hard = pair_costs(logits, box, torch.tensor([[label]]), box, only_classes)
        soft = pair_costs(logits, box, torch.eye(2)[label].view(1, 1, 2), box, only_classes)
        torch.testing.assert_close(hard, soft)
