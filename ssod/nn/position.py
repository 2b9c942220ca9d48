"""Sine embeddings of places (Vaswani et al., 2017, section 3.5, over two axes as in Carion et al., DETR, 2020)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TEMPERATURE = 10_000


def sine(values: Tensor, features: int) -> Tensor:
    """Sines and cosines, in turns, of 0 .. 1 values at wavelengths from 1 to TEMPERATURE: [...] -> [..., features].

    features  even
    """
    exponent = torch.arange(0, features, 2, device=values.device, dtype=values.dtype) / features  # [features / 2]
    angle = values.unsqueeze(-1) * (2 * math.pi / TEMPERATURE**exponent)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)


def sine_grid(shape: tuple[int, int], counts: Tensor, level: Tensor) -> Tensor:
    """Embedding of every cell of a map, row by row, plus what is common to the map.

    shape   (h, w) of the map
    counts  [B, 2]  how many columns and rows of it are valid: these span 0 .. 1
    level   [C]     added to every cell, C divisible by 4

    Returns float32 [B, h * w, C]: C / 2 numbers of the row, then C / 2 of the column.
    """
    height, width = shape
    half = len(level) // 2
    across, down = counts[:, :1], counts[:, 1:]  # [B, 1]
    # One row and one column are computed, not h * w cells, and the common part is added before they are spread.
    row = sine((torch.arange(height, device=counts.device) + 0.5) / down, half) + level[:half]  # [B, h, C / 2]
    column = sine((torch.arange(width, device=counts.device) + 0.5) / across, half) + level[half:]  # [B, w, C / 2]
    spread = [row.unsqueeze(2).expand(-1, -1, width, -1), column.unsqueeze(1).expand(-1, height, -1, -1)]
    return torch.cat(spread, dim=-1).flatten(1, 2)
