"""The same weights and images give torchvision's detections and losses."""

import pytest
import torch
from torch import nn
from torchvision_peers import copy_weights, peer_faster_rcnn, peer_fcos, peer_targets

from ssod.detectors import build_detector
from ssod.structures import Instances

SIZE = 128  # a multiple of the largest stride: torchvision derives strides from rounded sizes
EVERYTHING = {"rpn_samples": 100_000, "roi_samples": 100_000}


@pytest.fixture(scope="module", params=["fcos", "faster_rcnn"])
def pair(request):
    torch.manual_seed(0)
    name = request.param
    peer = (peer_fcos if name == "fcos" else peer_faster_rcnn)(3, SIZE)
    ours = build_detector(name, 3, options={} if name == "fcos" else EVERYTHING).eval()
    copy_weights(peer, ours)
    return name, peer, ours, torch.rand(2, 3, SIZE, SIZE)


def test_detections(pair):
    name, peer, ours, images = pair
    with torch.no_grad():
        theirs = peer(list(images))
    found = ours(images, conf=0.05, iou=0.6 if name == "fcos" else 0.5, max_det=100)
    for a, b in zip(theirs, found, strict=True):
        assert len(b) == len(a["boxes"]) > 20
        torch.testing.assert_close(b.scores, a["scores"], atol=1e-5, rtol=1e-4)
        # Equal scores may change places: each of our boxes must be one of theirs of the same class and score.
        first = 0 if name == "fcos" else 1
        same = (b.labels[:, None] + first == a["labels"]) & ((b.scores[:, None] - a["scores"]).abs() < 1e-4)
        far = (b.boxes[:, None] - a["boxes"]).abs().amax(-1)
        assert far.where(same, torch.inf).amin(1).max() < 0.01


def test_losses(pair):
    name, peer, ours, images = pair
    targets = [
        Instances(torch.tensor([[10.0, 20, 60, 80], [50, 30, 110, 100], [5, 5, 125, 120]]), torch.tensor([1, 0, 2])),
        Instances(torch.tensor([[30.0, 40, 90, 110]]), torch.tensor([2])),
    ]
    peer.train()
    for module in peer.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    with torch.no_grad():
        theirs = peer(list(images), peer_targets(targets, 0 if name == "fcos" else 1))
        losses = ours.loss(ours.head(ours.features(images)), targets)
    peer.eval()
    names = {
        "fcos": {"cls": "classification", "box": "bbox_regression", "centerness": "bbox_ctrness"},
        "faster_rcnn": {
            "rpn_cls": "loss_objectness", "rpn_box": "loss_rpn_box_reg", "cls": "loss_classifier", "box": "loss_box_reg"
        },
    }[name]  # fmt: skip
    assert losses.keys() == names.keys()
    for mine, other in names.items():
        assert losses[mine].item() == pytest.approx(theirs[other].item(), rel=1e-4), mine
