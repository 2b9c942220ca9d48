"""Which form an operation takes: the few that come in several ask here what they are computed for.

Eager code takes what is fastest on its device. A graph for `onnx` may hold NonMaxSuppression and RoiAlign; one for
`tensorrt`, which has neither, gets forms made of gathers and arithmetic, equal in their numbers. A graph for
`onnxruntime` is one for `onnx` with loops where that program, on a CPU, is faster with them; what it makes of wide 3x3
convolutions is done to the finished graph (ssod.deploy.onnx_winograd).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from ssod.ops.host import on_device

Target = Literal["onnx", "onnxruntime", "tensorrt"]
_target: ContextVar[Target | None] = ContextVar("graph_target", default=None)
_plain: ContextVar[bool] = ContextVar("plain_forms", default=False)


@contextmanager
def graph_for(target: Target) -> Iterator[None]:
    """Inside, networks compute by the operations of this target, in fixed shapes, and remember no shape."""
    token = _target.set(target)
    try:
        yield
    finally:
        _target.reset(token)


def graph_target() -> Target | None:
    """The target inside `graph_for`, else None."""
    return _target.get()


def in_graph() -> bool:
    """Whether what is computed now becomes a graph: sizes may be symbols, and nothing may be cached by them."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or _target.get() is not None


@contextmanager
def plain_forms() -> Iterator[None]:
    """Inside, convolutions and products are torch's own: to count operations as everybody does, or to compare."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def plain() -> bool:
    """Whether convolutions and products must be torch's own: in `plain_forms`, or in a graph."""
    return _plain.get() or in_graph()


@cache
def wide_vectors() -> bool:
    """Whether this CPU has 512-bit vectors, and torch's kernels use them."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def extent(height: int, width: int, device: torch.device) -> Tensor:
    """int64 [2] of two sizes, which in a graph may be symbols: those `torch.tensor` would take as they are now."""
    if not in_graph() or torch.jit.is_tracing():
        return on_device([height, width], device)
    return torch.stack([torch.scalar_tensor(n, dtype=torch.int64, device=device) for n in (height, width)])
