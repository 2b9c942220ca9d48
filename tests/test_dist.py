"""Two processes under torchrun (gloo): one run, one folder, the same networks on both ranks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ssod import dist
from ssod.checkpoint import load_checkpoint


def test_a_single_process_is_rank_0_of_1() -> None:
    import torch

    assert (dist.rank(), dist.world(), dist.is_main()) == (0, 1, True)
    assert dist.all_reduce_sum(torch.tensor([2.0])).item() == 2.0
    assert dist.from_main(lambda: 3) == 3
    module = torch.nn.Linear(1, 1)
    assert dist.wrap(module, torch.device("cpu")) is module


ALONE = """
import torch
from ssod import dist
dist.JOIN = 1.0
dist.init(torch.device("cpu"))
"""


@pytest.mark.fault(16)
def test_a_process_that_finds_no_others_ends_and_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:  # connected to, it never answers
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(mute.getsockname()[1])}
        env = os.environ | place | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
        out = subprocess.run([sys.executable, "-c", ALONE], env=env, capture_output=True, text=True, timeout=100)
    assert out.returncode == 1
    assert (
        f"process 1 of 2 could not join the others at 127.0.0.1:{place['MASTER_PORT']} within 1 seconds" in out.stderr
    )


@pytest.mark.slow  # the fast one is in tests/engine/test_ranks.py
def test_two_ranks_train_a_detector_of_two_stages(tiny: dict[str, Any], tmp_path: Path) -> None:
    config = tmp_path / "two.yaml"
    config.write_text(yaml.safe_dump(tiny | {"detector": {"name": "faster_rcnn", "fpn_channels": 32}, "batch": 4}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    out = subprocess.run(
        [*command, "-m", "ssod", "train", f"cfg={config}"], capture_output=True, text=True, timeout=200
    )
    assert out.returncode == 0, out.stdout[-2000:] + out.stderr[-2000:]
    folders = list(Path(str(tiny["project"])).glob("train/*"))
    assert [f.name for f in folders] == ["exp"]
    assert load_checkpoint(folders[0] / "weights" / "last.pt")["train"]["step"] == 6
