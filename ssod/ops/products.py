"""Products of matrices by oneDNN, forward and backward: linear layers and 1x1 convolutions in float32 on a CPU.

torch hands float32 products to MKL, which on some CPUs keeps to half of their vector width: on Zen 5 oneDNN takes 0.45
of its time (docs/performance.md). 1x1 convolutions of few images go the same way as long as torch has one thread; with
more it takes oneDNN by itself. oneDNN's product is an operator that torch's own compiler calls, without a gradient.

Letters: B images, M rows, C features in, K out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssod.ops.forms import plain, wide_vectors

LEAST = 4_000_000  # multiplications: fewer are over before the call is


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b + bias, [M, C] @ [C, K], of any strides, without gradient."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(_dense(a), _dense(b).t(), bias, "none", [], "")
    return result


def _dense(x: Tensor) -> Tensor:
    """A matrix without gaps between its rows, or columns: with them oneDNN may take a hundred times as long."""
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()


def pays(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` is the faster way to multiply x [..., C] and weight [K, C]: float32 on a CPU with 512-bit
    vectors, and enough of it. Never while a graph is made, nor inside `plain_forms`."""
    if plain() or not wide_vectors() or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    enough = x.numel() * weight.shape[0] >= LEAST
    return enough and x.dtype == weight.dtype == torch.float32 and _there()


def pays_as_convolution(x: Tensor, weight: Tensor) -> bool:
    """The same of `convolve`, x [B, C, h, w] and weight [K, C, 1, 1]."""
    return pays(x, weight) and torch.get_num_threads() == 1  # in this order: torch.compile cannot count threads


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., C], weight [K, C], bias [K] -> [..., K], differentiable once. All float32 on a CPU."""
    rows: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    return rows.view(*x.shape[:-1], -1)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The convolution of stride 1 with a 1x1 kernel, differentiable once.

    x [B, C, h, w] of any layout (channels last is not copied), weight [K, C, 1, 1], bias [K], all float32 on a CPU.
    Returns [B, K, h, w], channels last.
    """
    result: Tensor = _Convolve.apply(x, weight, bias)
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight.t(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return _gradients(ctx, grad, *ctx.saved_tensors)


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _as_maps(product(_as_rows(x), weight.flatten(1).t(), bias), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = _gradients(ctx, _as_rows(grad), _as_rows(x), weight.flatten(1))
        of_x = None if of_x is None else _as_maps(of_x, grad)
        return of_x, None if of_weight is None else of_weight.view_as(weight), of_bias


def _gradients(ctx: Any, grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of x [M, C], weight [K, C] and bias, as far as they are asked for; grad [M, K]."""
    of_x, of_weight, of_bias = ctx.needs_input_grad
    return (
        product(grad, weight) if of_x else None,
        product(grad.t(), x) if of_weight else None,
        grad.sum(0) if of_bias else None,
    )


def _as_rows(x: Tensor) -> Tensor:
    """[B, C, h, w] -> [B * h * w, C]."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _as_maps(rows: Tensor, like: Tensor) -> Tensor:
    """[B * h * w, K] -> [B, K, h, w] of as many and as large maps as `like` has, in the same memory.

    Not as a view: autograd would copy whole gradients wherever what follows, a ReLU, works in place.
    """
    (b, _, h, w), k = like.shape, rows.shape[1]
    return rows.new_empty(0).set_(rows.untyped_storage(), 0, (b, k, h, w), (h * w * k, 1, w * k, k))


def _there() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
