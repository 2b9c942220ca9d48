"""Where the host and a GPU meet. A GPU works off what it is given while Python goes on, until Python asks for a number
or for something whose size it must know; then both stand still in turn. Here are the ways of asking seldom.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def on_device(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers of the host as a tensor. `torch.tensor(..., device=...)` would wait until the device is done with all."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def owners(counts: Sequence[int], device: torch.device) -> Tensor:
    """Of rows that lie image by image, `counts` of each: the image of each row, int64 [sum of counts]."""
    rows = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return rows.to(device, non_blocking=True)


def owned_starts(counts: Sequence[int], owner: Tensor) -> Tensor:
    """Of rows that lie image by image, `counts` of each, the first row of each one's image: int64 [sum of counts]."""
    starts = [sum(counts[:i]) for i in range(len(counts))]
    return on_device(starts, owner.device, torch.int64)[owner]


def rows_by_owner(masks: Sequence[Tensor], owner: Tensor, count: int) -> list[tuple[Tensor, list[int]]]:
    """Where each mask, bool [M], is true, image by image, and how many rows of each image: owner int64 [M], the image
    of each row, 0 .. count - 1. A GPU is waited for once for all, and no image is looked at by itself."""
    of_image = owner == torch.arange(count, device=owner.device)[:, None]  # [count, M]
    counts = torch.stack([(of_image & mask).sum(dim=1) for mask in masks]).tolist()
    found = []
    for mask, own in zip(masks, counts, strict=True):
        rows = torch.nonzero_static(mask, size=sum(own)).squeeze(1)
        found.append((rows[owner[rows].argsort(stable=True)], own))
    return found


def true_rows(masks: Sequence[Tensor]) -> list[Tensor]:
    """Where each mask, bool [N] of its own N, is true: int64 [n] each, ascending. A GPU is waited for once for all."""
    counts = torch.stack([m.sum() for m in masks]).tolist()
    return [
        torch.nonzero_static(m, size=n).squeeze(1) if n else torch.zeros(0, dtype=torch.int64, device=m.device)
        for m, n in zip(masks, counts, strict=True)
    ]
