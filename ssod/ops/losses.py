"""Losses that several detectors share. Sums, never means: the caller knows what it divides by."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PIECE = 65_536  # logits handled at once on a CPU: a few tensors of 256 kB stay in its cache


def focal_loss(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None = None,
    alpha: float = 0.25,
    gamma: float = 2.0,
    foreground: Tensor | None = None,
) -> Tensor:
    """Sigmoid focal loss (Lin et al., 2017, Eq. 5), summed over candidates and classes: float32.

    logits  [M, K] of any float type
    labels  int64 [M]  class, K = background, negative = ignored
    weight  [M] or None = 1, multiplies every class of a candidate; gets no gradient
    foreground  int64 [F]  the candidates of a class, where the caller knows them already

    The few positives are taken apart from the many negatives: the same sum as with one-hot targets, without a one-hot
    tensor and with half the work on [M, K].
    """
    num_classes = logits.shape[1]
    if weight is None:
        weight = torch.ones(len(labels), device=logits.device)
    weight = weight.detach().float().where(labels >= 0, 0.0)
    row = foreground
    if row is None:
        row = ((labels >= 0) & (labels < num_classes)).nonzero().squeeze(1)
    negatives: Tensor = _NegativeFocal.apply(logits, weight * (1 - alpha), gamma, row, labels[row])
    chosen = logits[row, labels[row]].float()
    positives = alpha * (-chosen).sigmoid().pow(gamma) * F.softplus(-chosen)
    return negatives + (positives * weight[row]).sum()


class _NegativeFocal(torch.autograd.Function):
    """sum_ij weight[i] * p^gamma * softplus(x), p = sigmoid(x), but for the given places (row, column); with its
    gradient taken in the same pass.

    d/dx p^gamma softplus(x) = p^gamma (gamma (1 - p) softplus(x) + p). Step by step over all candidates this is a dozen
    passes over the largest tensor of the loss; in pieces that stay in the cache it is one.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, weight: Tensor, gamma: float, row: Tensor, column: Tensor) -> Tensor:
        # float16 would lose small gradients before the scaler has multiplied them
        kept = torch.float32 if logits.dtype == torch.float16 else logits.dtype
        grad = torch.empty_like(logits, dtype=kept) if logits.requires_grad else None
        total = torch.zeros((), device=logits.device)
        rows = len(logits) if logits.is_cuda else max(1, PIECE // max(1, logits.shape[1]))
        for start in range(0, len(logits), max(1, rows)):
            piece = slice(start, start + rows)
            x, w = logits[piece].float(), weight[piece, None]
            p, surprise = x.sigmoid(), F.softplus(x)
            easy = (p * p if gamma == 2 else p.pow(gamma)).mul_(w)
            total += torch.dot(easy.flatten(), surprise.flatten())
            if grad is not None:
                grad[piece] = surprise.mul_(1 - p).mul_(gamma).add_(p).mul_(easy)
        x = logits[row, column].float()
        total -= torch.dot(x.sigmoid().pow(gamma) * weight[row], F.softplus(x))
        if grad is not None:
            grad[row, column] = 0
        ctx.save_for_backward(grad)
        ctx.dtype = logits.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (grad,) = ctx.saved_tensors
        return (grad * grads[0]).to(ctx.dtype), None, None, None, None


def weighted_sum(values: Tensor, weight: Tensor | None) -> Tensor:
    """Sum of [M] values times [M] weights (None = 1)."""
    return values.sum() if weight is None else (values * weight).sum()


def centerness(distances: Tensor) -> Tensor:
    """FCOS centerness (Tian et al., 2019, Eq. 3) of distances (left, top, right, bottom) > 0: [M, 4] -> [M], 0 .. 1."""
    across, down = distances[:, 0::2], distances[:, 1::2]  # [M, 2] each
    ratio = (across.amin(1) / across.amax(1)) * (down.amin(1) / down.amax(1))
    return torch.sqrt(ratio)
