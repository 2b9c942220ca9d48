"""The only file that knows torch.distributed. Without a launcher everything is rank 0 of 1."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as td
from torch import Tensor, nn


def init(device: torch.device) -> None:
    """Join the process group that torchrun announced in the environment; does nothing for a single process."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not td.is_initialized():
        td.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=5))


def close() -> None:
    if td.is_initialized():
        td.destroy_process_group()


def rank() -> int:
    return td.get_rank() if td.is_initialized() else 0


def world() -> int:
    return td.get_world_size() if td.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over all ranks, in place; the tensor itself where there is one rank."""
    if td.is_initialized():
        td.all_reduce(tensor)
    return tensor


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on every rank when it is true on one."""
    return bool(all_reduce_sum(torch.tensor(float(flag), device=device)).item()) if td.is_initialized() else flag


def barrier() -> None:
    if td.is_initialized():
        td.barrier()


def wrap(module: nn.Module, device: torch.device) -> nn.Module:
    """The module whose forward synchronises gradients. It must be the strategy: calling methods of a wrapped
    student instead would leave its gradients unsynchronised without any error."""
    if not td.is_initialized():
        return module
    ids = [device.index or 0] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(module, device_ids=ids, broadcast_buffers=False)
