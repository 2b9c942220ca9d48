import pytest
import torch
from torchvision.ops import generalized_box_iou_loss

from ssod.ops.boxes import area, centers, clip, distances, giou_loss, iou_matrix, nms, not_smaller, ordered


def test_area_and_centers():
    boxes = torch.tensor([[1.0, 2, 4, 8]])  # 3 x 6
    assert area(boxes).tolist() == [18]
    assert centers(boxes).tolist() == [[2.5, 5]]


def test_iou_matrix_by_hand():
    a = torch.tensor([[0.0, 0, 2, 2], [5, 5, 5, 5]])
    b = torch.tensor([[1.0, 1, 3, 3], [0, 0, 2, 2], [5, 5, 5, 5]])
    # first pair: intersection 1, union 4 + 4 - 1 = 7; two empty boxes have no union: 0, not NaN
    assert iou_matrix(a, b).tolist() == [[pytest.approx(1 / 7), 1, 0], [0, 0, 0]]


def test_iou_matrix_of_a_batch():
    a, b = torch.rand(3, 5, 4).sort(-1).values, torch.rand(3, 2, 4).sort(-1).values
    assert torch.equal(iou_matrix(a, b)[1], iou_matrix(a[1], b[1]))


def test_giou_loss_by_hand():
    a, b = torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([[2.0, 0, 3, 1]])
    # no overlap, union 2, hull 3 x 1: GIoU = 0 - (3 - 2) / 3, loss = 4 / 3
    assert giou_loss(a, b).item() == pytest.approx(4 / 3, abs=1e-5)
    assert giou_loss(a, a).item() == pytest.approx(0, abs=1e-5)


def test_giou_loss_equals_torchvision():
    torch.manual_seed(0)
    a, b = (torch.cat([p, p + torch.rand(50, 2) * 20], 1) for p in torch.rand(2, 50, 2) * 30)
    torch.testing.assert_close(giou_loss(a, b), generalized_box_iou_loss(a, b))


def test_clip_takes_one_size_per_image():
    boxes = torch.tensor([[[-3.0, -2, 50, 60]], [[1, 1, 50, 60]]])  # [2, 1, 4]
    sizes = torch.tensor([[20, 30], [40, 10]])  # (h, w)
    assert clip(boxes, sizes[:, None]).tolist() == [[[0, 0, 30, 20]], [[1, 1, 10, 40]]]


def test_not_smaller_needs_both_sides():
    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 1]])
    assert not_smaller(boxes, 2).tolist() == [True, False]


def test_nms_suppresses_within_a_group_only():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 10]])
    scores, groups = torch.tensor([0.5, 0.9, 0.1]), torch.tensor([0, 0, 1])
    assert nms(boxes, scores, groups, 0.5).tolist() == [1, 2]


def test_distances_to_the_four_sides():
    boxes, points = torch.tensor([[0.0, 0, 10, 20], [0, 0, 10, 20]]), torch.tensor([[4.0, 5], [12, -1]])
    assert distances(boxes, points).tolist() == [[4, 5, 6, 15], [12, -1, -2, 21]]  # the second point lies outside


def test_crossed_sides_change_places():
    boxes = torch.tensor([[1.0, 2, 3, 4], [3, 4, 1, 2], [3, 2, 1, 4]])
    assert ordered(boxes).tolist() == [[1, 2, 3, 4]] * 3
