"""Encoder and decoder layers of Deformable DETR (Zhu et al., 2021): attention that samples a few cells per query.

Letters: B images, L levels that are present, S cells of all levels, Q queries, C width, M heads, T points per level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssod.nn.deform_attn import deform_attn
from ssod.ops.forms import extent
from ssod.structures import Pyramid


@dataclass
class Levels:
    """What every layer knows of the maps it looks at, in ascending strides.

    strides  L strides, pixels of the full-size frame
    shapes   L pairs (h, w)
    counts   int64 [B, L, 2]    valid columns and rows of each level
    ratios   float32 [B, L, 2]  the same as fractions of the map
    cells    float32 [L, 2]     width and height of one cell as fractions of the map
    places   float32 [B, S, 2]  centre (x, y) of each cell, 0 .. 1 of the image's valid area, beyond 1 in the padding
    padding  bool [B, S]        cells outside of the valid area
    """

    strides: tuple[int, ...]
    shapes: list[tuple[int, int]]
    counts: Tensor
    ratios: Tensor
    cells: Tensor
    places: Tensor
    padding: Tensor

    @staticmethod
    def of(pyramid: Pyramid, strides: Sequence[int]) -> Levels:
        """The levels of a pyramid that are among `strides`. A cell is valid where its first pixel is."""
        present = tuple(s for s in strides if s in pyramid.maps)
        shapes = [(pyramid.maps[s].shape[-2], pyramid.maps[s].shape[-1]) for s in present]
        device = pyramid.maps[present[0]].device
        full = torch.stack([extent(w, h, device) for h, w in shapes])  # [L, 2]
        frame = extent(*pyramid.frame, device).flip(0)  # (W, H)
        sizes = pyramid.sizes.to(device).flip(-1).unsqueeze(1)  # [B, 1, 2] (w, h)
        # Cell i starts at pixel floor(i * W / w), so those with i < valid * w / W are valid: rounded up, in integers.
        counts = ((sizes * full + frame - 1) // frame).minimum(full)  # [B, L, 2]

        places = []
        for (height, width), count in zip(shapes, counts.unbind(1), strict=True):
            x = (torch.arange(width, device=device) + 0.5) / count[:, :1]  # [B, w]
            y = (torch.arange(height, device=device) + 0.5) / count[:, 1:]  # [B, h]
            grid = [x.unsqueeze(1).expand(-1, height, -1), y.unsqueeze(2).expand(-1, -1, width)]
            places.append(torch.stack(grid, dim=-1).flatten(1, 2))
        place = torch.cat(places, dim=1)
        return Levels(present, shapes, counts, counts / full, 1 / full, place, (place > 1).any(-1))


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (section 4.1, Eq. 3) with its four projections.

    strides  all levels it may ever meet; where some are missing, attention is shared among the others
    """

    def __init__(self, width: int, heads: int, points: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.split = (heads, len(strides), points)
        self.offsets = nn.Linear(width, heads * len(strides) * points * 2)
        self.weights = nn.Linear(width, heads * len(strides) * points)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self._init()

    def _init(self) -> None:
        heads, levels, points = self.split
        # Each head starts looking in its own direction, point t at t cells from the reference (appendix A.4).
        angle = torch.arange(heads) * (2 * math.pi / heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)  # [M, 2]
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)
        steps = torch.arange(1, points + 1)[:, None] * direction[:, None]  # [M, T, 2]
        with torch.no_grad():
            self.offsets.bias.copy_(steps[:, None].expand(-1, levels, -1, -1).flatten())
        for zero in (self.offsets.weight, self.weights.weight, self.weights.bias, self.value.bias, self.output.bias):
            nn.init.zeros_(zero)
        nn.init.xavier_uniform_(self.value.weight)
        nn.init.xavier_uniform_(self.output.weight)

    def forward(self, query: Tensor, reference: Tensor, memory: Tensor, levels: Levels) -> Tensor:
        """query [B, Q, C] with its position added, memory [B, S, C] -> [B, Q, C].

        reference  [B, Q, L, 2] points, or [B, Q, L, 4] boxes (cx, cy, w, h), fractions of each level's map:
                   offsets are counted in cells from a point, and in box sizes from a box
        """
        heads, every, points = self.split
        value = self.value(memory).masked_fill_(levels.padding.unsqueeze(-1), 0)
        offsets = self.offsets(query).unflatten(-1, (heads, every, points, 2))
        logits = self.weights(query).unflatten(-1, (heads, every, points))
        if levels.strides != self.strides:
            present = [self.strides.index(s) for s in levels.strides]
            offsets, logits = offsets[:, :, :, present], logits[:, :, :, present]
        weights = logits.flatten(-2).softmax(dim=-1).view(logits.shape)  # [B, Q, M, L, T]

        reference = reference[:, :, None, :, None]  # [B, Q, 1, L, 1, 2 or 4]
        unit = levels.cells[:, None] if reference.shape[-1] == 2 else reference[..., 2:] * (0.5 / points)
        locations = reference[..., :2] + offsets * unit  # [B, Q, M, L, T, 2]
        return self.output(deform_attn(value.unflatten(-1, (heads, -1)), levels.shapes, locations, weights))


