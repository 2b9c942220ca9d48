"""One network learns what another predicts: soft targets, weighted by how much the other sees an object there.

SED, "Scale-Equivalent Distillation for Semi-Supervised Object Detection", Guo et al., 2022; the formulas are this
project's reading of its abstract. Letters: M candidates, K classes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssod.ops.losses import PIECE


def foreground_weight(target: Tensor, exclusive: bool) -> Tensor:
    """w = max_c p(c) over the foreground classes: logits [M, K], or [M, K + 1] where exclusive -> float32 [M]."""
    if exclusive:
        return target.float().softmax(dim=1)[:, :-1].amax(dim=1)
    return target.amax(dim=1).float().sigmoid()


def soft_bce(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """sum_i w_i sum_c BCE(p_ic, t_ic), p = sigmoid(logits), t = sigmoid(target): float32.

    logits, target [M, K] of any float type, weight [M]; the gradient reaches the logits only.
    """
    total: Tensor = _SoftBCE.apply(logits, target, weight.detach().float())
    return total


def soft_kl(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """sum_i w_i KL(t_i || p_i), p and t the softmax of logits and target [M, K + 1]: float32."""
    theirs = target.detach().float().log_softmax(dim=1)
    each = F.kl_div(logits.float().log_softmax(dim=1), theirs, reduction="none", log_target=True).sum(dim=1)  # [M]
    return (each * weight.detach()).sum()


def heavy(weight: Tensor, neglect: float) -> Tensor:
    """Which of the weights [M] are at least `neglect` times their mean: bool [M].

    The others have together less than the share `neglect` of all weight: a weighted mean of values in 0 .. 1 that
    leaves them out of its sum is at most `neglect` too small.
    """
    return weight >= neglect * weight.mean()


class _SoftBCE(torch.autograd.Function):
    """The sum and its gradient w (p - t) in one pass, in pieces that stay in a CPU's cache."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        # float16 would lose small gradients before the scaler has multiplied them
        kept = torch.float32 if logits.dtype == torch.float16 else logits.dtype
        grad = torch.empty_like(logits, dtype=kept) if logits.requires_grad else None
        total = torch.zeros((), device=logits.device)
        rows = len(logits) if logits.is_cuda else PIECE // max(1, logits.shape[1])
        for start in range(0, len(logits), max(1, rows)):
            piece = slice(start, start + rows)
            x, t, w = logits[piece].float(), target[piece].float().sigmoid(), weight[piece]
            total += torch.dot((F.softplus(x) - t * x).sum(dim=1), w)
            if grad is not None:
                grad[piece] = x.sigmoid().sub_(t).mul_(w[:, None])
        ctx.save_for_backward(grad)
        ctx.dtype = logits.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return (grad * grads[0]).to(ctx.dtype), None, None
