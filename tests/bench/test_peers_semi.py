"""Both sides of the semi-supervised benchmark do the same work: the same weights give the same pseudo boxes."""

from __future__ import annotations

import pytest
import torch
from peers import DETECTORS, IOU, MAX_DET, set_limits, their_pixels
from peers_semi import BOXES, find, flipped, make_semi_step, mirrored, pair_of, threshold, view_of

from ssod.ops.views import into_view

SIZE = 128


@pytest.fixture(params=DETECTORS)
def sides(request):
    if request.param == "deformable_detr":
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    peer, student = pair_of(request.param, SIZE, "cpu")
    return request.param, peer.eval(), student.eval()


def test_pseudo_boxes(sides):
    name, peer, student = sides
    images = torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8)
    tau = threshold(student, images, IOU[name])
    set_limits(peer, name, tau)
    with torch.no_grad():
        found = find(peer, name, their_pixels(name, images), tau)
    mine = student(images, conf=tau, iou=IOU[name], max_det=MAX_DET)
    assert sum(map(len, mine)) == BOXES * len(images)
    for a, b in zip(found, mine, strict=True):
        torch.testing.assert_close(a.scores, b.scores, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(a.boxes, b.boxes, atol=0.05, rtol=1e-3)
        assert torch.equal(a.labels, b.labels)
    weak = view_of(images)
    for a, b in zip(found, into_view(mine, weak, mirrored(weak)), strict=True):
        torch.testing.assert_close(flipped(a, SIZE).boxes.clamp(0, SIZE), b.boxes, atol=0.05, rtol=1e-3)


@pytest.mark.parametrize("who", ["ours", "theirs"])
def test_a_step_in_half_precision(who):
    """Of the detector of theirs that finds boxes in half precision, which it does not take as targets."""
    make_semi_step("faster_rcnn", who, "bf16 channels_last" if who == "theirs" else "bf16", 64, 1)()
