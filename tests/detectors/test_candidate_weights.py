"""What a strategy may say about single candidates, and what every detector makes of it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from ssod.detectors import build_detector
from ssod.structures import Candidates, Instances, Weights

SMALL = {
    "fcos": {"fpn_channels": 32, "head_convs": 1},
    "retinanet": {"fpn_channels": 32, "head_convs": 1},
    "faster_rcnn": {"fpn_channels": 32, "box_head_width": 64},
    "deformable_detr": {"width": 32, "queries": 20, "encoder_layers": 1, "decoder_layers": 2, "feed_forward": 32},
}
K = 3
TARGETS = [
    Instances(torch.tensor([[8.0, 8, 40, 48], [30, 20, 120, 110]]), torch.tensor([0, 2])),
    Instances(torch.tensor([[20.0, 60, 90, 100]]), torch.tensor([1])),
]
IMAGES = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def small(name, **options):
    torch.manual_seed(0)
    return build_detector(name, K, "test_resnet", SMALL[name] | options).eval()


def losses(model, weigh=None, targets=TARGETS):
    torch.manual_seed(5)  # what the samplers draw
    return model.loss(model.head(model.features(IMAGES)), targets, weigh)


@pytest.mark.parametrize("name", SMALL)
def test_the_divisor_is_what_sums_are_divided_by(name):
    """Weights of divisor / count turn the sum over foreground into its mean; told by the ratio to the plain loss."""
    model = small(name)
    seen: list[Candidates] = []

    def times_divisor(candidates):
        seen.append(candidates)
        whole = torch.ones(len(candidates.labels)) * candidates.divisor
        return Weights(cls=whole, box=whole)

    plain, summed = losses(model), losses(model, times_divisor)
    main = {"faster_rcnn": "roi", "deformable_detr": "query"}.get(name, "dense")
    (own,) = [c for c in seen if c.stage == main]
    divisor = torch.as_tensor(own.divisor).float().unique()
    assert len(divisor) == 1
    foreground = int((own.matched >= 0).sum())
    expected = {"faster_rcnn": len(own.labels), "deformable_detr": 3}.get(name, foreground)
    assert divisor.item() == expected
    for key in ("cls", "box", "l1", "giou", "centerness"):
        if key in plain:
            assert summed[key].item() == pytest.approx(plain[key].item() * expected, rel=1e-4)


def test_a_divisor_for_each_image():
    model = small("retinanet", mean_of_images=True)
    seen: list[Candidates] = []
    losses(model, lambda c: seen.append(c) or Weights())
    image, fg = seen[0].image, seen[0].matched >= 0
    for b in (0, 1):  # the mean over two images of the mean over an image's foreground
        assert seen[0].divisor[image == b].unique().tolist() == [2 * int(fg[image == b].sum())]


@pytest.mark.parametrize("name", ["fcos", "retinanet", "faster_rcnn"])
@pytest.mark.parametrize("learn", [True, False])
def test_variances_learn_only_where_they_may(name, learn):
    model = small(name, codec="gaussian")
    losses(model, lambda c: Weights(learn_quality=learn))["box"].backward()
    layer = model.roi_codes if name == "faster_rcnn" else model.box_codes
    rows = layer.bias.grad.view(-1, 8)  # of every class or anchor: four shifts, four log variances
    assert rows[:, :4].abs().max() > 0
    assert bool(rows[:, 4:].any()) is learn
    assert bool(layer.weight.grad.view(-1, 8, layer.weight[0].numel())[:, 4:].any()) is learn


@pytest.mark.parametrize("codec", ["l1", "giou", "bucket"])
def test_codecs_without_a_variance_have_one_box_loss(codec):
    model = small("faster_rcnn", codec=codec)
    assert torch.equal(losses(model)["box"], losses(model, lambda c: Weights(learn_quality=False))["box"])


def test_focal_cross_entropy_by_hand():
    model = small("faster_rcnn", roi_focal_gamma=1.5)
    logits = torch.tensor([[math.log(2.0), 0, 0, 0], [0, 0, 0, math.log(6.0)]], requires_grad=True)
    # p = 2/5 of class 0: 0.6^1.5 * -ln 0.4 = 0.4648 * 0.9163; p = 6/9 of the background: (1/3)^1.5 * -ln(2/3)
    found = model._class_loss(logits, torch.tensor([0, K]))
    assert found.tolist() == pytest.approx([0.46476 * 0.91629, 0.19245 * 0.40547], rel=1e-4)
    plain = small("faster_rcnn")._class_loss(logits, torch.tensor([0, K]))
    torch.testing.assert_close(plain, F.cross_entropy(logits, torch.tensor([0, K]), reduction="none"))
    certain = torch.tensor([[200.0, 0, 0, 0]], requires_grad=True)
    for gamma in (0.5, 1.5):
        small("faster_rcnn", roi_focal_gamma=gamma)._class_loss(certain, torch.tensor([0])).sum().backward()
        assert torch.isfinite(certain.grad).all()


def test_regions_are_refined_for_the_class_asked_for():
    model = small("faster_rcnn")
    torch.nn.init.normal_(model.roi_codes.weight, std=0.05)  # so that classes differ
    with torch.no_grad():
        output = model.head(model.features(IMAGES))
        boxes = [b[:20] for b in model.proposals(output)]
        own = model.refine(output, boxes)
        again = model.refine(output, boxes, [r.labels for r in own])
        other = model.refine(output, boxes, [(r.labels + 1) % K for r in own])
        probability = model.classify(output, boxes)
    for b in (0, 1):
        torch.testing.assert_close(own[b].boxes, again[b].boxes)
        assert not torch.allclose(own[b].boxes, other[b].boxes)
        rows = torch.arange(len(boxes[b]))
        torch.testing.assert_close(other[b].scores, probability[b][rows, other[b].labels])


def test_without_classes_the_box_loss_is_the_same_and_background_is_not_looked_at():
    model, rows, found = small("faster_rcnn"), [], []
    model.fc1.register_forward_hook(lambda module, given, made: rows.append(len(made)))
    for learn_classes in (True, False):

        def weigh(candidates, learn_classes=learn_classes):
            none = torch.zeros(len(candidates.labels))
            box = none if candidates.stage == "rpn" else None
            if candidates.stage == "roi":
                rows.append(int((candidates.matched >= 0).sum()))
            return Weights(cls=none, box=box, learn_classes=learn_classes)

        model.zero_grad()
        loss = losses(model, weigh)
        sum(loss.values()).backward()
        found.append(loss["box"].detach())
        assert loss["cls"] == 0
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        if learn_classes:
            whole = gradients
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=0)
    assert found[0] > 0
    assert set(whole) == set(gradients), "several processes want a gradient of each in every step"
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-7, msg=name)
    foreground, all_of_them, again, fewer = rows
    assert 0 < foreground == again == fewer < all_of_them
