"""Deformable attention on a CPU: sums over rows of a table, taken by `embedding_bag`.

A bilinear sample is the weighted sum of four neighbouring cells, each a row of D numbers. The cells lie in a table with
a border of zeros around every level, wide enough that samples outside need no special case, and with the same row pitch
for all levels, so that the four neighbours of any sample are its first cell plus one of four fixed shifts. Index and
table are thus shared by the four corners: shift the table, not the index.

Backward: each sample's weight gets the product of two rows (`sampled_addmm`), and the table gets the transposed sum,
for which samples, not corners, are sorted by cell. Work goes in pieces that stay in the cache.

Letters as in `ssod.nn.deform_attn`; also J = L * T samples of a query, R rows of one head's table, n heads of a piece.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

PIECE = 1 << 17  # samples of a piece: half a megabyte per number and sample, so that the dozen passes find them cached
BORDER = 2  # zeros on either side of a level: a sample's first cell is clamped to -2 .. size, its second is one more


class Table(NamedTuple):
    """How the cells of all levels lie in the rows of a table."""

    rows: int  # R
    pitch: int  # rows from a cell to the one below it
    origins: list[int]  # of each level, the row of its cell (0, 0)
    origin: Tensor  # [J], the same for each sample of a query
    size: Tensor  # [2 * J], (w, h) of each sample's level, in turn
    shifts: tuple[int, int, int, int]  # rows from a sample's first cell to its four: (0, 0), (1, 0), (0, 1), (1, 1)


def deform_attn_cpu(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """As `ssod.nn.deform_attn.deform_attn`; computed in float32, in float64 where `value` is. Differentiable once."""
    work = torch.promote_types(value.dtype, torch.float32)
    table = _table(tuple(shapes), locations.shape[4], work)
    return _Samples.apply(value, locations.to(work), weights.to(work), list(shapes), table)


@lru_cache(maxsize=64)
def _table(shapes: tuple[tuple[int, int], ...], points: int, dtype: torch.dtype) -> Table:
    pitch = max(w for _, w in shapes) + BORDER  # the border right of one row is the border left of the next
    first, origins = BORDER, []
    for h, _ in shapes:
        origins.append(first * pitch + BORDER)
        first += h + BORDER
    size = torch.tensor([[w, h] for h, w in shapes], dtype=dtype)
    return Table(
        rows=first * pitch + BORDER,
        pitch=pitch,
        origins=origins,
        origin=torch.tensor(origins, dtype=dtype).repeat_interleave(points),
        size=size.repeat_interleave(points, dim=0).flatten(),
        shifts=(0, 1, pitch, pitch + 1),
    )


class _Samples(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, locations: Tensor, weights: Tensor, shapes: list[tuple[int, int]], table: Table
    ) -> Tensor:
        batch, queries, heads, levels, points, _ = locations.shape
        dim, samples, work = value.shape[-1], levels * points, locations.dtype
        first = torch.empty(batch, heads, queries, samples, dtype=torch.int32)
        fraction = torch.empty(2, batch, heads, queries, samples, dtype=work)  # of x and of y
        by_head = locations.reshape(batch, queries, heads, 2 * samples).transpose(1, 2)  # [B, M, Q, 2 * J]
        attention = weights.reshape(batch, queries, heads, samples).transpose(1, 2)  # [B, M, Q, J]
        out = value.new_empty(batch, queries, heads, dim)
        step = _heads_at_once(heads, queries * samples, table.rows)
        cells = torch.zeros(step, table.rows, dim, dtype=work)  # written anew for every piece, but for the borders
        for b, some in _pieces(batch, heads, step):
            _locate(by_head[b, some], table, first[b, some], fraction[:, b, some])
            index = first[b, some].flatten(0, 1)  # [n * Q, J]
            piece = _fill(cells, value[b, :, some], shapes, table)
            total: Tensor | None = None
            corners = _bilinear(attention[b, some].contiguous(), fraction[:, b, some])
            for shift, weight in zip(table.shifts, corners, strict=True):
                part = F.embedding_bag(index, piece[shift:], mode="sum", per_sample_weights=weight.flatten(0, 1))
                total = part if total is None else total.add_(part)
            assert total is not None
            out[b, :, some] = total.view(len(first[b, some]), queries, dim).transpose(0, 1)
        ctx.save_for_backward(value, first, fraction, weights)
        ctx.shapes, ctx.table = shapes, table
        return out.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        value, first, fraction, weights = ctx.saved_tensors
        shapes, table = ctx.shapes, ctx.table
        batch, queries, heads, levels, points = weights.shape
        dim, samples, work = value.shape[-1], levels * points, weights.dtype
        upstream = grads[0].view(batch, queries, heads, dim).transpose(1, 2)  # [B, M, Q, D]
        attention = weights.reshape(batch, queries, heads, samples).transpose(1, 2)  # [B, M, Q, J]
        on_value, on_rest = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
        grad_value = torch.empty_like(value, memory_format=torch.contiguous_format)
        grad_locations = weights.new_empty(batch, queries, heads, 2 * samples)
        grad_weights = weights.new_empty(batch, queries, heads, samples)
        step = _heads_at_once(heads, queries * samples, table.rows)
        cells = torch.zeros(step, table.rows, dim, dtype=work)
        for b, some in _pieces(batch, heads, step):
            grad = upstream[b, some].to(work).flatten(0, 1).contiguous()  # [n * Q, D]
            index = first[b, some].flatten(0, 1)
            share, part = attention[b, some].contiguous(), fraction[:, b, some]
            if on_rest:
                products = _products(grad, _fill(cells, value[b, :, some], shapes, table), index, table)
                on_location, on_weight = grad_locations[b, :, some], grad_weights[b, :, some]
                _of_samples(products, share, part, table, on_location.transpose(0, 1), on_weight.transpose(0, 1))
            if on_value:
                sums = _transposed(grad, index.flatten(), _bilinear(share, part), len(share) * table.rows, table)
                _cut(sums, grad_value[b, :, some], shapes, table)
        return (
            grad_value if on_value else None,
            grad_locations.view(batch, queries, heads, levels, points, 2) if on_rest else None,
            grad_weights.view(weights.shape) if on_rest else None,
            None,
            None,
        )


def _heads_at_once(heads: int, samples: int, rows: int) -> int:
    """How many heads of `samples` and `rows` each make a piece."""
    return min(heads, max(1, PIECE // max(samples, 2 * rows)))  # twice: the backward pass holds sums of that size too


def _pieces(batch: int, heads: int, step: int) -> Iterator[tuple[int, slice]]:
    """One image and some of its heads at a time."""
    for b in range(batch):
        for m in range(0, heads, step):
            yield b, slice(m, m + step)


def _fill(cells: Tensor, value: Tensor, shapes: list[tuple[int, int]], table: Table) -> Tensor:
    """Write the values [S, n, D] of some heads into the first of the tables `cells`; returns their rows [n * R, D]."""
    cells = cells[: value.shape[1]]
    levels = value.split([h * w for h, w in shapes])
    for level, (h, w), origin in zip(levels, shapes, table.origins, strict=True):
        window = _window(cells, h, w, origin, table.pitch)  # [n, h, w, D]
        window.copy_(level.unflatten(0, (h, w)).permute(2, 0, 1, 3))
    return cells.flatten(0, 1)


def _window(cells: Tensor, h: int, w: int, origin: int, pitch: int) -> Tensor:
    """View of h x w cells: [..., R, D] -> [..., h, w, D]."""
    return cells[..., origin : origin + h * pitch, :].unflatten(-2, (h, pitch))[..., :w, :]


def _locate(locations: Tensor, table: Table, first: Tensor, fraction: Tensor) -> None:
    """Write the row of each sample's first cell [n, Q, J] and how far beyond it the sample lies [2, n, Q, J], 0 .. 1.

    locations [n, Q, 2 * J]
    """
    at = torch.addcmul(locations.new_tensor(-0.5), locations, table.size)
    torch.clamp(at, locations.new_tensor(-BORDER), table.size, out=at)
    cell = at.floor()
    for axis, out in enumerate(fraction):
        torch.sub(at[..., axis::2], cell[..., axis::2], out=out)
    first.copy_(torch.add(cell[..., 0::2], cell[..., 1::2], alpha=table.pitch).add_(table.origin))
    first.clamp_(0, table.rows - 1 - table.shifts[-1])  # NaN would be a wild row; its fraction is NaN, so it is seen
    first.add_((torch.arange(len(first), dtype=torch.int32) * table.rows)[:, None, None])


def _bilinear(attention: Tensor, fraction: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights of the four corners, each [n, Q, J]."""
    x, y = fraction
    below = attention * y
    above = attention - below
    below_right, above_right = below * x, above * x
    return above.sub_(above_right), above_right, below.sub_(below_right), below_right


