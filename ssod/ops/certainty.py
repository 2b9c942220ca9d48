"""Certainty by class (RPL, Li et al., "Rethinking Pseudo Labels", 2022, Eq. 6): thresholds and loss weights that give
rare and uncertain classes more room.

Letters: K classes, M foreground candidates. `sums` [2, K] holds of each class c_m = sum_j p_j v_j over its foreground
candidates j (p class probability, v localisation quality, both 0 .. 1) and how many there were.
"""

from __future__ import annotations

import torch
from torch import Tensor

TAU_RANGE = (0.4, 0.9)  # section 2.3: a threshold must remain one for probabilities


def class_sums(labels: Tensor, certainty: Tensor, num_classes: int) -> Tensor:
    """Sum of the certainties p * v [M] and number of candidates of each class: labels int64 [M] -> float32 [2, K].

    A certainty that is not finite counts as 0: one bad step must not stay in a running sum.
    """
    rows = torch.stack([certainty.float().nan_to_num(0, 0, 0), torch.ones_like(certainty, dtype=torch.float32)])
    return rows.new_zeros(2, num_classes).index_add_(1, labels, rows)


def relative_certainty(sums: Tensor) -> Tensor:
    """c_m / n [K], n = mean number of foreground candidates of a class (Eq. 6); 1 everywhere before there are any."""
    confident, count = sums
    n = count.mean()
    return torch.where(n > 0, confident / n, 1.0)


def class_thresholds(sums: Tensor, tau: float, gamma: float) -> Tensor:
    """tau_m = (c_m / n)^gamma * tau within TAU_RANGE: [K] (Eq. 6, left). gamma 0: tau itself, whatever it is."""
    if gamma == 0:
        return torch.full_like(sums[0], tau)
    return (relative_certainty(sums) ** gamma * tau).clamp(*TAU_RANGE)


def class_weights(sums: Tensor, gamma: float, most: float) -> Tensor:
    """alpha_m = (n / c_m)^gamma, at most `most`: [K] (Eq. 6, right). gamma 0: 1. Never seen: `most`."""
    if gamma == 0:
        return torch.ones_like(sums[0])
    return (relative_certainty(sums) ** -gamma).clamp(max=most)
