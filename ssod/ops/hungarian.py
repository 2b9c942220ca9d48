"""One-to-one assignment of queries to targets (Carion et al., DETR, 2020, Eq. 1).

G groups (images times decoder layers), Q queries, N targets (padded to the most of any group).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ssod.ops.assign import BACKGROUND


def match_hungarian(cost: Tensor, valid: Tensor) -> Tensor:
    """The cheapest one-to-one matching of each group: min(Q, number of valid targets) pairs of least total cost.

    cost   [G, Q, N]    any float dtype; a NaN or infinite entry is taken only where no finite one is left
    valid  bool [G, N]  targets that exist; the others are never matched

    Returns int64 [G, Q] on the device of `cost`: the target of each query, -1 = background. No gradient. The solver
    runs on the CPU, so a GPU is waited for, once for all groups.
    """
    groups, queries, targets = cost.shape
    matched = np.full((groups, queries), BACKGROUND, dtype=np.int64)
    if matched.size and targets:
        # validity travels as one more row, so that a single copy leaves the device
        both = torch.cat([cost.detach().float(), valid.unsqueeze(1).float()], dim=1).cpu().numpy()  # [G, Q + 1, N]
        for row, table in zip(matched, both, strict=True):
            _match_one(row, table[:-1], table[-1] > 0)
    return torch.from_numpy(matched).to(cost.device, non_blocking=True)


def _match_one(matched: np.ndarray, cost: np.ndarray, valid: np.ndarray) -> None:
    """Write the targets of one group, cost [Q, N] and valid [N], into `matched` [Q]."""
    from scipy.optimize import linear_sum_assignment  # a quarter of a second that `import ssod.ops` need not pay

    columns = valid.nonzero()[0]
    if len(columns) == 0:
        return
    table = cost[:, columns].astype(np.float64)  # [Q, n]
    finite = np.isfinite(table)
    if not finite.all():
        low, high = (table[finite].min(), table[finite].max()) if finite.any() else (0.0, 0.0)
        # dearer than any exchange of finite entries could save, so that as few as possible are taken
        table[~finite] = high + (high - low + 1) * min(table.shape)
    query, column = linear_sum_assignment(table)
    matched[query] = columns[column]
