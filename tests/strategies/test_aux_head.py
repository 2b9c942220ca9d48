"""The second classifier: what it shares, and that it stays so whatever is done with the module that holds it."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from small import K, detector, view
from torch import Tensor, nn

from ssod.detectors import DETECTORS
from ssod.detectors.base import Detector
from ssod.strategies.aux_head import copied_classifier, with_classifier


class Holder(nn.Module):
    """A student and its second classifier, as a strategy has them."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.student = detector(name)
        self.aux = copied_classifier(self.student)

    def twin(self) -> Detector:
        return with_classifier(self.student, self.aux)

    def forward(self) -> dict[str, Tensor]:
        torch.manual_seed(0)  # Faster R-CNN samples anchors and regions
        v = view(1, [[4.0, 4, 30, 40], [30, 20, 60, 60]])
        twin = self.twin()
        return twin.loss(twin.head(twin.features(v.images, v.sizes)), v.targets)


@pytest.fixture(params=list(DETECTORS))
def holder(request: pytest.FixtureRequest) -> Holder:
    return Holder(request.param).eval()


def is_shared(holder: Holder) -> bool:
    """Every module of the twin is the student's own, but for the classifier's, which are the holder's."""
    twin = holder.twin()
    own = dict(twin.named_children())
    classifier = {name: own.pop(name) for name in holder.student.classifier}
    return all(m is holder.aux[name] is not getattr(holder.student, name) for name, m in classifier.items()) and all(
        m is getattr(holder.student, name) for name, m in own.items()
    )


def fill(module: nn.Module, value: float) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(value)


def test_the_classifier_is_what_classes_depend_on_and_boxes_do_not(holder: Holder) -> None:
    # Other weights there change the class loss, and no box of the same candidates.
    v = view(2)
    with torch.no_grad():
        pyramid = holder.student.features(v.images, v.sizes)
        main = holder.student.head(pyramid)
        before = holder()
        for p in holder.aux.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
        after, other = holder(), holder.twin().head(pyramid)
    assert before["cls"] != after["cls"]
    assert torch.isfinite(after["cls"])
    if hasattr(main, "codes"):
        assert torch.equal(main.codes, other.codes)
        for key in set(before) & {"rpn_cls", "rpn_box", "centerness"}:
            assert before[key] == after[key]
    else:  # queries start from other proposals, but every proposal is the same box
        assert torch.equal(main.dense.codes, other.dense.codes)


def test_it_starts_as_the_main_classifier_and_shares_all_else(holder: Holder) -> None:
    assert is_shared(holder)
    v = view(1, [[4.0, 4, 30, 40]])
    losses = []
    for net in (holder.student, holder.twin()):
        torch.manual_seed(0)
        losses.append(net.loss(net.head(net.features(v.images, v.sizes)), v.targets))
    assert {k: x.item() for k, x in losses[0].items()} == {k: x.item() for k, x in losses[1].items()}
    assert holder.twin().num_classes == K


def test_nothing_is_registered_twice(holder: Holder) -> None:
    twin = holder.twin()
    extra = sum(p.numel() for p in holder.aux.parameters())
    assert extra == sum(p.numel() for n in holder.student.classifier for p in getattr(holder.student, n).parameters())
    assert sum(p.numel() for p in holder.parameters()) == sum(p.numel() for p in holder.student.parameters()) + extra
    assert len(holder.state_dict()) == len(holder.student.state_dict()) + len(holder.aux.state_dict())
    assert set(twin.state_dict()) == set(holder.student.state_dict())
    assert all(twin is not m for m in holder.modules())


def test_gradients_of_the_twin_reach_what_is_shared_and_its_own_classifier(holder: Holder) -> None:
    torch.stack(list(holder().values())).sum().backward()
    main = [p for n in holder.student.classifier for p in getattr(holder.student, n).parameters()]
    assert all(p.grad is None for p in main)
    assert all(p.grad is not None and p.grad.any() for p in holder.aux.parameters())
    assert any(p.grad is not None and p.grad.any() for p in holder.student.backbone.parameters())


def test_a_deep_copy_has_a_twin_of_its_own(holder: Holder) -> None:
    other = copy.deepcopy(holder)
    assert is_shared(other)
    fill(holder, 0.5)
    before = other.twin().state_dict()
    assert not any(torch.equal(v, torch.full_like(v, 0.5)) for k, v in before.items() if k.endswith("weight"))
    fill(other, 0.25)
    assert all((p == 0.25).all() for p in other.twin().parameters())
    assert all((p == 0.5).all() for p in holder.twin().parameters())


def test_moving_and_laying_out_take_the_twin_along(holder: Holder) -> None:
    holder.to(torch.float64)
    assert {p.dtype for p in holder.twin().parameters()} == {torch.float64}
    holder.to(torch.float32).to(memory_format=torch.channels_last)
    kernels = [p for p in holder.twin().parameters() if p.ndim == 4]
    assert kernels
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    holder.to("meta")
    assert {p.device.type for p in holder.twin().parameters()} == {"meta"}
    assert is_shared(holder)


def test_a_state_dict_brings_both_classifiers_back(holder: Holder) -> None:
    fill(holder.aux, 0.125)
    file = io.BytesIO()
    torch.save(holder.state_dict(), file)
    file.seek(0)
    name = holder.student.spec["name"]
    other = Holder(name).eval()
    fill(other, 1.0)
    kept = other.twin()  # made before, and still right afterwards: weights are loaded in place
    other.load_state_dict(torch.load(file, weights_only=True))
    assert is_shared(other)
    for twin in (kept, other.twin()):
        assert all(torch.equal(v, holder.twin().state_dict()[k]) for k, v in twin.state_dict().items())
    assert all((p == 0.125).all() for p in other.aux.parameters())


def test_training_mode_follows(holder: Holder) -> None:
    holder.train()
    assert all(m.training for m in holder.twin().modules())
    holder.eval()
    assert not any(m.training for m in holder.twin().modules())
