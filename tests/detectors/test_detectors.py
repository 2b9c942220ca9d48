"""What every detector keeps of the protocol, on small networks."""

import copy

import pytest
import torch

from ssod.detectors import build_detector
from ssod.detectors.base import HasDense, HasRegions, HasSlots
from ssod.errors import UserError
from ssod.structures import Instances, Weights

SMALL = {
    "fcos": {"fpn_channels": 32, "head_convs": 1, "head_groups": 8},
    "retinanet": {"fpn_channels": 32, "head_convs": 1},
    "faster_rcnn": {"fpn_channels": 32, "box_head_width": 64},
    "deformable_detr": {
        "width": 32,
        "heads": 2,
        "feed_forward": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "queries": 10,
        "dropout": 0.0,  # the one thing that depends on the mode
    },
}
STAGES = {"faster_rcnn": {"rpn", "roi"}, "deformable_detr": {"query", "aux", "encoder"}}
BOX_LOSSES = {"box", "rpn_box", "centerness", "l1", "giou"}
MIXED_LOSSES = {"aux", "encoder"}  # class and box losses in one sum
K = 3


def small(name, **kwargs):
    torch.manual_seed(0)
    return build_detector(name, K, "resnet10t", SMALL[name], **kwargs)


@pytest.fixture(params=SMALL)
def name(request):
    return request.param


@pytest.fixture
def images():
    return torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


TARGETS = [
    Instances(torch.tensor([[8.0, 8, 40, 48], [30, 20, 120, 110]]), torch.tensor([0, 2])),
    Instances(torch.tensor([[20.0, 60, 90, 100]]), torch.tensor([1])),
]
NOTHING = [Instances.empty(), Instances.empty()]


def losses(model, images, targets, weigh=None):
    torch.manual_seed(5)  # what the samplers draw
    return model.loss(model.head(model.features(images)), targets, weigh)


@pytest.mark.parametrize("targets", [TARGETS, [TARGETS[0], Instances.empty()], NOTHING], ids=["all", "one", "none"])
def test_losses_are_finite_and_reach_every_parameter(name, images, targets):
    model = small(name).train()
    found = losses(model, images, targets)
    assert all(v.dim() == 0 and torch.isfinite(v) for v in found.values())
    sum(found.values()).backward()
    missing = [k for k, p in model.named_parameters() if p.grad is None]
    assert missing == []  # a parameter without a gradient stops DDP
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_verbs_do_not_depend_on_the_mode(name, images):
    model = small(name, frozen_norm=True)
    found = [[losses(model.train(mode), images, TARGETS), model.train(mode)(images)] for mode in (True, False)]
    for key, value in found[0][0].items():
        assert value.item() == pytest.approx(found[1][0][key].item(), rel=1e-5)
    assert torch.equal(found[0][1][0].boxes, found[1][1][0].boxes)


