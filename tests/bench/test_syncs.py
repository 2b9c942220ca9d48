"""How often a training step makes a GPU wait: no more than this, whatever the number of images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from syncs import CUDA, DETECTORS, PAIRS, OnDevice, Syncs, move, step_counts

from ssod.detectors import build_detector
from ssod.nn.deform_attn import attention_form
from ssod.strategies.soft_teacher import weigh_boxes
from ssod.structures import Instances

# One of each is whether the gradients are finite. The goal is 15; those above it look at the images more often.
LIMITS = {
    ("fcos", "supervised"): 2,
    ("fcos", "mean_teacher"): 6,
    ("fcos", "unbiased_teacher"): 6,
    ("fcos", "rpl"): 8,
    ("fcos", "prc"): 8,
    ("fcos", "sed"): 5,
    ("fcos", "lsm"): 9,
    ("fcos", "comining"): 9,
    ("retinanet", "supervised"): 2,
    ("retinanet", "mean_teacher"): 6,
    ("retinanet", "unbiased_teacher"): 6,
    ("retinanet", "rpl"): 8,
    ("retinanet", "prc"): 8,
    ("retinanet", "sed"): 5,
    ("retinanet", "lsm"): 9,
    ("retinanet", "comining"): 9,
    ("faster_rcnn", "supervised"): 3,
    ("faster_rcnn", "mean_teacher"): 8,
    ("faster_rcnn", "unbiased_teacher"): 8,
    ("faster_rcnn", "soft_teacher"): 12,
    ("faster_rcnn", "rpl"): 12,
    ("faster_rcnn", "prc"): 13,
    ("faster_rcnn", "sed"): 11,
    ("faster_rcnn", "lsm"): 15,
    ("faster_rcnn", "comining"): 11,
    ("deformable_detr", "supervised"): 3,
    ("deformable_detr", "mean_teacher"): 7,
    ("deformable_detr", "unbiased_teacher"): 7,
    ("deformable_detr", "rpl"): 9,
    ("deformable_detr", "prc"): 10,
    ("deformable_detr", "sed"): 10,
    ("deformable_detr", "lsm"): 13,
    ("deformable_detr", "comining"): 13,
}
QUICK = {
    ("fcos", "supervised"),
    ("retinanet", "mean_teacher"),
    ("faster_rcnn", "soft_teacher"),
    ("deformable_detr", "mean_teacher"),
}


@pytest.mark.filterwarnings("ignore:'pin_memory'")
@pytest.mark.parametrize(
    ("detector", "strategy"), [p if p in QUICK else pytest.param(*p, marks=pytest.mark.slow) for p in PAIRS]
)
def test_a_step_waits_no_more_often(detector: str, strategy: str, shapes_data: Path, tmp_path: Path) -> None:
    step, line = step_counts(detector, strategy, shapes_data, tmp_path, images=3)
    assert step.total() <= LIMITS[detector, strategy], step.most_common()
    assert line.total() == 1  # all numbers of the log in one transfer


def test_what_waits_is_counted_and_what_does_not_is_not() -> None:
    with Syncs() as syncs:
        x = torch.arange(6, device=CUDA).float()
        y = (x * 2 + 1).where(x > 2, 0.0).topk(3).values
        y = y + torch.tensor([1.0, 2, 3]).to(CUDA, non_blocking=True)
        x[x > 2] = 0.0
    assert syncs.found.total() == 0
    assert isinstance(y, OnDevice)
    assert y.inner.tolist() == [12.0, 11.0, 10.0]

    for work in (
        lambda: y[y > 11],
        lambda: y.nonzero(),
        lambda: y[0].item(),
        lambda: bool(y.sum() > 0),
        lambda: y.tolist(),
        lambda: y.cpu(),
        lambda: torch.tensor([1, 2], device=CUDA),
        lambda: torch.ones(3).to(CUDA),
        lambda: y[[0, 1]],
        lambda: x.masked_select(x > 1),
        lambda: x.repeat_interleave(torch.arange(6, device=CUDA)),
    ):
        with Syncs() as syncs:
            work()
        assert syncs.found.total() == 1, syncs.found


def test_a_tensor_on_the_host_does_not_meet_one_on_the_device() -> None:
    with Syncs(), pytest.raises(RuntimeError, match="on the host"):
        torch.ones(3, device=CUDA) + torch.ones(3)


def test_gradients_go_through() -> None:
    with Syncs() as syncs, torch.autograd.set_multithreading_enabled(False):
        w = torch.nn.Parameter(torch.ones(3, device=CUDA))
        (w * torch.arange(3, device=CUDA)).square().sum().backward()
    assert syncs.found.total() == 0
    assert isinstance(w.grad, OnDevice)
    assert w.grad.inner.tolist() == [0.0, 2.0, 8.0]


@pytest.mark.parametrize("name", DETECTORS)
def test_what_cuda_would_compute_is_what_the_cpu_does(name: str) -> None:
    torch.manual_seed(0)
    model = build_detector(name, 3, "test_resnet", {**DETECTORS[name], **({"dropout": 0.0} if "detr" in name else {})})
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    some = Instances(torch.tensor([[4.0, 4, 30, 40], [30, 20, 60, 60]]), torch.tensor([0, 2]))
    targets = [some, Instances.empty()]

    def look(device: torch.device | str) -> tuple[list[float], list[list[float]]]:
        torch.manual_seed(1)  # regions are drawn
        output = model.head(model.features(images.to(device)))
        given = [t.to(device) for t in targets]
        losses = model.loss(output, given) | {
            f"{k} of boxes": v for k, v in model.loss(output, given, weigh_boxes).items()
        }
        with torch.no_grad():
            found = model.decode(output, conf=0.01, iou=0.5, max_det=20)
        assert sum(map(len, found)) > 0
        return [float(v.detach()) for v in losses.values()], [f.scores.tolist() for f in found if f.scores is not None]

    with attention_form("plain"):
        expected = look("cpu")
        move(model)
        with Syncs():
            losses, scores = look(CUDA)
    assert losses == pytest.approx(expected[0], rel=1e-5)
    for mine, wanted in zip(scores, expected[1], strict=True):
        assert mine == pytest.approx(wanted, rel=1e-5)
