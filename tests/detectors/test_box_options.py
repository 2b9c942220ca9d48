"""Codecs, ranking and anchor places on every convolutional detector."""

import pytest
import torch

from ssod.detectors import build_detector
from ssod.errors import UserError
from ssod.ops.boxes import centers, iou_matrix
from ssod.structures import Instances

SMALL = {
    "fcos": {"fpn_channels": 32, "head_convs": 1},
    "retinanet": {"fpn_channels": 32, "head_convs": 1},
    "faster_rcnn": {"fpn_channels": 32, "box_head_width": 64},
}
CODECS = ("l1", "giou", "gaussian", "bucket")
K = 3
TARGETS = [
    Instances(torch.tensor([[8.0, 8, 40, 48], [30, 20, 120, 110]]), torch.tensor([0, 2])),
    Instances(torch.tensor([[20.0, 60, 90, 100]]), torch.tensor([1])),
]


def small(name, **options):
    torch.manual_seed(0)
    return build_detector(name, K, "resnet10t", SMALL[name] | options)


@pytest.fixture(params=SMALL)
def name(request):
    return request.param


@pytest.fixture
def images():
    return torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def losses(model, images):
    torch.manual_seed(5)  # what the samplers draw
    return model.loss(model.head(model.features(images)), TARGETS)


@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_reaches_every_parameter(name, codec, images):
    model = small(name, codec=codec).train()
    sum(losses(model, images).values()).backward()
    assert [k for k, p in model.named_parameters() if p.grad is None] == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_learns_boxes(name, codec, images):
    model = small(name, codec=codec).eval()
    with torch.no_grad():
        pyramid = model.features(images)  # fixed, as the proposals are: what is left is the codec's to learn
    fixed = ("backbone", "fpn", "rpn")
    optimizer = torch.optim.Adam([p for k, p in model.named_parameters() if not k.startswith(fixed)], lr=1e-2)
    boxes = []
    for _ in range(30):
        torch.manual_seed(5)
        loss = model.loss(model.head(pyramid), TARGETS)["box"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        boxes.append(loss.item())
    assert boxes[-1] < 0.9 * boxes[0]
    for instances in model(images, conf=0.0):
        assert torch.isfinite(instances.boxes).all()
        assert (instances.boxes[:, 2:] >= instances.boxes[:, :2]).all()


@pytest.mark.parametrize("codec", CODECS)
def test_quality_comes_with_the_box_where_the_codec_has_one(name, codec, images):
    model = small(name, codec=codec).eval()
    for instances in model(images, conf=0.0):
        if codec in ("gaussian", "bucket") or name == "fcos":
            assert ((instances.quality > 0) & (instances.quality < 1)).all()
        else:
            assert instances.quality is None


@pytest.mark.parametrize("codec", ["gaussian", "bucket"])
def test_ranking_by_quality(name, codec, images):
    plain, ranking = small(name, codec=codec).eval(), small(name, codec=codec, rank_by_quality=True).eval()
    ranking.load_state_dict(plain.state_dict())
    # No suppression, everything kept: the same boxes, each with another score.
    a, b = (m(images[:1], conf=0.0, iou=1.0, max_det=10**6)[0] for m in (plain, ranking))
    assert len(a) == len(b)
    assert (b.scores.diff() <= 0).all()
    if name == "fcos":
        return  # its plain score holds the centerness: see the next test
    probability = (b.scores.double() ** 2 / b.quality.double()).sort().values
    torch.testing.assert_close(probability, a.scores.double().sort().values, atol=1e-6, rtol=1e-4)


def test_fcos_ranks_by_the_codec_in_place_of_the_centerness(images):
    model = small("fcos", codec="bucket", rank_by_quality=True).eval()
    output = model.head(model.features(images[:1]))
    low = output.logits[0].sigmoid().min(), output.logits[0].sigmoid().max()
    found = model.decode(output, conf=0.0, iou=1.0, max_det=10**6)[0]
    probability = found.scores**2 / found.quality
    assert probability.min() >= low[0] * (1 - 1e-4)
    assert probability.max() <= low[1] * (1 + 1e-4)
    output.quality = output.quality + 3  # the centerness has no part in the score
    torch.testing.assert_close(model.decode(output, 0.0, 1.0, 10**6)[0].scores, found.scores)


@pytest.mark.parametrize(("codec", "agnostic", "outputs"), [
    ("l1", None, K * 4), ("l1", True, 4), ("gaussian", None, K * 8), ("bucket", None, 240), ("bucket", False, K * 240)
])  # fmt: skip
def test_boxes_of_a_class_or_of_all(codec, agnostic, outputs, images):
    model = small("faster_rcnn", codec=codec, class_agnostic=agnostic).eval()
    assert model.roi_codes.out_features == outputs
    output = model.head(model.features(images))
    regions = model.proposals(output)
    refined = model.refine(output, regions)
    assert [len(r) for r in refined] == [len(r) for r in regions]
    # an untrained head leaves every proposal nearly where it is
    assert iou_matrix(refined[0].boxes, regions[0]).diagonal().median() > 0.8
    assert all(torch.isfinite(v) for v in losses(model, images).values())


def test_buckets_and_scale_are_the_users(name):
    model = small(name, codec="bucket", buckets=20, bucket_scale=2.0)
    codec = model.roi_codec if name == "faster_rcnn" else model.codec
    assert (codec.buckets, codec.scale, codec.dim) == (20, 2.0, 160)
    default = small(name, codec="bucket")
    assert (default.roi_codec if name == "faster_rcnn" else default.codec).scale == (
        1.7 if name == "faster_rcnn" else 3.0
    )


def test_fcos_segments_cover_what_a_level_is_responsible_for(images):
    """A side up to 8 strides away, the farthest a point learns but on the top level, lies on its segment."""
    model = small("fcos", codec="bucket")
    output = model.head(model.features(images))
    for stride, span in output.spans.items():
        anchor = output.anchors[span][0]
        reach = (anchor[2] - anchor[0]) / 2 * model.codec.scale
        assert reach == 12 * stride
        assert centers(anchor).tolist() == [0, 0]
    by_distances = small("fcos")
    output = by_distances.head(by_distances.features(images))
    assert output.anchors[0].tolist() == [-4, -4, 4, 4]


def test_the_weight_of_the_box_loss(name, images):
    once, thrice = losses(small(name).eval(), images), losses(small(name, box_loss_weight=3.0).eval(), images)
    for key, value in once.items():
        assert thrice[key].item() == pytest.approx(value.item() * (3 if key == "box" else 1), rel=1e-4)


def test_places_are_multiples_of_the_stride_unless_rounded(name, images):
    batch = images[:, :, :80, :80]  # 80 / 64 and 80 / 128 are no whole numbers of cells
    places = {}
    for rounded in (False, True):
        model = small(name, rounded_strides=rounded)
        output = model.head(model.features(batch))
        at = centers(output.anchors[output.spans[64]])
        places[rounded] = at.unique().tolist()
    assert places == {False: [0, 64], True: [0, 40]}  # two cells: torchvision puts them 80 // 2 pixels apart


@pytest.mark.parametrize("codec", ["l1", "giou"])
def test_a_codec_without_quality_cannot_rank(name, codec):
    with pytest.raises(UserError, match=f"codec={codec} gives none; choose codec bucket or gaussian"):
        small(name, codec=codec, rank_by_quality=True)
