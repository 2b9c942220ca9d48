"""Two hundred SIGKILLs over a run that saves after every step: no acknowledged checkpoint is lost or damaged."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ssod.checkpoint import load_last_good
from ssod.config import load_config
from ssod.engine.callbacks import Callbacks, State
from ssod.engine.trainer import SemiTrainer

Tiny = dict[str, Any]
KILLS = 200


def start(values: Tiny) -> tuple[int, int]:
    """Train in a fork of this process, which has loaded everything: its id, and a pipe that says each saved step."""
    reads, writes = os.pipe()
    child = os.fork()
    if child:
        os.close(writes)
        return child, reads
    try:
        os.close(reads)
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115

        def saved(state: State) -> None:
            if state.file is not None and state.file.name == "last.pt":
                os.write(writes, f"{state.step}\n".encode())

        SemiTrainer(load_config("train", values), Callbacks({"on_save": saved})).train()
    finally:
        os._exit(1)


@pytest.mark.slow
@pytest.mark.fault(1)
@pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has loaded torch")
def test_no_saved_step_is_ever_lost(tiny: Tiny) -> None:
    values = tiny | {"iters": 10**6, "burn_in": 2, "save_interval": 1, "val_interval": 10**6, "film": 0}
    run = Path(str(tiny["project"])) / "train" / "exp"
    draw = random.Random(0)
    known, inside = 0, 0
    for kill in range(KILLS):
        child, reads = start({"resume": str(run)} if kill else values)
        for _ in range(draw.randint(1, 4)):
            said = os.read(reads, 4096)
            assert said, f"the run ended by itself after kill {kill}"
            known = int(said.split()[-1])
        time.sleep(draw.random() * 0.3)  # a step, and a save, take some tenths of a second
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        known = max([known, *(int(s) for s in os.read(reads, 4096).split())])
        os.close(reads)
        inside += any(p.suffix != ".pt" for p in (run / "weights").iterdir())  # a file that was being written
        content, _ = load_last_good(run / "weights")
        assert content["train"]["step"] >= known, f"kill {kill}"
    assert inside > 0, "no kill fell into a save"
