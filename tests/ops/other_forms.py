"""What the tests of operations in another form than torch's (Winograd's, oneDNN's) share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ssod.ops.forms import graph_for, plain_forms


def learned(compute: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """The value and the gradients of all inputs."""
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    out = compute(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def assert_float32_on_a_cpu_only(pays: Callable[[Tensor, Tensor], bool], x: Tensor, weight: Tensor) -> None:
    """Taken for these two, and not where something else computes."""
    assert pays(x, weight)
    assert not pays(x.double(), weight.double())
    assert not pays(x.bfloat16(), weight.bfloat16())
    assert not pays(x.to("meta"), weight.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not pays(x, weight)
    for target in ("onnx", "onnxruntime", "tensorrt"):
        with graph_for(target):
            assert not pays(x, weight)
    with plain_forms():
        assert not pays(x, weight)
    assert pays(x, weight)
