import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssod.ops.codecs import GIoUCodec, L1Codec

CODECS = {"l1": L1Codec(), "l1_roi": L1Codec(weights=(10, 10, 5, 5)), "giou": GIoUCodec()}
corner, side = st.floats(0, 500), st.floats(8, 400)  # a box grows at most 62.5 times


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(CODECS)), corner, corner, side, side, st.floats(0.01, 0.99), st.floats(0.01, 0.99), side)
def test_decode_undoes_encode(name, x, y, w, h, across, down, size):
    box = torch.tensor([[x, y, x + w, y + h]])
    cx, cy = x + across * w, y + down * h  # an anchor whose centre lies in the box, as assignment guarantees
    anchor = torch.tensor([[cx - size / 2, cy - size / 2, cx + size / 2, cy + size / 2]])
    codec = CODECS[name]
    decoded, quality = codec.decode(codec.encode(box, anchor), anchor)
    torch.testing.assert_close(decoded, box, atol=0.01, rtol=1e-4)
    assert quality is None


def test_l1_by_hand():
    anchor, box = torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([[5.0, 0, 25, 10]])
    # centre (5, 5) -> (15, 5): one anchor width; width 10 -> 20: ln 2
    codec = L1Codec(weights=(10, 10, 5, 5))
    assert codec.encode(box, anchor)[0].tolist() == pytest.approx([10, 0, 5 * math.log(2), 0])
    # codes 0: errors 10 and 3.4657, smooth L1 beyond beta = 1/9 is error - beta / 2
    loss = codec.loss(torch.zeros(1, 4), anchor, box, torch.tensor([2.0]))
    assert loss.item() == pytest.approx(2 * (10 + 3.465736 - 2 / 18), rel=1e-5)


def test_l1_growth_is_bounded():
    boxes, _ = L1Codec().decode(torch.full((1, 4), 1e4), torch.tensor([[0.0, 0, 16, 16]]))
    assert torch.isfinite(boxes).all()
    assert (boxes[0, 2] - boxes[0, 0]).item() == pytest.approx(1000, rel=1e-3)


def test_giou_by_hand():
    anchor = torch.tensor([[4.0, 4, 12, 12]])  # centre (8, 8), side 8
    boxes, _ = GIoUCodec().decode(torch.tensor([[0.5, 1, 2, -3]]), anchor)
    assert boxes.tolist() == [[4, 0, 24, 8]]  # a negative distance counts as 0
    assert GIoUCodec().loss(torch.ones(1, 4), anchor, torch.tensor([[0.0, 0, 16, 16]])).item() == pytest.approx(
        0, abs=1e-5
    )


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_the_loss_of_nothing_is_zero_and_keeps_the_graph(codec):
    codes = torch.zeros(0, codec.dim, requires_grad=True)
    loss = codec.loss(codes, torch.zeros(0, 4), torch.zeros(0, 4))
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_gradients_lead_to_the_box(codec):
    anchors = torch.tensor([[0.0, 0, 32, 32]]).repeat(4, 1)
    boxes = torch.tensor([[2.0, 3, 40, 50], [0, 0, 20, 30], [10, 10, 24, 24], [-5, -9, 60, 70]])
    codes = torch.full((4, codec.dim), 0.2, requires_grad=True)
    first = None
    for _ in range(400):
        loss = codec.loss(codes, anchors, boxes)
        first = first or loss.item()
        (grad,) = torch.autograd.grad(loss, codes)
        assert torch.isfinite(grad).all()
        codes = (codes - 0.02 * grad).detach().requires_grad_()
    assert loss.item() < 0.2 * first
