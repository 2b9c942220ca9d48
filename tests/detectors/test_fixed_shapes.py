"""What an exported graph computes equals what `decode` gives, for every detector and every kind of graph."""

import pytest
import torch
from test_detectors import SMALL

from ssod.detectors import build_detector
from ssod.ops.forms import graph_for

OPTIONS = [(name, {}) for name in SMALL] + [
    ("fcos", {"codec": "gaussian", "rank_by_quality": True}),
    ("retinanet", {"codec": "bucket", "buckets": 4}),
    ("faster_rcnn", {"codec": "bucket", "buckets": 4, "rank_by_quality": True}),
    ("faster_rcnn", {"class_agnostic": True, "lowest_stride": 8, "half_scale": True}),
    ("deformable_detr", {"nms": True}),
    ("deformable_detr", {"two_stage": False, "box_refine": False, "levels": 3}),
]


def lively(name, options):
    """A network of random weights whose scores and boxes differ from place to place."""
    torch.manual_seed(0)
    model = build_detector(name, 3, "test_resnet", SMALL[name] | options).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if any(word in key for word in ("logits", "codes", "cls_heads", "box_heads", "centerness")):
                parameter.add_(torch.randn(parameter.shape) * (0.3 if parameter.dim() > 1 else 0.05))
                if parameter.dim() == 1 and ("logits" in key or "cls_heads" in key):
                    parameter.clamp_(min=-2)
    return model


@pytest.mark.parametrize("target", ["onnx", "onnxruntime", "tensorrt"])
@pytest.mark.parametrize(("name", "options"), OPTIONS)
@torch.no_grad()
def test_fixed_equals_decode(name, options, target):
    model = lively(name, options)
    images = torch.rand(2, 3, 96, 128, generator=torch.Generator().manual_seed(1))
    sizes = torch.tensor([[96, 128], [70, 90]])
    lists = model.decode(model.head(model.features(images, sizes)), 0.1, 0.5, 50)
    with graph_for(target):
        fixed = model.fixed(model.head(model.features(images, sizes)), 0.1, 0.5, 50)
    assert sum(len(found) for found in lists) > 5
    for b, found in enumerate(lists):
        n = int(fixed.num_dets[b])
        assert n == len(found)
        torch.testing.assert_close(fixed.scores[b, :n], found.scores, rtol=0, atol=1e-5)
        near = (fixed.boxes[b, :n, None] - found.boxes).abs().amax(dim=-1)  # equal scores may change places
        near[fixed.labels[b, :n, None] != found.labels] = torch.inf
        assert (near.amin(dim=1) < 1e-2).all()
        assert (near.amin(dim=0) < 1e-2).all()


@pytest.mark.parametrize("few", [20, 1000])
@torch.no_grad()
def test_what_is_to_teach_comes_from_the_best_regions(few):
    images = torch.rand(2, 3, 96, 128, generator=torch.Generator().manual_seed(1))
    asked = lively("faster_rcnn", {"test_proposals": few})(images, None, 0.1, 0.5, 50)
    model = lively("faster_rcnn", {"pseudo_proposals": few})
    output = model.head(model.features(images))
    every = model.decode(output, 0.1, 0.5, 50)
    for own, expected, detected in zip(model.pseudo(output, 0.1, 0.5, 50), asked, every, strict=True):
        assert len(own)
        torch.testing.assert_close(own.boxes, expected.boxes)
        torch.testing.assert_close(own.scores, expected.scores)
        assert own.boxes.equal(detected.boxes) == (few == 1000)


@pytest.mark.parametrize("name", ["fcos", "retinanet", "deformable_detr"])
@torch.no_grad()
def test_detectors_of_one_stage_teach_what_they_detect(name):
    model = lively(name, {})
    output = model.head(model.features(torch.rand(2, 3, 96, 128, generator=torch.Generator().manual_seed(1))))
    for own, detected in zip(model.pseudo(output, 0.1, 0.5, 50), model.decode(output, 0.1, 0.5, 50), strict=True):
        assert own.boxes.equal(detected.boxes)
