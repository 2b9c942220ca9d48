"""Deformable attention on CUDA: one program per image, query and head, forward and backward.

A program holds its J = L * T samples as the rows and the D channels as the columns of a block, and reads the four cells
around each sample. Sums are in float32 whatever the dtype of the values. In the backward pass many queries meet in one
cell: they add with atomics, so the gradient of the values differs in its last bits from run to run.

This file imports triton, which few machines without a GPU have: import it only where it is used.
Letters as in `ssod.nn.deform_attn`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable


def deform_attn_triton(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """As `ssod.nn.deform_attn.deform_attn`, for float32, bfloat16 or float16 values. Differentiable once."""
    assert value.shape[1] == sum(h * w for h, w in shapes), "the kernels would read beyond the values"
    assert locations.shape == (*weights.shape, 2)
    maps = _maps(tuple(shapes), value.device)
    return _Samples.apply(value.contiguous(), locations.float().contiguous(), weights.float().contiguous(), maps)


@lru_cache(maxsize=64)
def _maps(shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """int32 [L, 3]: height, width and first cell of each level. Cached: a copy to the device would wait for it."""
    table, start = [], 0
    for h, w in shapes:
        table.append([h, w, start])
        start += h * w
    return torch.tensor(table, dtype=torch.int32, device=device)


class _Samples(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, locations: Tensor, weights: Tensor, maps: Tensor) -> Tensor:
        batch, queries, heads = weights.shape[:3]
        out = torch.empty(batch, queries, heads, value.shape[-1], dtype=value.dtype, device=value.device)
        if out.numel():
            grid, sizes = _launch(value, weights)
            with torch.cuda.device_of(value):  # a kernel starts on the current device, wherever its tensors are
                _forward[grid](value, locations, weights, maps, out, **sizes)
        ctx.save_for_backward(value, locations, weights)
        ctx.maps = maps  # not saved as the others: it may come from inference mode, where nothing can be saved
        return out.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        value, locations, weights = ctx.saved_tensors
        grad_value = torch.zeros(value.shape, dtype=torch.float32, device=value.device)
        grad_locations, grad_weights = torch.empty_like(locations), torch.empty_like(weights)
        if weights.numel():
            grid, sizes = _launch(value, weights)
            results = grad_value, grad_locations, grad_weights
            with torch.cuda.device_of(value):
                _backward[grid](value, locations, weights, ctx.maps, grads[0].contiguous(), *results, **sizes)
        return grad_value.to(value.dtype), grad_locations, grad_weights, None


def _launch(value: Tensor, weights: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """The grid and the sizes that the kernels are compiled for."""
    batch, queries, heads, levels, points = weights.shape
    cells, dim = value.shape[1], value.shape[-1]
    sizes = {
        "cells": cells,
        "queries": queries,
        "heads": heads,
        "dim": dim,
        "points": points,
        "samples": levels * points,
        "block_samples": triton.next_power_of_2(levels * points),
        "block_dim": triton.next_power_of_2(dim),
        "num_warps": 1,  # a block of 16 x 32 is 16 numbers a thread; more warps would have to exchange their sums
    }
    return (batch * queries * heads,), sizes


@triton.jit
def _places(
    locations: tl.tensor,
    weights: tl.tensor,
    maps: tl.tensor,
    program: tl.tensor,
    points: tl.constexpr,
    samples: tl.constexpr,
    block_samples: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """Of each sample: in use, attention, map (height, width, first cell), the cell above left, the rest beyond it."""
    j = tl.arange(0, block_samples)
    used = j < samples
    at = program * samples + j
    attention = tl.load(weights + at, mask=used, other=0.0)
    level = maps + 3 * (j // points)
    height = tl.load(level, mask=used, other=1)
    width = tl.load(level + 1, mask=used, other=1)
    first = tl.load(level + 2, mask=used, other=0)
    x = tl.load(locations + 2 * at, mask=used, other=0.0) * width - 0.5
    y = tl.load(locations + 2 * at + 1, mask=used, other=0.0) * height - 0.5
    left, top = tl.floor(x), tl.floor(y)
    return used, attention, height, width, first, left, top, x - left, y - top


@triton.jit
def _cell(
    row: tl.tensor,
    column: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    first: tl.tensor,
    used: tl.tensor,
    lanes: tl.tensor,
    step: tl.tensor,
    dim: tl.tensor,
) -> tuple[tl.tensor, ...]:
    """Offsets [J, D] of the numbers of a cell within one image's head, and which of them exist."""
    inside = used & (row >= 0) & (row < height) & (column >= 0) & (column < width)  # in float: NaN and inf are outside
    cell = tl.where(inside, row * width + column, 0.0).to(tl.int32) + first
    return cell[:, None] * step + lanes[None, :], inside[:, None] & (lanes < dim)[None, :]


