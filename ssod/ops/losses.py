"""Losses that several detectors share. Sums, never means: the caller knows what it divides by."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def focal_loss(
    logits: Tensor, labels: Tensor, weight: Tensor | None = None, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """Sigmoid focal loss (Lin et al., 2017, Eq. 5), summed over candidates and classes.

    logits  [M, K]
    labels  int64 [M]  class, K = background, negative = ignored
    weight  [M] or None = 1, multiplies every class of a candidate

    All logits are taken as negatives first and the few positives are then put right: with one-hot targets this is the
    same sum, without a one-hot tensor and with half the work on [M, K].
    """
    num_classes = logits.shape[1]
    as_negative = (1 - alpha) * logits.sigmoid().pow(gamma) * F.softplus(logits)  # [M, K]
    if weight is None:
        weight = logits.new_ones(()).expand(logits.shape[0])
    weight = weight.where(labels >= 0, 0.0)
    total = (as_negative.sum(dim=1) * weight).sum()

    row = ((labels >= 0) & (labels < num_classes)).nonzero().squeeze(1)
    chosen = logits[row, labels[row]]
    as_positive = alpha * (-chosen).sigmoid().pow(gamma) * F.softplus(-chosen)
    return total + ((as_positive - as_negative[row, labels[row]]) * weight[row]).sum()


def weighted_sum(values: Tensor, weight: Tensor | None) -> Tensor:
    """Sum of [M] values times [M] weights (None = 1)."""
    return values.sum() if weight is None else (values * weight).sum()


def centerness(distances: Tensor) -> Tensor:
    """FCOS centerness (Tian et al., 2019, Eq. 3) of distances (left, top, right, bottom) > 0: [M, 4] -> [M], 0 .. 1."""
    across, down = distances[:, 0::2], distances[:, 1::2]  # [M, 2] each
    ratio = (across.amin(1) / across.amax(1)) * (down.amin(1) / down.amax(1))
    return torch.sqrt(ratio)