def test_a_batch_equals_its_images(name, images):
    model = small(name).eval()
    together = model(images, conf=0.0)
    for i, alone in enumerate(model(images[i : i + 1], conf=0.0)[0] for i in range(2)):
        torch.testing.assert_close(together[i].scores, alone.scores, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(together[i].boxes, alone.boxes, atol=0.01, rtol=1e-4)


def test_detections_are_sorted_clipped_and_bounded(name, images):
    model = small(name).eval()
    sizes = torch.tensor([[128, 128], [64, 100]])
    found = model(images, sizes, conf=0.0, max_det=17)
    for instances, (h, w) in zip(found, sizes.tolist(), strict=True):
        assert 0 < len(instances) <= 17
        assert (instances.scores.diff() <= 0).all()
        assert (instances.boxes >= 0).all()
        assert (instances.boxes <= torch.tensor([w, h, w, h])).all()
        assert instances.labels.dtype == torch.int64
        assert ((instances.labels >= 0) & (instances.labels < K)).all()


def test_padding_has_no_content(name, images):
    model = small(name).eval()
    sizes = torch.tensor([[128, 128], [64, 100]])
    other = images.clone()
    other[1, :, 64:] = 7
    other[1, :, :, 100:] = 200
    assert torch.equal(model(images, sizes)[1].boxes, model(other, sizes)[1].boxes)


def test_nothing_found_is_an_empty_list_of_boxes(name, images):
    for instances in small(name).eval()(images, conf=0.999):
        assert len(instances) == 0
        assert instances.boxes.shape == (0, 4)


def test_target_weights_multiply_what_their_candidates_lose(name, images):
    model = small(name).eval()
    plain = losses(model, images, TARGETS)

    def weighted(cls, box):
        return losses(
            model,
            images,
            [
                Instances(
                    t.boxes, t.labels, cls_weight=torch.full((len(t),), cls), box_weight=torch.full((len(t),), box)
                )
                for t in TARGETS
            ],
        )

    same, boxless, half = weighted(1.0, 1.0), weighted(1.0, 0.0), weighted(0.0, 0.5)
    for key, value in plain.items():
        assert same[key].item() == pytest.approx(value.item(), rel=1e-5)
        if key in BOX_LOSSES:
            assert boxless[key].item() == 0
            assert half[key].item() == pytest.approx(value.item() / 2, rel=1e-5)
        elif key in MIXED_LOSSES:
            assert 0 < boxless[key].item() < value.item()
            assert 0 < half[key].item() < value.item()
        else:
            assert boxless[key].item() == pytest.approx(value.item(), rel=1e-5)
            assert half[key].item() < value.item()


def test_weigh_sees_every_stage_and_its_weights_count(name, images):
    model = small(name).eval()
    plain = losses(model, images, TARGETS)
    seen = {}

    def weigh(candidates):
        seen[candidates.stage] = candidates
        ones = torch.ones(len(candidates.boxes))
        return Weights(cls=3 * ones, box=0 * ones)

    found = losses(model, images, TARGETS, weigh)
    assert set(seen) == STAGES.get(name, {"dense"})
    for c in seen.values():
        fg = c.matched >= 0
        assert fg.any()
        ignored = c.labels == -1  # of overlaps that are neither
        assert (c.labels[~fg & ~ignored] == K).all()
        assert (c.matched[~fg] == -1).all()
        for image, label, matched in zip(c.image[fg], c.labels[fg], c.matched[fg], strict=True):
            assert TARGETS[image].labels[matched] == label
    for key, value in plain.items():
        if key not in MIXED_LOSSES:
            factor = 0 if key in BOX_LOSSES else 3
            assert found[key].item() == pytest.approx(factor * value.item(), rel=1e-4)


def test_autocast_changes_little_and_losses_stay_float32(name, images):
    model = small(name).eval()
    exact = losses(model, images, TARGETS)
    with torch.autocast("cpu", torch.bfloat16):
        inside = losses(model, images, TARGETS)
        torch.manual_seed(5)
        output = model.head(model.features(images))
    outside = model.loss(output, TARGETS)
    assert output.logits.dtype == torch.bfloat16
    for key, value in exact.items():
        assert inside[key].dtype == outside[key].dtype == torch.float32
        assert inside[key].item() == pytest.approx(value.item(), rel=0.2, abs=0.02)
        assert inside[key].item() == pytest.approx(outside[key].item(), rel=1e-4)
    found = model.decode(output, conf=0.0)
    assert found[0].boxes.dtype == found[0].scores.dtype == torch.float32


def test_a_half_size_image_answers_in_the_full_frame(name, images):
    model = small(name).eval()
    half = images[:, :, ::2, ::2]
    full, shifted = model.features(images), model.features(half, shift=1)
    assert shifted.frame == full.frame == (128, 128)
    assert torch.equal(shifted.sizes, full.sizes)
    strides = sorted(set(full.maps) & set(shifted.maps))
    assert min(shifted.maps) == 2 * min(full.maps)
    for stride in strides:
        assert shifted.maps[stride].shape == full.maps[stride].shape
    whole, output = model.head(full), model.head(shifted)
    part = output
    if name == "deformable_detr":
        whole, part = model.dense(whole), model.dense(output)
    assert list(part.spans) == strides  # nothing is computed beyond the highest
    for stride in strides:
        assert torch.equal(whole.anchors[whole.spans[stride]], part.anchors[part.spans[stride]])
    assert all(torch.isfinite(v) for v in model.loss(output, TARGETS).values())
    assert len(model.decode(output, conf=0.0)[0]) > 0


def test_a_few_steps_learn(name, images):
    model = small(name).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    totals = []
    for _ in range(15):
        total = sum(losses(model, images, TARGETS).values())
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10)
        optimizer.step()
        totals.append(total.item())
    assert sum(totals[-3:]) < 0.8 * sum(totals[:3])


