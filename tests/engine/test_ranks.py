"""Two processes of half the batch each learn what one process learns from all of it."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ssod.checkpoint import load_checkpoint

Tiny = dict[str, Any]
STEPS = 20
FCOS = {"name": "fcos", "fpn_channels": 32, "head_convs": 1}
RETINANET = {"name": "retinanet", "fpn_channels": 32, "head_convs": 1}
# No dropout: two processes draw other numbers than one.
DETR = {"name": "deformable_detr", "width": 64, "queries": 20, "encoder_layers": 1, "decoder_layers": 1, "dropout": 0.0}
HALF = {"half_scale": True}
CASES = {
    "supervised": (FCOS, {"name": "supervised", "ema": True}),
    "mean_teacher": (FCOS, {"name": "mean_teacher", "tau": 0.02, "tau_low": 0.01}),
    "mean_teacher_auto": (FCOS, {"name": "mean_teacher", "tau_low": 0.01, "box_loss": True}),
    "unbiased_teacher": (RETINANET, {"name": "unbiased_teacher", "tau": 0.02}),
    "rpl": (RETINANET | {"codec": "bucket", "buckets": 4}, {"name": "rpl", "tau": 0.05}),
    "prc": (
        FCOS | {"codec": "gaussian"},
        {"name": "prc", "tau": 0.02, "weight": 0.2},
    ),  # at 4 the run is so wild that it magnifies rounding
    "sed": (FCOS | HALF, {"name": "sed"}),
    "lsm": (FCOS | HALF, {"name": "lsm", "tau": 0.03, "alpha": 0.02}),
    "comining": (FCOS, {"name": "comining", "tau": 0.02}),
    "detr": (DETR, {"name": "mean_teacher", "tau": 0.02, "tau_low": 0.01}),
}


@pytest.mark.parametrize(
    ("case", "steps"), [("mean_teacher_auto", 8), *(pytest.param(c, STEPS, marks=pytest.mark.slow) for c in CASES)]
)
def test_two_ranks_equal_one_with_twice_the_batch(tiny: Tiny, tmp_path: Path, case: str, steps: int) -> None:
    detector, strategy = CASES[case]
    # Frozen norms: statistics of half a batch are others. No clipping: it hides a wrong scale of the gradients.
    own = {"detector": detector, "strategy": strategy, "frozen_norm": True, "clip_grad": 0.0, "lr0": 0.002}
    own |= {"iters": steps, "burn_in": 4, "batch": 4, "val_interval": steps, "save_interval": steps, "ema_decay": 0.9}
    if detector is DETR:
        own["lr0"] = 0.0005  # at more, whom a query is matched to hangs on rounding after some steps
    if strategy["name"] == "comining":
        own["augment"] = "comining"
    one, two = (trained(tiny | own, tmp_path, device) for device in ("cpu", "cpu,cpu"))
    for name, value in one["train"]["strategy"].items():
        if value.is_floating_point():
            torch.testing.assert_close(two["train"]["strategy"][name], value, rtol=1e-5, atol=1e-5, msg=name)
    losses = [{n: v for n, v in r["losses"].items() if n.startswith(("sup/", "unsup/"))} for r in (one, two)]
    assert losses[0].keys() == losses[1].keys()
    assert any(n.startswith("sup/") for n in losses[0])
    for name, values in losses[0].items():
        assert losses[1][name] == pytest.approx(values, rel=1e-5, abs=1e-5), name
    assert two["train"]["history"][-1].keys() == one["train"]["history"][-1].keys()


@pytest.mark.slow
@pytest.mark.fault(19)
def test_a_run_resumed_on_two_ranks_sees_the_images_that_one_would_have_seen(tiny: Tiny, tmp_path: Path) -> None:
    own = {"frozen_norm": True, "clip_grad": 0.0, "lr0": 0.002, "burn_in": 3, "batch": 4, "ema_decay": 0.9}
    whole = trained(tiny | own | {"iters": 12}, tmp_path, "cpu")
    trained(tiny | own | {"iters": 5}, tmp_path, "cpu", name="half")
    half = Path(str(tiny["project"])) / "train" / "half"
    assert load_checkpoint(half / "weights" / "last.pt")["train"]["step"] == 5
    resumed = trained({"resume": str(half), "iters": 12}, tmp_path, "cpu,cpu", name="half")
    for name, value in whole["train"]["strategy"].items():
        if value.is_floating_point():
            torch.testing.assert_close(resumed["train"]["strategy"][name], value, rtol=1e-5, atol=1e-5, msg=name)


def trained(config: Tiny, folder: Path, device: str, name: str = "") -> dict[str, Any]:
    name = name or device.replace(",", "-")
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config | ({} if "resume" in config else {"name": name})))
    command = [sys.executable, "-m", "ssod", "train", f"cfg={path}", f"device={device}"]
    out = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert out.returncode == 0, out.stdout[-2000:] + out.stderr[-2000:]
    run = Path(str(config.get("resume") or Path(str(config["project"])) / "train" / name))
    with open(run / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    losses = {n: [float(r[n]) for r in rows if r[n]] for n in rows[0]}
    return load_checkpoint(run / "weights" / "last.pt") | {"losses": losses}