def _products(grad: Tensor, piece: Tensor, index: Tensor, table: Table) -> list[Tensor]:
    """grad [n * Q, D] times the cells [n * R, D] of each sample: for each corner [n * Q, J]."""
    ends = torch.arange(0, index.numel() + 1, index.shape[1], dtype=torch.int32)
    products = []
    for shift in table.shifts:
        cells = piece[shift:]
        values = torch.zeros(index.numel(), dtype=grad.dtype)  # beta = 0 does not wipe out a NaN found here
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            shape = (len(grad), len(cells))
            wanted = torch.sparse_csr_tensor(ends, index.flatten(), values, shape, check_invariants=False)
        # in place: the operator would copy index and values otherwise
        torch.sparse.sampled_addmm(wanted, grad, cells.t(), beta=0.0, out=wanted)
        products.append(wanted.values().view(index.shape))
    return products


def _of_samples(
    products: list[Tensor], attention: Tensor, fraction: Tensor, table: Table, on_location: Tensor, on_weight: Tensor
) -> None:
    """Write the gradients of the locations [n, Q, 2 * J] and of the attention [n, Q, J]; `products` are used up."""
    x, y = fraction
    above, above_right, below, below_right = (p.view(attention.shape) for p in products)
    slope_above, slope_below = above_right.sub_(above), below_right.sub_(below)
    value_above, value_below = above.addcmul_(x, slope_above), below.addcmul_(x, slope_below)
    down = value_below.sub_(value_above)
    torch.addcmul(value_above, y, down, out=on_weight)
    right = slope_above.addcmul_(y, slope_below.sub_(slope_above))
    for axis, slope in enumerate((right, down)):
        torch.mul(slope.mul_(attention), table.size[axis::2], out=on_location[..., axis::2])


