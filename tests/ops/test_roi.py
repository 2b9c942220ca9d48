import pytest
import torch

from ssod.ops.forms import graph_for
from ssod.ops.roi import _by_operator, _by_pixels, roi_features, roi_strides
from ssod.ops.roi_samples import by_samples


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


@pytest.mark.parametrize("size", [7, 3])
def test_samples_of_a_canvas_make_the_same_cells(case, size):
    maps, boxes, image = case
    boxes, image = boxes[image.argsort()], image.sort().values
    count = int(image.bincount().min())
    rows = torch.cat([(image == b).nonzero().squeeze(1)[:count] for b in (0, 1)])
    with torch.no_grad():
        expected = _by_operator(maps, boxes[rows], image[rows], size)
        with graph_for("onnxruntime"):
            torch.testing.assert_close(
                roi_features(maps, boxes[rows], image[rows], size), expected, atol=1e-4, rtol=1e-4
            )


@pytest.mark.parametrize(("height", "width"), [(4, 4), (8, 12), (12, 8), (12, 16)])
def test_the_operator_in_onnx_is_the_one_in_torch(height, width):
    """Also where a map with its border is as large as the 14 x 14 samples: such an axis Resize would leave alone."""
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    from ssod.deploy.onnx_roi import pooled_samples

    torch.manual_seed(0)
    maps = {s: torch.randn(2, 5, -(-8 * height // s), -(-8 * width // s)) for s in (8, 16, 32)}
    corner = torch.rand(2, 9, 2) * 8 * max(height, width) - 8
    boxes = torch.cat([corner, corner + torch.rand(2, 9, 2) * 12 * height], dim=-1)
    given = []

    def told(*inputs):
        given.extend(inputs)
        return pooled_in_torch(*inputs)

    pooled_in_torch = torch.ops.ssod.pooled_samples
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.ssod, "pooled_samples", told)
        by_samples(maps, boxes, roi_strides(boxes.flatten(0, 1), list(maps)).view(2, 9), 7)
    names = ["canvas", "spans", "rows", "columns"]
    assert 14 not in given[0].shape[1:3]
    whole = pooled_samples.to_model_proto(
        input_types=[onnxscript_float(t.dim()) for t in given], output_types=[onnxscript_float(5)]
    )
    onnx.checker.check_model(whole)
    session = onnxruntime.InferenceSession(whole.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {n: t.numpy() for n, t in zip(names, given, strict=True)})
    torch.testing.assert_close(torch.from_numpy(found), pooled_in_torch(*given), atol=1e-4, rtol=1e-4)


def onnxscript_float(dimensions):
    from onnxscript import FLOAT

    return FLOAT[(None,) * dimensions]


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
