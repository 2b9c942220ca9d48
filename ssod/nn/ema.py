"""Exponential moving average of a network: `T <- d*T + (1-d)*S`, parameters and float buffers."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def frozen_copy(model: M) -> M:
    """A copy in eval mode that no optimizer and no gradient reaches."""
    twin = copy.deepcopy(model).eval()
    return twin.requires_grad_(False)


def ema_decay_at(step: int, decay: float) -> float:
    """Decay with its warm-up, d_t = min(d, 1 - 1/(t+1)): the first update (t = 0) copies the student."""
    return min(decay, 1 - 1 / (step + 1))


class Ema:
    """Moves `teacher` towards `student` in one fused call over cached tensor lists.

    The lists hold the tensors themselves, so both models must be on their final device before the first update.
    Integer buffers (batch-norm counters) are copied.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module) -> None:
        pairs = list(zip(_tensors(teacher), _tensors(student), strict=True))
        self._floats = [(t, s) for t, s in pairs if t.is_floating_point()]
        self._others = [(t, s) for t, s in pairs if not t.is_floating_point()]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        teacher, student = [t for t, _ in self._floats], [s for _, s in self._floats]
        torch._foreach_lerp_(teacher, student, 1 - decay)
        for t, s in self._others:
            t.copy_(s)

    def copy(self) -> None:
        """Make the teacher equal to the student, parameters and buffers."""
        self.update(0.0)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [p.detach() for p in model.parameters()] + list(model.buffers())
