"""The same weights and images of different sizes give torchvision's detections, losses and gradients."""

import pytest
import torch
from torch import nn
from torchvision_peers import FIRST_LABEL, LOSSES, MAX_DET, as_batch, copy_weights, in_our_words, peer_of, peer_targets

from ssod.detectors import build_detector
from ssod.ops.forms import plain_forms
from ssod.structures import Instances

SHORT = 96  # the shorter side of every image: theirs resizes to it, so it changes none of these
# The frame of the first batch is 128 x 128, where their places are multiples of the strides; that of the second is
# 160 x 160, where theirs follow rounded strides (53 pixels for stride 64).
BATCHES = {"divisible": [(SHORT, 128), (120, SHORT)], "rounded": [(SHORT, 150), (140, SHORT)]}
OPTIONS = {
    "fcos": {},
    "retinanet": {"mean_of_images": True, "smooth_l1_beta": 0.0},
    "faster_rcnn": {"rpn_samples": 64, "roi_samples": 64},
}
IOU = {"fcos": 0.6, "retinanet": 0.5, "faster_rcnn": 0.5}
TARGETS = [
    Instances(torch.tensor([[10.0, 20, 60, 80], [50, 30, 110, 90], [5, 5, 125, 93]]), torch.tensor([1, 0, 2])),
    Instances.empty(),
]


@pytest.fixture(autouse=True)
def convolutions():
    """As theirs: Winograd's form rounds otherwise, and a random network magnifies it."""
    with plain_forms():
        yield


@pytest.fixture(scope="module", params=OPTIONS)
def pair(request):
    torch.manual_seed(0)
    peer = peer_of(request.param, 3, SHORT)
    ours = build_detector(request.param, 3, options=OPTIONS[request.param]).eval()
    copy_weights(peer, ours)
    return request.param, peer, ours


@pytest.fixture(params=BATCHES)
def images(request, pair, monkeypatch):
    if request.param == "rounded":
        ours = pair[2]
        monkeypatch.setattr(ours, "options", ours.options.model_copy(update={"rounded_strides": True}))
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, h, w, generator=generator) for h, w in BATCHES[request.param]]


def test_detections(pair, images):
    name, peer, ours = pair
    with torch.no_grad():
        theirs = peer(images)
    found = ours(*as_batch(images), conf=0.05, iou=IOU[name], max_det=MAX_DET)
    for a, b in zip(theirs, found, strict=True):
        assert len(b) == len(a["boxes"]) > 20
        assert len(b) < MAX_DET
        torch.testing.assert_close(b.scores, a["scores"], atol=1e-5, rtol=0)
        # Equal scores may change places: each of our boxes must be one of theirs of the same class and score.
        same = b.labels[:, None] + FIRST_LABEL[name] == a["labels"]
        same &= (b.scores[:, None] - a["scores"]).abs() < 1e-5
        far = (b.boxes[:, None] - a["boxes"]).abs().amax(-1).where(same, torch.inf)
        assert far.amin(1).max() < 0.01
        assert far.amin(0).max() < 0.01


def draw_the_first(monkeypatch):
    """Both sides' samplers take the first candidates of each kind."""
    monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.arange(n))
    monkeypatch.setattr(torch, "rand", lambda shape, **_: (1 - torch.arange(shape[-1]) / shape[-1]).expand(shape))


def test_losses_and_gradients(pair, images, monkeypatch):
    name, peer, ours = pair
    draw_the_first(monkeypatch)
    peer.train()
    for module in peer.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    theirs = peer(images, peer_targets(TARGETS, name))
    peer.eval()
    losses = ours.loss(ours.head(ours.features(*as_batch(images))), TARGETS)
    assert losses.keys() == LOSSES[name].keys()
    for mine, other in LOSSES[name].items():
        assert losses[mine].item() == pytest.approx(theirs[other].item(), rel=1e-4), mine
        assert losses[mine] > 1e-3

    peer.zero_grad()
    ours.zero_grad()
    sum(theirs.values()).backward()
    sum(losses.values()).backward()
    expected = in_our_words({k: p.grad for k, p in peer.named_parameters()})
    for key, parameter in ours.named_parameters():
        scale = expected[key].abs().max().item()
        torch.testing.assert_close(parameter.grad, expected[key], atol=1e-4 * scale, rtol=0, msg=lambda m, k=key: k + m)
