"""Two processes under torchrun (gloo): one run, one folder, the same networks on both ranks."""

from __future__ import annotations

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
