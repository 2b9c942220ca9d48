"""Multi-scale deformable attention (Zhu et al., Deformable DETR, 2021, Eq. 3): a few samples per query instead of all.

One function, several forms of it that give the same numbers: `plain` is the definition, by `grid_sample`; `bags` is ten
times as fast on a CPU; `triton` is a CUDA kernel; `gather` becomes nothing but Gather and arithmetic in a graph.

Letters: B images, S cells of all levels, Q queries, M heads, D channels per head, L levels, T points per level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from ssod.errors import UserError, did_you_mean
from ssod.ops.forms import extent, graph_target

Shapes = Sequence[tuple[int, int]]
_forced: ContextVar[str | None] = ContextVar("attention_form", default=None)


def deform_attn(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of bilinear samples of each head's values.

    value      [B, S, M, D]        levels concatenated, each row by row
    shapes     L pairs (h, w), sum of h * w = S
    locations  [B, Q, M, L, T, 2]  (x, y) of each sample, 0 .. 1 of its level's map; outside of it everything is 0
    weights    [B, Q, M, L, T]     attention, sums to 1 over L and T

    Returns [B, Q, M * D] in the dtype of `value`; half precision is summed in float32. The gradient of `triton` with
    respect to `value` is summed in an order that changes from run to run.
    """
    return FORMS[_forced.get() or _fitting(value)](value, shapes, locations, weights)


@contextmanager
def attention_form(name: str) -> Iterator[None]:
    """Take one form wherever `deform_attn` is called inside: "plain", "gather", "bags" (CPU) or "triton" (CUDA).

    Raises UserError for another name.
    """
    if name not in FORMS:
        raise UserError(
            f"{name!r} is not a form of deformable attention; there are {', '.join(FORMS)}.{did_you_mean(name, FORMS)}"
        )
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def _fitting(value: Tensor) -> str:
    """The form for these values; "plain" in an exported graph and in double precision.

    TensorRT is said to compute grid_sample wrongly here (NVIDIA/TensorRT#4813), so its graphs gather.
    """
    if graph_target() == "tensorrt":
        return "gather"
    if graph_target() or torch.jit.is_tracing() or torch.compiler.is_exporting() or value.dtype == torch.float64:
        return "plain"
    if value.device.type == "cpu":
        return "bags"
    if value.device.type == "cuda":
        if torch.are_deterministic_algorithms_enabled():
            return "gather"  # the others add up gradients in any order
        if _has_triton():
            return "triton"
    return "plain"


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _plain(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    batch, queries, heads, *_ = locations.shape
    dim = value.shape[-1]
    work = torch.promote_types(value.dtype, torch.float32)
    # Queries last: the sum over the points adds long rows.
    grids = (2 * locations.to(work) - 1).permute(3, 0, 2, 4, 1, 5).flatten(1, 2)  # [L, B * M, T, Q, 2]
    shares = weights.to(work).permute(3, 0, 2, 4, 1).flatten(1, 2).unsqueeze(2)  # [L, B * M, 1, T, Q]
    levels = value.to(work).split([h * w for h, w in shapes], dim=1)
    total = torch.zeros(batch * heads, dim, queries, dtype=work, device=value.device)
    for (h, w), level, grid, share in zip(shapes, levels, grids, shares, strict=True):
        maps = level.permute(0, 2, 3, 1).reshape(batch * heads, dim, h, w)
        sampled = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        total = total + (sampled * share).sum(2)  # [B * M, D, Q]
    return total.view(batch, heads * dim, queries).transpose(1, 2).to(value.dtype)


def _gather(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    batch, cells, heads, dim = value.shape
    work = torch.promote_types(value.dtype, torch.float32)
    locations, weights = locations.to(work), weights.to(work)
    rows = value.to(work).transpose(1, 2).reshape(-1, dim)  # [B * M * S, D]
    # All levels at once: a graph of a node a level, corner and step would have thousands.
    size = torch.stack([extent(w, h, value.device) for h, w in shapes])  # [L, 2]
    counts = size.prod(dim=1)
    maps = torch.arange(batch * heads, device=value.device).view(batch, 1, heads, 1, 1) * cells
    start = maps + (counts.cumsum(0) - counts).unsqueeze(1)  # [B, 1, M, L, 1] first row of each map
    last = counts.unsqueeze(1) - 1

    width, height = size.to(work).unsqueeze(2).unbind(1)  # [L, 1] each
    x, y = (locations * size.to(work).unsqueeze(1) - 0.5).unbind(-1)  # [B, Q, M, L, T] each
    left, top = x.floor(), y.floor()
    total = torch.zeros_like(value[:, :1], dtype=work)  # [B, 1, M, D]
    for row, of_row in ((top, top + 1 - y), (top + 1, y - top)):
        for column, of_column in ((left, left + 1 - x), (left + 1, x - left)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            weight = (weights * of_row * of_column).where(inside, 0.0)
            cell = (row * width + column).long().clamp(min=0).minimum(last)
            picked = rows.index_select(0, (start + cell).flatten()).view(*cell.shape, dim)  # [B, Q, M, L, T, D]
            total = total + (picked * weight.unsqueeze(-1)).flatten(3, 4).sum(3)
    return total.flatten(2).to(value.dtype)


# torch.compile goes around these two: their kernels are their own.
@torch.compiler.disable
def _bags(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    from ssod.nn.deform_attn_cpu import deform_attn_cpu

    return deform_attn_cpu(value, shapes, locations, weights)


@torch.compiler.disable
def _triton(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    from ssod.nn.deform_attn_triton import deform_attn_triton  # triton exists on few machines without a GPU

    return deform_attn_triton(value, shapes, locations, weights)


FORMS: dict[str, Callable[[Tensor, Shapes, Tensor, Tensor], Tensor]] = {
    "plain": _plain,
    "gather": _gather,
    "bags": _bags,
    "triton": _triton,
}