def test_spec_rebuilds_the_same_architecture(name, images):
    model = small(name, frozen_norm=True, freeze=1).eval()
    twin = build_detector(**model.spec).eval()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(images, conf=0.0)[0].boxes, model(images, conf=0.0)[0].boxes)
    assert copy.deepcopy(model).spec == model.spec


def test_capabilities():
    for dense in ("fcos", "retinanet"):
        assert isinstance(small(dense), HasDense)
        assert not isinstance(small(dense), HasRegions)
    assert isinstance(small("faster_rcnn"), HasRegions)
    assert isinstance(small("faster_rcnn"), HasDense)  # its first stage
    assert isinstance(small("deformable_detr"), HasSlots)
    assert isinstance(small("deformable_detr"), HasDense)
    assert not isinstance(small("fcos"), HasSlots)


def test_regions_of_one_network_can_be_judged_by_another(images):
    one, other = small("faster_rcnn").eval(), small("faster_rcnn").eval()
    boxes = one.proposals(one.head(one.features(images)))
    output = other.head(other.features(images))
    probabilities = other.classify(output, boxes)
    refined = other.refine(output, [boxes[0], boxes[1][:0]])
    assert [p.shape for p in probabilities] == [(len(b), K + 1) for b in boxes]
    torch.testing.assert_close(probabilities[0].sum(1), torch.ones(len(boxes[0])))
    assert [len(r) for r in refined] == [len(boxes[0]), 0]
    assert torch.equal(refined[0].labels, probabilities[0][:, :K].argmax(1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "fcoss", "num_classes": 3}, "'fcoss' is not a detector.*Did you mean 'fcos'"),
        ({"name": "fcos", "num_classes": 0}, "num_classes=0 leaves nothing to detect"),
        ({"name": "fcos", "num_classes": 3, "backbone": "resnet49"}, "'resnet49' is not a backbone"),
        ({"name": "fcos", "num_classes": 3, "options": {"fpn_chanels": 8}}, "Did you mean 'fpn_channels'"),
        ({"name": "fcos", "num_classes": 3, "options": {"head_convs": "4"}}, "detector.head_convs='4' is not valid"),
        ({"name": "fcos", "num_classes": 3, "options": {"fpn_channels": 100}}, "head_groups=12 does not divide"),
        ({"name": "retinanet", "num_classes": 3, "options": {"codec": "l2"}}, "codec='l2' is not valid for retinanet"),
        ({"name": "faster_rcnn", "num_classes": 3, "options": {"rank_by_quality": True}}, "codec=l1 gives none"),
    ],
)
def test_wrong_input_is_said_in_one_sentence(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        build_detector(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [(5, 7), (1, 1), (33, 200)], ids=str)
def test_images_smaller_than_a_stride_are_seen(name, size):
    model = small(name).eval()
    image = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8)
    target = Instances(torch.tensor([[0.0, 0, size[1], size[0]]]), torch.tensor([1]))
    assert all(torch.isfinite(v) for v in losses(model, image, [target]).values())
    for instances in model(image, conf=0.0):
        assert (instances.boxes <= torch.tensor([size[1], size[0]]).repeat(2)).all()


@pytest.mark.parametrize(
    ("shape", "sizes", "message"),
    [
        ((1, 3, 0, 64), None, r"images are \[1, 3, 0, 64\].*none of them 0"),
        ((0, 3, 64, 64), None, r"images are \[0, 3, 64, 64\]"),
        ((3, 64, 64), None, r"images are \[3, 64, 64\]; a detector wants \[batch, 3, height, width\]"),
        ((1, 1, 64, 64), None, r"images are \[1, 1, 64, 64\]"),
        ((2, 3, 64, 64), torch.ones(1, 2), r"sizes are \[1, 2\] for 2 images"),
    ],
)
def test_what_is_no_batch_of_images_is_said_in_one_sentence(name, shape, sizes, message):
    with pytest.raises(UserError, match=message) as error:
        small(name)(torch.zeros(shape), sizes)
    assert "\n" not in str(error.value)


def test_targets_of_other_images_are_refused(name, images):
    with pytest.raises(UserError, match="targets of 1 images for a batch of 2"):
        losses(small(name), images, TARGETS[:1])
