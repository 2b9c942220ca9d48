"""Exponential moving average of a network: `T <- d*T + (1-d)*S`, parameters and float buffers."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from ssod.nn.frozen_norm import FrozenNorm

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

    The lists hold the tensors themselves, so both models must be on their final device before it is made, and what
    learns must be settled. Tensors that do not learn (frozen stages, frozen batch norms) and are equal already are left
    out: their average is what they are. Integer buffers (batch-norm counters) are copied.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module) -> None:
        own, fixed = _tensors(student), _fixed(student)
        pairs = [(t, s) for t, s in zip(_tensors(teacher), own, strict=True) if id(s) not in fixed or not t.equal(s)]
        floats = [(t.detach(), s.detach()) for t, s in pairs if t.is_floating_point()]
        self._teacher, self._student = [t for t, _ in floats], [s for _, s in floats]
        self._others = [(t, s) for t, s in pairs if not t.is_floating_point()]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        torch._foreach_lerp_(self._teacher, self._student, 1 - decay)
        for t, s in self._others:
            t.copy_(s)

    def copy(self) -> None:
        """Make the teacher equal to the student, parameters and buffers."""
        self.update(0.0)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _fixed(model: nn.Module) -> set[int]:
    """Ids of the tensors that no training changes."""
    frozen = [b for m in model.modules() if isinstance(m, FrozenNorm) for b in m.buffers()]
    return {id(t) for t in [*frozen, *(p for p in model.parameters() if not p.requires_grad)]}