def _transposed(
    grad: Tensor, index: Tensor, corners: Sequence[Tensor], rows: int, table: Table
) -> list[tuple[int, Tensor]]:
    """The gradient of a table as sums [rows, D], each with the number of rows by which it is to be shifted down.

    grad [n * Q, D], index int32 [n * Q * J], corners: weights [n, Q, J] each
    """
    owner = torch.arange(len(grad), dtype=torch.int32)[:, None].expand(-1, corners[0].shape[-1]).flatten()
    weights, shifts = [corner.flatten() for corner in corners], list(table.shifts)
    if len(index) < rows:  # few samples: sorting four times as many costs less than writing four tables
        index, owner = torch.cat([index + shift for shift in shifts]), owner.repeat(4)
        weights, shifts = [torch.cat(weights)], [0]
    order = index.argsort(stable=True)
    ends = torch.bincount(index, minlength=rows).cumsum(0)
    offsets = torch.cat([ends.new_zeros(1), ends]).int()
    source = owner.index_select(0, order)  # `owner[order]` takes seven times as long
    sums = []
    for shift, weight in zip(shifts, weights, strict=True):
        weight = weight.index_select(0, order)
        options: dict[str, Any] = {"mode": "sum", "per_sample_weights": weight, "include_last_offset": True}
        sums.append((shift, F.embedding_bag(source, grad, offsets, **options)))
    return sums


def _cut(sums: list[tuple[int, Tensor]], grad: Tensor, shapes: list[tuple[int, int]], table: Table) -> None:
    """Write the shifted sums [n * R, D] into the gradient of some heads' values, [S, n, D], without the borders."""
    heads, dim = grad.shape[1:]
    start = 0
    for (h, w), origin in zip(shapes, table.origins, strict=True):
        windows = [_window(s.view(heads, table.rows, dim), h, w, origin - shift, table.pitch) for shift, s in sums]
        for other in windows[1:]:
            windows[0].add_(other)  # [n, h, w, D]
        grad[start : start + h * w].unflatten(0, (h, w)).copy_(windows[0].permute(1, 2, 0, 3))
        start += h * w
