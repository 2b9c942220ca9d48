"""The only file that knows torch.distributed. Without a launcher everything is rank 0 of 1."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as td
from torch import Tensor, nn

T = TypeVar("T")

JOIN = 300.0  # seconds in which all processes must have found each other


def init(device: torch.device) -> torch.device:
    """Join the process group that torchrun announced in the environment, and return this process's device: on CUDA
    the one of its local rank. A single process keeps its device and joins nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    if not td.is_initialized():
        # Gloo may wait for a connection for ever, whatever timeout it is given.
        patience = threading.Timer(JOIN, _give_up)
        patience.daemon = True
        patience.start()
        timeout = timedelta(minutes=5)
        try:
            found, own_rank, size = next(td.rendezvous("env://", timeout=timeout))
            td.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=td.PrefixStore(_attempt(), found),
                rank=own_rank,
                world_size=size,
                timeout=timeout,
            )
        finally:
            patience.cancel()
    if device.type != "cuda":
        return device
    own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(own)
    return own


def _attempt() -> str:
    """Prefix of this start's keys in the launcher's store. The store outlives a restart, and with it the addresses of
    dead processes, which the new ones would wait for."""
    return f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _give_up() -> None:
    """End this process, whose main thread waits where no exception reaches it; the launcher then ends the others."""
    found = {name: os.environ.get(name, "?") for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    sys.stderr.write(
        "ssod: process {RANK} of {WORLD_SIZE} could not join the others at {MASTER_ADDR}:{MASTER_PORT} ".format(**found)
        + f"within {JOIN:.0f} seconds. Check that every machine reaches that address, and start the run again.\n"
    )
    sys.stderr.flush()
    os._exit(1)


def close() -> None:
    if td.is_initialized():
        td.destroy_process_group()


def rank() -> int:
    return td.get_rank() if td.is_initialized() else 0


def world() -> int:
    return td.get_world_size() if td.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def agree(value: int, device: torch.device) -> int:
    """The largest of all ranks' values, on every rank."""
    if not td.is_initialized():
        return value
    largest = torch.tensor(value, device=device)
    td.all_reduce(largest, td.ReduceOp.MAX)
    return int(largest)


def average(tensors: list[Tensor]) -> None:
    """Put the mean over all ranks into each tensor, in one message; they are of one dtype and device."""
    if not td.is_initialized() or not tensors:
        return
    flat = all_reduce_sum(torch.cat([t.flatten() for t in tensors])) / td.get_world_size()
    parts = flat.split([t.numel() for t in tensors])
    torch._foreach_copy_(tensors, [p.view_as(t) for p, t in zip(parts, tensors, strict=True)])


def gather(value: T) -> list[T]:
    """What each rank has, rank by rank, on every rank. Values are pickled."""
    found: list[Any] = [value] * world()
    if td.is_initialized():
        td.all_gather_object(found, value)
    return found


def store() -> td.Store:
    """A connection of its own to the launcher's key-value store: another thread may use it."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return td.PrefixStore(f"ssod/{_attempt()}", td.TCPStore(address, port, is_master=False))


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over all ranks, in place; the tensor itself where there is one rank."""
    if td.is_initialized():
        td.all_reduce(tensor)
    return tensor


def from_main(make: Callable[[], T]) -> T:
    """What `make` returns on rank 0, on every rank; the others do not call it. What it raises, all raise."""
    made: list[Any] = [None, None]
    if is_main():
        try:
            made[0] = make()
        except Exception as error:
            made[1] = error
    if td.is_initialized():
        td.broadcast_object_list(made)
    if made[1] is not None:
        raise made[1]
    return made[0]


def shared(count: Tensor, least: float = 1.0) -> Tensor:
    """What a loss, a sum over this rank's candidates, is divided by so that the gradients, which are averaged over the
    ranks, are those of one process with all images: the sum of all ranks' counts, at least `least`, by the number of
    ranks. Every rank must call it equally often."""
    if not td.is_initialized():
        return count.clamp(min=least)
    return all_reduce_sum(count.detach().clone()).clamp(min=least) / td.get_world_size()


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
