import math

import pytest
import torch
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from ssod.ops.assign import assign_iou, assign_points, pad_targets, sample_balanced
from ssod.structures import Instances


def test_pad_targets_keeps_a_row_without_any_box():
    padded = pad_targets([Instances.empty(), Instances.empty()])
    assert padded.boxes.shape == (2, 1, 4)
    assert not padded.valid.any()
    assert padded.cls_weight is None


def test_pad_targets_fills_weights_that_only_some_images_have():
    box = torch.tensor([[0.0, 0, 4, 4]])
    weighted = Instances(box, torch.tensor([1]), box_weight=torch.tensor([0.25]))
    plain = Instances(box.repeat(2, 1), torch.tensor([0, 2]))
    padded = pad_targets([weighted, plain])
    assert padded.labels.tolist() == [[1, 0], [0, 2]]
    assert padded.valid.tolist() == [[True, False], [True, True]]
    assert padded.box_weight is not None
    assert padded.box_weight.tolist() == [[0.25, 0], [1, 1]]


def test_points_rules_by_hand():
    box = torch.tensor([[[0.0, 0, 100, 40]]])  # centre (50, 20)
    points = torch.tensor([[50.0, 20], [61, 20], [62, 20], [50, 40]])
    ranges = torch.tensor([[0.0, math.inf]]).expand(4, 2)
    # reach 12 px, exclusive: x = 61 is in, 62 out; (50, 40) lies 20 px below
    got = assign_points(points, torch.full((4,), 12.0), ranges, box, torch.ones(1, 1, dtype=torch.bool))
    assert got.tolist() == [[0, 0, -1, -1]]


def test_points_take_boxes_of_their_range_and_the_smallest_of_several():
    boxes = torch.tensor([[[0.0, 0, 100, 100], [40, 40, 60, 60]]])
    both = torch.ones(1, 2, dtype=torch.bool)
    points, reach = torch.tensor([[50.0, 50], [50, 50]]), torch.full((2,), 12.0)
    ranges = torch.tensor([[0.0, 64], [32, 64]])  # farthest sides are 50 and 10 px away
    assert assign_points(points, reach, ranges, boxes, both).tolist() == [[1, 0]]
    only_first = torch.tensor([[True, False]])
    assert assign_points(points, reach, ranges, boxes, only_first).tolist() == [[0, 0]]


@pytest.mark.parametrize("low_quality", [True, False])
def test_assign_iou_equals_torchvision(low_quality):
    torch.manual_seed(1)
    a = torch.rand(300, 2) * 60
    candidates = torch.cat([a, a + 5 + torch.rand(300, 2) * 30], dim=1)
    b = torch.rand(7, 2) * 60
    boxes = torch.cat([b, b + 5 + torch.rand(7, 2) * 30], dim=1)
    theirs = Matcher(0.7, 0.3, allow_low_quality_matches=low_quality)(box_iou(boxes, candidates))
    assert torch.equal(assign_iou(candidates, boxes, 0.3, 0.7, low_quality), theirs)


@pytest.mark.parametrize("low_quality", [True, False])
def test_assign_iou_of_several_images(low_quality):
    generator = torch.Generator().manual_seed(2)
    a = torch.rand(3, 90, 2, generator=generator) * 60
    candidates = torch.cat([a, a + 5 + torch.rand(3, 90, 2, generator=generator) * 30], dim=2)
    boxes = candidates[:, :5] + torch.randn(3, 5, 4, generator=generator)
    counts = [5, 2, 0]
    valid = torch.arange(5) < torch.tensor(counts)[:, None]
    together = assign_iou(candidates, boxes, 0.3, 0.7, low_quality, valid)
    assert (together[0] == 4).any()
    for b, count in enumerate(counts):
        assert torch.equal(together[b], assign_iou(candidates[b], boxes[b, :count], 0.3, 0.7, low_quality))


def test_assign_iou_without_boxes_and_with_an_empty_one():
    candidates = torch.tensor([[0.0, 0, 4, 4], [9, 9, 12, 12]])
    assert assign_iou(candidates, torch.zeros(0, 4), 0.3, 0.7, True).tolist() == [-1, -1]
    assert assign_iou(candidates, torch.tensor([[2.0, 2, 2, 2]]), 0.3, 0.7, True).tolist() == [-1, -1]


def test_sample_balanced_fills_up_with_background():
    matched = torch.tensor([[0, 0, 1, -1, -1, -1, -2, -1], [-1, -1, -2, -2, -2, -2, -2, -2]])
    take, use = sample_balanced(matched, count=4, positive_fraction=0.5)
    drawn = [matched[b, take[b][use[b]]].tolist() for b in range(2)]
    assert len(drawn[0]) == 4
    assert sum(m >= 0 for m in drawn[0]) == 2
    assert drawn[1] == [-1, -1]  # ignored candidates are never drawn
    assert len(set(take[0][use[0]].tolist())) == 4


def test_sample_balanced_is_seedable():
    matched = torch.randint(-1, 3, (2, 500))
    draws = [sample_balanced(matched, 20, 0.5, torch.Generator().manual_seed(s))[0] for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
