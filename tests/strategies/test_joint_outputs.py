"""Labelled and strong views as one batch: the same outputs, losses and gradients as one by one, where it is done."""

from __future__ import annotations

import pytest
import torch
from small import OPTIONS, batch, detector, strategy
from torch import Tensor, nn

from ssod.detectors.base import Detector
from ssod.detectors.faster_rcnn import FasterRCNN
from ssod.nn.frozen_norm import freeze_norms
from ssod.nn.held import normalises_by_batch
from ssod.strategies.base import Strategy
from ssod.structures import DenseOutput, SlotOutput


def fixed(name: str) -> Strategy:
    """Without anything by which images of a batch depend on one another, or on chance."""
    s = strategy("mean_teacher", name)
    for module in s.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.Dropout):
            module.eval()
    return s


def numbers(output: DenseOutput | SlotOutput) -> dict[str, Tensor]:
    found = {f"map {stride}": m for stride, m in output.pyramid.maps.items()} | {"sizes": output.pyramid.sizes}
    if isinstance(output, DenseOutput):
        found |= {"logits": output.logits, "codes": output.codes}
        return found if output.quality is None else found | {"quality": output.quality}
    found |= {"logits": output.logits, "boxes": output.boxes, "embeddings": output.embeddings}
    dense = {} if output.dense is None else numbers(output.dense)
    return found | {f"dense {k}": v for k, v in dense.items()}


def gradients(s: Strategy, outputs: list[DenseOutput | SlotOutput]) -> tuple[list[Tensor], list[Tensor]]:
    s.student.zero_grad()
    torch.manual_seed(3)  # the samplers' draws
    targets = [[*batch().labeled.targets], [*reversed(batch().labeled.targets)]]
    losses = [torch.stack(list(s.student.loss(o, t).values())) for o, t in zip(outputs, targets, strict=True)]
    torch.cat(losses).sum().backward()
    return [v.detach() for v in losses], [p.grad for p in s.student.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", OPTIONS)
def test_one_batch_is_as_good_as_two(name: str) -> None:
    s, b = fixed(name), batch()
    assert b.strong is not None
    views = [b.labeled, b.strong]
    joint, apart = s.joint_outputs(views), [s.student_output(v) for v in views]
    for one, other in zip(joint, apart, strict=True):
        assert type(one) is type(other)
        found, expected = numbers(one), numbers(other)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}")
    (losses, grads), (wanted, wanted_grads) = gradients(s, joint), gradients(s, apart)
    for found_loss, loss in zip(losses, wanted, strict=True):
        torch.testing.assert_close(found_loss, loss, rtol=1e-3, atol=1e-4)
    assert len(grads) == len(wanted_grads) > 10
    for grad, expected_grad in zip(grads, wanted_grads, strict=True):
        assert (grad - expected_grad).norm() <= 1e-3 * expected_grad.norm() + 1e-5


def test_regions_of_a_piece_are_those_of_its_images() -> None:
    model = detector("faster_rcnn").eval()
    assert isinstance(model, FasterRCNN)
    images = torch.randint(0, 255, (5, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    whole = model.head(model.features(images))
    every = model.proposals(whole)
    found = [regions for piece in whole.split([2, 3]) for regions in model.proposals(piece)]
    assert not torch.equal(every[0][:1], every[1][:1])
    for a, b in zip(found, every, strict=True):
        torch.testing.assert_close(a, b)


def frozen(model: Detector) -> Detector:
    names = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    freeze_norms(model, names)
    return model


def test_an_image_depends_on_the_others_where_a_batch_norm_trains() -> None:
    learning = detector("fcos").train()
    assert normalises_by_batch(learning)
    assert not normalises_by_batch(learning.eval())
    assert not normalises_by_batch(frozen(detector("fcos")).train())


def test_a_cpu_takes_one_view_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    s, b = fixed("fcos"), batch()
    monkeypatch.setattr(s, "joint_outputs", None)
    assert b.strong is not None
    assert len(s.student_outputs([b.labeled, b.strong])) == 2
    assert len(s.student_outputs([b.labeled])) == 1
