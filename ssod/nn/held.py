"""What of a network stays as it is during a pass, and is as before afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextlib.contextmanager
def parameters_held(module: nn.Module) -> Iterator[None]:
    """Inside, no parameter of `module` enters a graph: it gets no gradient from what is computed here.

    Parameters of other modules that take part do. What depends on held parameters only costs no backward pass.
    """
    learning = [p for p in module.parameters() if p.requires_grad]
    for p in learning:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in learning:
            p.requires_grad_(True)


@contextlib.contextmanager
def statistics_held(module: nn.Module) -> Iterator[None]:
    """Inside, batch norms that train normalise by the batch, as ever, and their running statistics do not move.

    For images unlike those of inference, whose mean and variance inference must not use.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def normalises_by_batch(module: nn.Module) -> bool:
    """Whether what `module` makes of an image depends on the images beside it: a batch norm that trains."""
    return any(isinstance(m, _BatchNorm) and m.training for m in module.modules())


def running_statistics(module: nn.Module) -> list[Tensor]:
    """Means and variances [C] that the batch norms of `module` learn; none of those that are frozen."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    learning = [m for m in norms if m.weight is None or m.weight.requires_grad]
    return [t for m in learning for t in (m.running_mean, m.running_var) if t is not None]


class Before:
    """The buffers of a module as they were when `keep` was called last: running statistics and counts, which a forward
    pass moves without an optimizer. The module must change them in place."""

    def __init__(self, module: nn.Module) -> None:
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for buffer in module.buffers():
            by_type.setdefault(buffer.dtype, []).append(buffer)
        self._pairs = [(found, [b.clone() for b in found]) for found in by_type.values()]

    def keep(self) -> None:
        for now, before in self._pairs:
            torch._foreach_copy_(before, now)

    def put_back(self) -> None:
        for now, before in self._pairs:
            torch._foreach_copy_(now, before)