class SelfAttention(nn.Module):
    """Attention among the queries; position tells who looks at whom, not what is seen."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key = nn.Linear(width, 2 * width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        for part in (*self.query_key.weight.data.chunk(2), self.value.weight):
            nn.init.xavier_uniform_(part, gain=0.5**0.5)  # as three parts of one matrix, which the published code has
        nn.init.xavier_uniform_(self.output.weight)
        for bias in (self.query_key.bias, self.value.bias, self.output.bias):
            nn.init.zeros_(bias)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """[B, Q, C] and [B, Q, C] -> [B, Q, C]."""
        query, key = self.query_key(x + position).chunk(2, dim=-1)
        split = [t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (query, key, self.value(x))]
        attended = F.scaled_dot_product_attention(*split)  # [B, M, Q, C / M]
        return self.output(attended.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers with a residual branch around them and a norm behind."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.inner = nn.Linear(width, hidden)
        self.outer = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)
        for layer in (self.inner, self.outer):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.dropout(self.outer(F.relu(self.inner(x), inplace=True))))


class EncoderLayer(nn.Module):
    """Cells look at cells (section 4.2, "Deformable Transformer Encoder")."""

    def __init__(
        self, width: int, heads: int, points: int, strides: Sequence[int], hidden: int, dropout: float
    ) -> None:
        super().__init__()
        self.attention = DeformableAttention(width, heads, points, strides)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, hidden, dropout)

    def forward(self, x: Tensor, position: Tensor, reference: Tensor, levels: Levels) -> Tensor:
        """x and position [B, S, C], reference [B, S, L, 2] -> [B, S, C]."""
        attended = self.attention(x + position, reference, x, levels)
        return self.feed_forward(self.norm(x + self.dropout(attended)))


class DecoderLayer(nn.Module):
    """Queries look at each other and then at the cells (section 4.2, "Deformable Transformer Decoder")."""

    def __init__(
        self, width: int, heads: int, points: int, strides: Sequence[int], hidden: int, dropout: float
    ) -> None:
        super().__init__()
        self.self_attention = SelfAttention(width, heads)
        self.self_norm = nn.LayerNorm(width)
        self.attention = DeformableAttention(width, heads, points, strides)
        self.norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, hidden, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, position: Tensor, reference: Tensor, memory: Tensor, levels: Levels) -> Tensor:
        """x and position [B, Q, C], reference [B, Q, L, 2 or 4], memory [B, S, C] -> [B, Q, C]."""
        x = self.self_norm(x + self.dropout(self.self_attention(x, position)))
        attended = self.attention(x + position, reference, memory, levels)
        return self.feed_forward(self.norm(x + self.dropout(attended)))
