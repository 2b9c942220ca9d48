"""`device=0,1`: one process a device, started by torchrun's elastic launcher, which ends them all when one fails."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from ssod.errors import UserError


def devices_of(device: str | int) -> list[str]:
    """The devices that a `device` value names: "0,1" -> ["0", "1"], "cpu,cpu" -> two processes on the CPU.

    Raises UserError for a list that mixes CPU and CUDA, or has a device twice.
    """
    found = [d.strip() for d in str(device).split(",")]
    if len(found) == 1:
        return found
    if set(found) == {"cpu"}:
        return found
    if not all(d.isdigit() for d in found):
        raise UserError(f"device={device}: give several as their numbers, device=0,1, or device=cpu,cpu.")
    if len(set(found)) < len(found):
        raise UserError(f"device={device} names a device twice.")
    return found


def launched() -> bool:
    """Whether this process is one that a launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def launch(mode: str, words: Sequence[str], devices: Sequence[str], max_restarts: int = 0) -> int:
    """Run `ssod MODE words` as one process a device on this machine; the exit code of the first that failed.

    words         what follows the mode on the command line, without device=
    max_restarts  how often all of them are started again after one has failed; a training then goes on from its last
                  checkpoint
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if devices[0] != "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=len(devices),
        run_id=f"ssod-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=max_restarts,
    )
    kind = "cpu" if devices[0] == "cpu" else "cuda"
    try:
        elastic_launch(config, sys.executable)("-m", "ssod", mode, *words, f"device={kind}")
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 1
    except SignalException as stop:
        return 128 + stop.sigval
    return 0