@triton.jit
def _forward(
    value: tl.tensor,
    locations: tl.tensor,
    weights: tl.tensor,
    maps: tl.tensor,
    out: tl.tensor,
    cells: tl.tensor,
    queries: tl.tensor,
    heads: tl.constexpr,
    dim: tl.constexpr,
    points: tl.constexpr,
    samples: tl.constexpr,
    block_samples: tl.constexpr,
    block_dim: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)  # (image, query, head), in the order of `out`
    used, attention, height, width, first, left, top, fx, fy = _places(
        locations, weights, maps, program, points, samples, block_samples
    )
    lanes = tl.arange(0, block_dim)
    step = heads * dim
    base = value + (program // (queries * heads)) * cells * step + (program % heads) * dim
    total = tl.zeros([block_samples, block_dim], dtype=tl.float32)
    for below in tl.static_range(2):
        for right in tl.static_range(2):
            offset, exists = _cell(top + below, left + right, height, width, first, used, lanes, step, dim)
            share = (fx if right else 1 - fx) * (fy if below else 1 - fy) * attention
            total += tl.load(base + offset, mask=exists, other=0.0).to(tl.float32) * share[:, None]
    tl.store(out + program * dim + lanes, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=lanes < dim)


@triton.jit
def _backward(
    value: tl.tensor,
    locations: tl.tensor,
    weights: tl.tensor,
    maps: tl.tensor,
    upstream: tl.tensor,
    grad_value: tl.tensor,
    grad_locations: tl.tensor,
    grad_weights: tl.tensor,
    cells: tl.tensor,
    queries: tl.tensor,
    heads: tl.constexpr,
    dim: tl.constexpr,
    points: tl.constexpr,
    samples: tl.constexpr,
    block_samples: tl.constexpr,
    block_dim: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)
    used, attention, height, width, first, left, top, fx, fy = _places(
        locations, weights, maps, program, points, samples, block_samples
    )
    lanes = tl.arange(0, block_dim)
    step = heads * dim
    base = (program // (queries * heads)) * cells * step + (program % heads) * dim
    grad = tl.load(upstream + program * dim + lanes, mask=lanes < dim, other=0.0).to(tl.float32)
    on_weight = tl.zeros([block_samples], dtype=tl.float32)
    on_x = tl.zeros([block_samples], dtype=tl.float32)
    on_y = tl.zeros([block_samples], dtype=tl.float32)
    for below in tl.static_range(2):
        for right in tl.static_range(2):
            offset, exists = _cell(top + below, left + right, height, width, first, used, lanes, step, dim)
            of_x = fx if right else 1 - fx
            of_y = fy if below else 1 - fy
            product = tl.load(value + base + offset, mask=exists, other=0.0).to(tl.float32) * grad[None, :]
            product = tl.sum(product, axis=1)
            on_weight += product * of_x * of_y
            on_x += product * of_y * (1 if right else -1)
            on_y += product * of_x * (1 if below else -1)
            share = of_x * of_y * attention
            tl.atomic_add(grad_value + base + offset, share[:, None] * grad[None, :], mask=exists, sem="relaxed")
    at = program * samples + tl.arange(0, block_samples)
    tl.store(grad_weights + at, on_weight, mask=used)
    tl.store(grad_locations + 2 * at, on_x * attention * width, mask=used)
    tl.store(grad_locations + 2 * at + 1, on_y * attention * height, mask=used)
