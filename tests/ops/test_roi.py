import pytest
import torch

from ssod.ops.roi import _by_operator, _by_pixels, roi_features, roi_strides


def test_roi_strides_by_hand():
    sides = torch.tensor([10.0, 112, 223, 224, 447, 448, 5000])
    boxes = torch.stack([torch.zeros(7), torch.zeros(7), sides, sides], dim=1)
    # 224 px belongs to stride 16; every doubling is the next stride; clamped to what there is
    assert roi_strides(boxes, [4, 8, 16, 32]).tolist() == [4, 8, 8, 16, 16, 32, 32]
    assert roi_strides(boxes, [8, 16]).tolist() == [8, 8, 8, 16, 16, 16, 16]
    assert roi_strides(torch.zeros(1, 4), [4, 8]).tolist() == [4]


@pytest.fixture
def case():
    torch.manual_seed(0)
    maps = {s: torch.randn(2, 6, 256 // s, 192 // s, requires_grad=True) for s in (4, 8, 16)}
    corner = torch.rand(80, 2) * 200 - 20  # some reach over the border, some lie wholly outside
    boxes = torch.cat([corner, corner + torch.rand(80, 2) ** 2 * 300], dim=1)
    return maps, boxes, torch.randint(0, 2, (80,))


def test_both_ways_agree_forward_and_backward(case):
    maps, boxes, image = case
    one, other = _by_pixels(maps, boxes, image, 7), _by_operator(maps, boxes, image, 7)
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    upstream = torch.randn_like(one)
    for a, b in zip(*(torch.autograd.grad(o, list(maps.values()), upstream) for o in (one, other)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_half_precision_maps_stay_close(case):
    maps, boxes, image = case
    half = {s: m.detach().bfloat16() for s, m in maps.items()}
    exact = roi_features(maps, boxes, image, 7)
    assert (roi_features(half, boxes, image, 7).float() - exact).abs().max() < 0.05


def test_no_regions(case):
    maps, boxes, image = case
    out = roi_features(maps, boxes[:0], image[:0], 7)
    assert out.shape == (0, 6, 7, 7)
    grads = torch.autograd.grad(out.sum(), list(maps.values()))
    assert all((g == 0).all() for g in grads)
