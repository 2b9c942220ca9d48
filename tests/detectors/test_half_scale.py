"""shift=1 with `half_scale`: a half-size image answers on every stride and place of the full one."""

import pytest
import torch
from torch import nn

from ssod.detectors import build_detector
from ssod.errors import UserError
from ssod.structures import Instances

SMALL = {
    "fcos": ("fcos", {"fpn_channels": 32, "head_convs": 1}),
    "retinanet": ("retinanet", {"fpn_channels": 32, "head_convs": 1}),
    "faster_rcnn": ("faster_rcnn", {"fpn_channels": 32, "box_head_width": 64}),
    "faster_rcnn_8": ("faster_rcnn", {"fpn_channels": 32, "box_head_width": 64, "lowest_stride": 8}),
}
TARGETS = [Instances(torch.tensor([[8.0, 8, 40, 48], [30, 20, 90, 110]]), torch.tensor([0, 2])), Instances.empty()]


def small(name, backbone="test_resnet", **options):
    torch.manual_seed(0)
    detector, own = SMALL[name]
    return build_detector(detector, 3, backbone, own | options).eval()


@pytest.fixture(params=SMALL)
def name(request):
    return request.param


@pytest.fixture
def images():
    return torch.randint(0, 256, (2, 3, 160, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


SIZES = torch.tensor([[160, 96], [120, 70]])


def test_strides_spans_places_and_frame_of_an_image_pair(name, images):
    model = small(name, half_scale=True)
    full = model.features(images, SIZES)
    half = model.features(images[:, :, ::2, ::2], SIZES // 2, shift=1)
    assert full.frame == half.frame == (160, 96)  # no multiple of the largest stride
    assert torch.equal(full.sizes, half.sizes)
    assert {s: m.shape for s, m in full.maps.items()} == {s: m.shape for s, m in half.maps.items()}
    assert tuple(full.maps) == model.strides
    whole, part = model.head(full), model.head(half)
    assert whole.spans == part.spans
    assert torch.equal(whole.anchors, part.anchors)
    for output in (whole, part):
        assert all(torch.isfinite(v) for v in model.loss(output, TARGETS).values())
        assert len(model.decode(output, conf=0.0)[0]) > 0


def test_constant_features_give_equal_outputs_and_boxes(name, images):
    model = small(name, half_scale=True)
    for module in model.fpn.modules():  # then every map is its bias everywhere, whatever the image
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.weight)
            module.bias.data.copy_(torch.linspace(-1, 1, len(module.bias)))
    full, half = model.features(images, SIZES), model.features(images[:, :, ::2, ::2], SIZES // 2, shift=1)
    whole, part = model.head(full), model.head(half)
    assert torch.equal(whole.logits, part.logits)
    assert torch.equal(whole.codes, part.codes)
    for a, b in zip(model.decode(whole, conf=0.0), model.decode(part, conf=0.0), strict=True):
        assert len(a) > 0
        assert torch.equal(a.boxes, b.boxes)
        assert torch.equal(a.scores, b.scores)


def test_neither_scale_computes_what_the_other_alone_needs(name, images):
    model = small(name, half_scale=True)
    ran = []
    for key, module in model.fpn.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *_, key=key: ran.append(key))
    extra = model.strides[0] // 2
    model.features(images)
    at_full = set(ran)
    ran.clear()
    model.features(images[:, :, ::2, ::2], shift=1)
    at_half = set(ran)
    assert at_half - at_full == {f"lateral.{extra}", f"smooth.{extra}"}
    assert at_full - at_half == ({"extra.second"} if "faster" not in name else set())


def test_the_full_size_is_what_it_is_without_the_option(name, images):
    plain, able = small(name), small(name, half_scale=True)
    own = plain.state_dict()
    assert set(own) < set(able.state_dict())
    able.load_state_dict(own, strict=False)
    for a, b in zip(plain(images, SIZES, conf=0.0), able(images, SIZES, conf=0.0), strict=True):
        assert torch.equal(a.boxes, b.boxes)
        assert torch.equal(a.scores, b.scores)


def test_without_the_option_the_lowest_stride_is_missing(name, images):
    model = small(name)
    half = model.features(images[:, :, ::2, ::2], shift=1)
    assert tuple(half.maps) == model.strides[1:]
    assert all(torch.isfinite(v) for v in model.loss(model.head(half), TARGETS).values())


def test_the_other_ladder_of_faster_rcnn():
    low, high = small("faster_rcnn"), small("faster_rcnn_8")
    assert low.strides == (4, 8, 16, 32, 64)
    assert high.strides == (8, 16, 32, 64, 128)
    for model in (low, high):  # 32 .. 512 pixels either way
        sides = [(c[1, 2] - c[1, 0]).item() for c in model.anchors.cells.values()]
        assert sides == [32, 64, 128, 256, 512]


def test_a_backbone_without_stride_2_is_refused_with_the_way_out(images):
    with pytest.raises(UserError, match=r"needs a map of stride 2.*set detector.lowest_stride=8") as error:
        small("faster_rcnn", "convnext_atto", half_scale=True)
    assert "\n" not in str(error.value)
    model = small("faster_rcnn_8", "convnext_atto", half_scale=True)
    half = model.features(images[:, :, ::2, ::2], shift=1)
    assert tuple(half.maps) == (8, 16, 32, 64, 128)
