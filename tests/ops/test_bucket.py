import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssod.ops.bucket import BucketCodec

# K = 4, scale 2, a candidate of 8 x 8 around (4, 4): segments of 8 px from -4 (or 12) to 4, intervals of 2 px.
CODEC = BucketCodec(4, scale=2)
ANCHOR = torch.tensor([[0.0, 0, 8, 8]])
# left 1: interval 2, in its middle, no neighbour nearer than one width; top -0.5: 1.75 intervals in, a quarter inside
# the middle of interval 1, interval 2 is the neighbour; right 9: interval 1, in its middle; bottom 13: outside
BOX = torch.tensor([[1.0, -0.5, 9, 13]])


def codes(logits=0.0, offsets=0.0):
    values = torch.zeros(1, 2, 4, 4)
    values[:, 0], values[:, 1] = logits, offsets
    return values.flatten(1)


def test_loss_by_hand():
    # logits 0: ln 2 for each of 4, 3 and 4 judged intervals; refinements 0.25 - 0.05 and 0.75 - 0.05 at the top
    loss = CODEC.loss(codes(), ANCHOR, BOX, torch.tensor([3.0]))
    assert loss.item() == pytest.approx(3 * (11 * math.log(2) + 0.2 + 0.7), rel=1e-5)


def test_what_is_taught_by_hand():
    c = codes().requires_grad_()
    CODEC.loss(c, ANCHOR, BOX).backward()
    logits, offsets = c.grad.view(2, 4, 4)
    assert torch.sign(-logits).tolist() == [[-1, -1, 1, -1], [-1, 1, 0, -1], [-1, 1, -1, -1], [0, 0, 0, 0]]
    assert torch.sign(-offsets).tolist() == [[0, 0, 0, 0], [0, 1, -1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_a_perfect_answer_costs_nothing():
    inside = torch.tensor([[1.0, -0.5, 9, 11]])
    # the neighbour is refined to the same line, though `encode` need not choose it
    assert CODEC.loss(CODEC.encode(inside, ANCHOR), ANCHOR, inside).item() == pytest.approx(0, abs=2e-3)


def test_decode_by_hand():
    values = torch.zeros(1, 2, 4, 4)
    values[0, 0] = torch.tensor([[0.0, 0, 2, 0], [3, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 4]])
    values[0, 1] = torch.tensor([[9.0, 9, 0.25, 9], [-0.5, 9, 9, 9], [9, 0.5, 9, 9], [9, 9, 9, 0]])
    boxes, quality = CODEC.decode(values.flatten(1), ANCHOR)
    # places 2.75, 0, 2, 3.5 intervals of 2 px from the outer ends -4, -4, 12, 12
    assert boxes.tolist() == [[1.5, -4, 8, 5]]
    v = sum(1 / (1 + math.exp(-x)) for x in (2, 3, 1, 4)) / 4  # Eq. 4
    assert quality.item() == pytest.approx(v, rel=1e-5)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(2, 40), st.floats(1, 4), st.lists(st.floats(0, 1), min_size=4, max_size=4), st.floats(4, 300),
    st.floats(4, 300), st.floats(-50, 500),
)  # fmt: skip
def test_decode_undoes_encode_on_the_segments(buckets, scale, places, width, height, x):
    codec = BucketCodec(buckets, scale)
    center, size = torch.tensor([x, x]), torch.tensor([width, height])
    anchor = torch.cat([center - size / 2, center + size / 2])
    reach = torch.cat([size, size]) * scale / 2 * torch.tensor([-1, -1, 1, 1])
    box = torch.cat([center, center]) + reach * torch.tensor(places)
    decoded, quality = codec.decode(codec.encode(box, anchor), anchor)
    torch.testing.assert_close(decoded, box, atol=5e-3, rtol=1e-5)
    assert 0.999 < quality.item() <= 1


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 30))
def test_quality_is_a_probability_and_boxes_are_not_inside_out(seed, buckets):
    generator = torch.Generator().manual_seed(seed)
    codec = BucketCodec(buckets)
    boxes, quality = codec.decode(5 * torch.randn(7, 3, codec.dim, generator=generator), ANCHOR)
    assert boxes.shape == (7, 3, 4)
    assert quality.shape == (7, 3)
    assert ((quality >= 0) & (quality <= 1)).all()
    assert (boxes[..., 2:] >= boxes[..., :2]).all()


def test_more_intervals_are_finer_before_refinement():
    box = torch.tensor([[1.3, -0.6, 9.1, 10.7]])

    def coarse_error(buckets):
        codec = BucketCodec(buckets, scale=2)
        certain = codec.encode(box, ANCHOR).view(2, 4, buckets)
        certain[1] = 0
        return (codec.decode(certain.flatten(), ANCHOR[0])[0] - box[0]).abs().max()

    assert coarse_error(30) < coarse_error(4) <= 1  # half an interval of 2 px
