import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssod.ops.bucket import BucketCodec
from ssod.ops.codecs import DeltaGIoUCodec, GaussianCodec, GIoUCodec, L1Codec

CODECS = {
    "l1": L1Codec(),
    "l1_roi": L1Codec(weights=(10, 10, 5, 5)),
    "giou": GIoUCodec(),
    "giou_deltas": DeltaGIoUCodec(weights=(10, 10, 5, 5)),
    "gaussian": GaussianCodec(),
    "bucket": BucketCodec(30, scale=4),
}
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
    if quality is not None:
        assert quality.item() == pytest.approx({"gaussian": 0.5, "bucket": 1}[name], abs=1e-4)  # both are certain


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
    codes = codec.start().repeat(4, 1).requires_grad_()
    optimizer = torch.optim.Adam([codes], lr=0.05, betas=(0.0, 0.9))
    for step in range(1000):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 1000)
        optimizer.zero_grad()
        codec.loss(codes, anchors, boxes).backward()
        assert torch.isfinite(codes.grad).all()
        optimizer.step()
    assert (codec.decode(codes, anchors)[0] - boxes).abs().max() < 0.3


@pytest.mark.parametrize("codec", [c for k, c in CODECS.items() if k != "giou"], ids=[k for k in CODECS if k != "giou"])
def test_first_boxes_are_the_anchors(codec):
    anchors = torch.tensor([[0.0, 0, 32, 32], [-8, 4, 100, 12]])
    boxes, quality = codec.decode(codec.start().repeat(2, 1), anchors)
    torch.testing.assert_close(boxes, anchors, atol=1e-3, rtol=0)
    assert quality is None or ((quality > 0.2) & (quality < 0.6)).all()  # neither hopeless nor sure


def test_first_boxes_of_points_reach_one_stride_to_each_side():
    boxes, _ = GIoUCodec().decode(GIoUCodec().start(), torch.tensor([[4.0, 4, 12, 12]]))
    assert boxes.tolist() == [[0, 0, 16, 16]]


def test_giou_of_deltas_by_hand():
    # codes 0 are the anchor; hull 20 x 10, union = 150, overlap 50
    anchor, box = torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([[5.0, 0, 20, 10]])
    loss = DeltaGIoUCodec().loss(torch.zeros(1, 4), anchor, box, torch.tensor([0.5]))
    assert loss.item() == pytest.approx(0.5 * (1 - 50 / 200), rel=1e-5)


def test_gaussian_by_hand():
    # an anchor of 20 x 10: one unit is 2 px across and 1 px down
    anchor, box = torch.tensor([[0.0, 0, 20, 10]]), torch.tensor([[1.0, 3, 20, 9]])
    s = [0.0, math.log(4), 1.0, -1.0]
    # errors 0.5, 3, 0, 1: e^2 / 2 = 0.125, e - 1/2 = 2.5, 0, 0.5; times exp(-s) plus s / 2
    expected = 0.125 + (2.5 / 4 + math.log(4) / 2) + 0.5 + (0.5 * math.e - 0.5)
    codes = torch.tensor([[0.0, 0, 0, 0, *s]])
    codec = GaussianCodec()
    assert codec.encode(box, anchor)[0, :4].tolist() == pytest.approx([0.5, 3, 0, -1])
    assert codec.loss(codes, anchor, box, torch.tensor([2.0])).item() == pytest.approx(2 * expected, rel=1e-5)
    assert codec.loss(codes, anchor, box, torch.tensor([2.0]), False).item() == pytest.approx(2 * 3.125, rel=1e-5)
    mean = (1 + 4 + math.e + 1 / math.e) / 4
    assert codec.decode(codes, anchor)[1].item() == pytest.approx(1 - 1 / (1 + math.exp(-mean)), rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.floats(-6, 6), st.sampled_from([-1.0, 1.0]))
def test_gaussian_loss_is_smooth_where_its_halves_meet(s, sign):
    anchor = torch.tensor([[0.0, 0, 10, 10]])  # one unit is 1 px

    def at(error):
        codes = torch.tensor([[sign * error, 0, 0, 0, s, 0, 0, 0]], requires_grad=True)
        loss = GaussianCodec().loss(codes, anchor, anchor)
        return loss, torch.autograd.grad(loss, codes)[0][0, [0, 4]]

    below, gradient_below = at(1 - 1e-4)
    above, gradient_above = at(1 + 1e-4)
    height = math.exp(-s)
    assert below.item() == pytest.approx(height * (1 - 1e-4) ** 2 / 2 + s / 2, abs=1e-5 * (1 + height))  # Eq. 8
    assert above.item() == pytest.approx(height * (1 + 1e-4 - 0.5) + s / 2, abs=1e-5 * (1 + height))  # Eq. 10
    torch.testing.assert_close(gradient_below, gradient_above, atol=3e-4 * (1 + height), rtol=0)
    assert gradient_above[0].item() == pytest.approx(sign * height, rel=1e-4)


def test_pseudo_boxes_teach_no_variance():
    anchor, box = torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([[1.0, 3, 20, 9]])
    codes = torch.zeros(1, 8, requires_grad=True)
    GaussianCodec().loss(codes, anchor, box, learn_quality=False).backward()
    assert codes.grad[0, :4].abs().min() > 0
    assert codes.grad[0, 4:].abs().max() == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-8, 4), min_size=4, max_size=4), st.floats(0.1, 4))
def test_quality_of_gaussian_falls_with_the_variance(s, more):
    anchor = torch.tensor([[0.0, 0, 10, 10]])
    lower, higher = (torch.tensor([[0.0] * 4 + [x + d for x in s]]) for d in (0, more))
    first, second = (GaussianCodec().decode(c, anchor)[1].item() for c in (lower, higher))
    assert 0 <= second <= first <= 0.5
    assert first > 0


def test_extreme_codes_stay_finite():
    anchor = torch.tensor([[0.0, 0, 10, 10]])
    for codec in CODECS.values():
        codes = torch.full((1, codec.dim), 300.0, requires_grad=True)
        loss = codec.loss(codes, anchor, anchor)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(codes.grad).all()
        boxes, quality = codec.decode(codes.detach(), anchor)
        assert (boxes[:, 2:] >= boxes[:, :2]).all()
        assert quality is None or 0 <= quality.item() <= 1
