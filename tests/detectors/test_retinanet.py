"""RetinaNet's own rules; numbers are proved against torchvision in test_parity."""

import pytest
import torch

from ssod.detectors import build_detector
from ssod.structures import Instances, Weights

OPTIONS = {"fpn_channels": 32, "head_convs": 1}
TARGETS = [
    Instances(torch.tensor([[8.0, 8, 40, 48], [30, 20, 120, 110]]), torch.tensor([0, 2])),
    Instances(torch.tensor([[20.0, 60, 90, 100]]), torch.tensor([1])),
    Instances.empty(),
]


def model(**options):
    torch.manual_seed(0)
    return build_detector("retinanet", 3, "test_resnet", OPTIONS | options).eval()


@pytest.fixture
def images():
    return torch.rand(3, 3, 128, 128, generator=torch.Generator().manual_seed(1))


def losses(detector, images, targets, weigh=None):
    return {k: v.item() for k, v in detector.loss(detector.head(detector.features(images)), targets, weigh).items()}


def seen_by_weigh(detector, images, targets):
    seen = []
    losses(detector, images, targets, lambda candidates: seen.append(candidates) or Weights())
    return seen[0]


def test_nine_anchors_a_cell_of_three_sizes_and_ratios():
    output = model().head(model().features(torch.rand(1, 3, 128, 128)))
    assert {s: span.stop - span.start for s, span in output.spans.items()} == {
        8: 9 * 256, 16: 9 * 64, 32: 9 * 16, 64: 9 * 4, 128: 9
    }  # fmt: skip
    size = output.anchors[:9, 2:] - output.anchors[:9, :2]
    assert size[3:6].tolist() == [[32, 32], [40, 40], [50, 50]]  # of ratio 1
    assert (size[:3, 0] > size[:3, 1]).all()
    assert (size[6:, 0] < size[6:, 1]).all()


def test_every_box_has_an_anchor_and_overlaps_between_the_thresholds_count_as_nothing(images):
    tiny = [Instances(torch.tensor([[3.0, 3, 8, 7]]), torch.tensor([1])), *TARGETS[1:]]
    detector = model()
    candidates = seen_by_weigh(detector, images, tiny)
    assert ((candidates.image == 0) & (candidates.matched == 0)).any()  # by its highest overlap, however low
    ignored = candidates.labels == -1
    assert ignored.any()
    output = detector.head(detector.features(images))
    logits = output.logits.detach().requires_grad_()
    output.logits = logits
    detector.loss(output, tiny)["cls"].backward()
    assert logits.grad.flatten(0, 1)[ignored].abs().max() == 0
    assert logits.grad.flatten(0, 1)[~ignored].abs().min() > 0


def test_losses_are_divided_by_the_foreground_of_the_batch_or_image_by_image(images):
    candidates = seen_by_weigh(model(), images, TARGETS)
    counts = [max(1, int(((candidates.matched >= 0) & (candidates.image == i)).sum())) for i in range(3)]
    assert counts[2] == 1  # no box: nothing is divided by 0
    alone = [losses(model(), images[i : i + 1], TARGETS[i : i + 1]) for i in range(3)]
    together, averaged = losses(model(), images, TARGETS), losses(model(mean_of_images=True), images, TARGETS)
    foreground = counts[0] + counts[1]
    for key in ("cls", "box"):
        total = sum(a[key] * n for a, n in zip(alone, counts, strict=True))
        assert together[key] == pytest.approx(total / foreground, rel=1e-4)
        assert averaged[key] == pytest.approx(sum(a[key] for a in alone) / 3, rel=1e-4)


def test_beta_zero_is_plain_l1(images):
    linear, rounded = model(smooth_l1_beta=0.0), model(smooth_l1_beta=0.1)
    assert linear.codec.beta == 0
    gap = losses(linear, images, TARGETS)["box"] - losses(rounded, images, TARGETS)["box"]
    assert 0 < gap <= 4 * 0.1 / 2 + 1e-5  # smooth-L1 lies below by at most beta / 2 a coordinate
