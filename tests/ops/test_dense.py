import torch

from ssod.ops.assign import pad_targets
from ssod.ops.dense import best_per_level, codes_of, dense_candidates, suppress
from ssod.structures import Instances


def test_candidates_say_background_and_ignored_apart():
    targets = pad_targets([Instances(torch.rand(2, 4), torch.tensor([4, 7])), Instances.empty()])
    anchors = torch.arange(12.0).view(3, 4)
    matched, divisor = torch.tensor([[1, -1, 0], [-1, -2, -1]]), torch.tensor([2, 5])
    found = dense_candidates(matched, anchors, targets, 9, divisor)
    assert found.labels.tolist() == [7, 9, 4, 9, -1, 9]
    assert found.matched.tolist() == [1, -1, 0, -1, -1, -1]
    assert found.image.tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(found.boxes, anchors.repeat(2, 1))
    assert found.stage == "dense"
    assert found.divisor.tolist() == [2, 2, 2, 5, 5, 5]


def test_the_best_of_each_level_and_not_of_all():
    scores = torch.tensor([[[0.9, 0.8], [0.7, 0.6], [0.1, 0.3], [0.2, 0.0]]])  # [1, P = 4, K = 2]
    value, candidate, label = best_per_level(scores, {8: slice(0, 2), 16: slice(2, 4)}, 2)
    torch.testing.assert_close(value, torch.tensor([[0.9, 0.8, 0.3, 0.2]]))
    assert candidate.tolist() == [[0, 0, 2, 3]]
    assert label.tolist() == [[0, 1, 1, 0]]
    assert best_per_level(scores, {8: slice(0, 2), 16: slice(2, 4)}, 100)[0].shape == (1, 8)  # there are no more


def test_codes_of_candidates_are_float32_rows():
    codes = torch.arange(24.0).view(2, 3, 4).bfloat16()
    rows = codes_of(codes, torch.tensor([[2, 2, 0], [1, 0, 0]]))
    assert rows.dtype == torch.float32
    assert rows[:, :, 0].tolist() == [[8, 8, 0], [16, 12, 12]]


def test_suppression_is_by_class_and_keeps_the_quality_of_what_is_kept():
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 9], [50, 50, 60, 60], [80, 80, 90, 90]]])
    scores = torch.tensor([[0.5, 0.9, 0.8, 0.7, 0.1]])
    labels = torch.tensor([[1, 1, 2, 1, 1]])
    quality = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5]])
    (found,) = suppress(boxes, scores, labels, quality, conf=0.2, iou=0.5, max_det=10)
    torch.testing.assert_close(found.scores, torch.tensor([0.9, 0.8, 0.7]))  # 0.5 is suppressed, 0.1 below conf
    torch.testing.assert_close(found.quality, torch.tensor([0.2, 0.3, 0.4]))
    (two,) = suppress(boxes, scores, labels, None, conf=0.2, iou=0.5, max_det=2)
    assert two.labels.tolist() == [1, 2]
    assert two.quality is None
