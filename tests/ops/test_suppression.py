"""NMS of a batch: the fixed point that a GPU takes is the greedy choice, image by image and level by level."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssod.ops import near_pairs, suppression
from ssod.ops.suppression import _batch_together, _levels_together, _one_by_one, nms_batch, nms_levels


def scene(seed: int, images: int, count: int, side: float = 60.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Crowded boxes: boxes, scores (with ties), groups and valid."""
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(images, count, 2, generator=g) * side
    boxes = torch.cat([corner, corner + 5 + torch.rand(images, count, 2, generator=g) * 30], dim=2)
    scores = torch.randint(0, count // 2, (images, count), generator=g) / count
    return (
        boxes,
        scores,
        torch.randint(0, 3, (images, count), generator=g),
        torch.rand(images, count, generator=g) > 0.3,
    )


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.7])
@pytest.mark.parametrize("most", [1000, 7])
def test_all_images_at_once_are_those_one_by_one(threshold: float, most: int) -> None:
    given = scene(int(10 * threshold), 3, 120)
    given[3][1] = False  # an image without any box
    together, single = (f(*given, threshold, most) for f in (_batch_together, _one_by_one))
    assert [t.tolist() for t in together] == [s.tolist() for s in single]
    assert len(single[1]) == 0
    assert len(single[0]) > 5
    assert [t.tolist() for t in nms_batch(*given, threshold, most)] == [s.tolist() for s in single]


@pytest.mark.parametrize("limit", [100, 0.4])
def test_levels_of_several_lengths_are_groups(limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_pairs, "MOST", limit)
    monkeypatch.setattr(suppression, "IN_CACHE", 300)  # two images at once, then one
    boxes, scores, _, valid = scene(1, 3, 150)
    lengths = [80, 50, 20]
    scores = torch.cat([s.sort(dim=1, descending=True).values for s in scores.split(lengths, dim=1)], dim=1)
    groups = torch.arange(3).repeat_interleave(torch.tensor(lengths)).expand(3, -1)
    single = _one_by_one(boxes, scores, groups, valid, 0.5, 60)
    together = _levels_together(boxes, scores, lengths, valid, 0.5, 60)
    assert [t.tolist() for t in together] == [s.tolist() for s in single]
    assert [t.tolist() for t in nms_levels(boxes, scores, lengths, valid, 0.5, 60)] == [s.tolist() for s in single]


def test_a_chain_longer_than_the_passes_is_settled() -> None:
    count = 120  # each box suppresses the next one: every other is kept
    x = torch.arange(count) * 4.0
    boxes = torch.stack([x, torch.zeros(count), x + 10, torch.full((count,), 10.0)], dim=1)[None]
    scores = torch.linspace(1, 0.1, count)[None]
    everyone = torch.ones(1, count, dtype=torch.bool)
    (kept,) = _batch_together(boxes, scores, torch.zeros(1, count, dtype=torch.int64), everyone, 0.3, count)
    assert kept.tolist() == list(range(0, count, 2))


def test_too_many_boxes_are_taken_image_by_image(monkeypatch: pytest.MonkeyPatch) -> None:
    given = scene(3, 2, 60)
    expected = [t.tolist() for t in _batch_together(*given, 0.5, 60)]
    monkeypatch.setattr(suppression, "LARGEST", 10)
    asked = []
    monkeypatch.setattr(suppression, "_one_by_one", lambda *all_: asked.append(1) or _one_by_one(*all_))
    assert [t.tolist() for t in _batch_together(*given, 0.5, 60)] == expected
    assert asked == [1]


@pytest.mark.parametrize("size", [1, 20, 40, 41, 59, 60, 100])
def test_more_boxes_than_are_compared_at_first(size: int) -> None:
    boxes, scores, groups, valid = scene(3, 3, 60)
    valid[:] = torch.arange(60) % 3 > 0  # 40 of each image ...
    valid[1, 1:] = False  # ... but of one
    expected = [t.tolist() for t in _one_by_one(boxes, scores, groups, valid, 0.5, 60)]
    assert [t.tolist() for t in _batch_together(boxes, scores, groups, valid, 0.5, 60, size)] == expected


def test_no_box_at_all() -> None:
    boxes, scores, groups, _ = scene(2, 2, 10)
    nobody = torch.zeros(2, 10, dtype=torch.bool)
    for found in (f(boxes, scores, groups, nobody, 0.5, 5) for f in (_batch_together, nms_batch)):
        assert [len(f) for f in found] == [0, 0]
    assert [len(f) for f in _levels_together(boxes, scores, [6, 4], nobody, 0.5, 5)] == [0, 0]
