"""Which number format a network runs in."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn

from ssod.errors import UserError
from ssod.ops.forms import wide_vectors


def amp_dtype(choice: bool | str, device: torch.device, module: nn.Module) -> torch.dtype | None:
    """The autocast dtype, or None for float32.

    auto: bf16 on CUDA devices that have it (fp16 elsewhere) and on CPUs with bf16 instructions; never on a CPU for a
    network with depthwise convolutions, which run 1.3-1.7x slower in bf16 there.
    """
    if choice is False:
        return None
    if choice == "fp16":
        if device.type != "cuda":
            raise UserError(f"amp=fp16 needs a CUDA device, and the device is {device.type}. Use amp=bf16 or amp=auto.")
        return torch.float16
    if choice == "bf16":
        return torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    depthwise = any(isinstance(m, nn.Conv2d) and m.groups > 1 and m.groups == m.in_channels for m in module.modules())
    return torch.bfloat16 if cpu_has_bf16() and not depthwise else None


def cpu_has_bf16() -> bool:
    """Whether oneDNN has bf16 kernels faster than float32 ones on this CPU."""
    known = [getattr(torch.cpu, n, None) for n in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return any(bool(f()) for f in known if f is not None)


def lay_out(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Put the kernels' weights where half precision wants them (channels_last), in place, and so float32 on CPUs with
    512-bit vectors; elsewhere float32 stays as it is.

    A weight in another layout than its gradient is copied at every step: on a CPU an eighth of an FCOS step at 320 px.
    """
    on_cpu = next(module.parameters()).device.type == "cpu"
    if dtype is not None or (on_cpu and wide_vectors()):
        module.to(memory_format=torch.channels_last)


def autocast(dtype: torch.dtype | None, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device.type, dtype) if dtype is not None else contextlib.nullcontext()
