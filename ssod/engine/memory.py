"""How much memory the process has; out of memory, told from other errors and said with what to lower."""

from __future__ import annotations

import gc
import resource
import traceback
from pathlib import Path

import torch

from ssod.errors import Fault
from ssod.modes import TrainConfig

SAID = ("can't allocate memory", "not enough memory", "out of memory")  # by torch's CPU allocator and by CUDA libraries

STATM = Path("/proc/self/statm")


def resident() -> dict[str, float]:
    """{"memory/rss": MB of this process that lie in RAM}, a figure of the log; {} where the system does not say."""
    if not STATM.exists():  # Linux has it
        return {}
    return {"memory/rss": int(STATM.read_bytes().split()[1]) * resource.getpagesize() / 1e6}


def ran_out(error: BaseException) -> bool:
    """Whether an error is one of memory. What the failed step held is then let go, so that there is room to save."""
    if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not (
        isinstance(error, RuntimeError) and any(words in str(error).lower() for words in SAID)
    ):
        return False
    traceback.clear_frames(error.__traceback__)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return True


def memory_fault(config: TrainConfig, step: int, folder: Path) -> Fault:
    """What to say of it: how to go on, and with what."""
    half = max(1, config.batch // 2)
    return Fault(
        f"out of memory in step {step + 1}, saved before it. `ssod train resume={folder}` goes on where more memory "
        f"is free; or start again with batch={half} accumulate={2 * config.accumulate}, which learns the same, or a "
        f"smaller imgsz than {config.imgsz}."
    )
