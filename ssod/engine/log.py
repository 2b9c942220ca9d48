"""What a run writes while it trains: one progress line, results.csv, TensorBoard events."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ssod import dist
from ssod.report.table import Table


class Averages:
    """Means of named numbers between two log lines. Tensors stay on their device until `read`."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)

    def add(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums[name] + (value.detach() if isinstance(value, Tensor) else value)
            self._counts[name] += 1

    def read(self) -> dict[str, float]:
        """The means so far, in one transfer; starts anew."""
        values = {n: torch.as_tensor(v, dtype=torch.float32) for n, v in self._sums.items()}
        sums: dict[str, float] = {}
        for device in {v.device for v in values.values()}:  # numbers of the host do not travel to the device and back
            own = {n: v for n, v in values.items() if v.device == device}
            sums.update(zip(own, torch.stack(list(own.values())).tolist(), strict=True))
        out = {n: sums[n] / self._counts[n] for n in values}
        self._sums.clear()
        self._counts.clear()
        return out


def over_ranks(values: dict[str, float]) -> dict[str, float]:
    """The mean of each named number over the ranks that have it."""
    ranks = dist.gather(values)
    names = {n: None for one in ranks for n in one}  # in the first one's order
    return {n: sum(own := [r[n] for r in ranks if n in r]) / len(own) for n in names}


class Logger:
    """Console, results.csv and, where `tensorboard` is installed, events in the run folder. Only rank 0 writes."""

    def __init__(self, folder: Path, iters: int, start: int, active: bool) -> None:
        self.active = active
        if not active:
            return
        self.table = Table(folder / "results.csv", until_step=start)
        every = 1.0 if sys.stdout.isatty() else 20.0  # seconds; a log file needs no animation
        self.bar = tqdm(total=iters, initial=start, unit="it", dynamic_ncols=True, file=sys.stdout, mininterval=every)
        self.events = _tensorboard(folder)

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if self.active:
            self.bar.write(text, file=sys.stdout)

    def step(self, step: int) -> None:
        if self.active:
            self.bar.update(step + 1 - self.bar.n)

    def back_to(self, step: int) -> None:
        """Forget the rows behind a step, which are done again."""
        if self.active:
            self.table = Table(self.table.path, until_step=step)
            self.bar.n = step

    def row(self, step: int, values: dict[str, float]) -> None:
        if not self.active:
            return
        self.table.add({"step": step, **values})
        if self.events is not None:
            for name, value in values.items():
                self.events.add_scalar(name, value, step)
        if any(n.startswith("sup/") for n in values):
            self.bar.set_postfix_str(progress_text(values), refresh=False)

    def close(self) -> None:
        if self.active:
            self.bar.close()
            if self.events is not None:
                self.events.close()


def progress_text(values: dict[str, float]) -> str:
    """Losses apart, then what the teacher gave: "sup 1.21  unsup 0.42 | 12.3 boxes/img, 41% kept, tau 0.62"."""
    total = {kind: sum(v for n, v in values.items() if n.startswith(f"{kind}/")) for kind in ("sup", "unsup")}
    text = f"sup {total['sup']:.3f}"
    if any(n.startswith("unsup/") for n in values):
        text += f" unsup {total['unsup']:.3f}"
    if "pseudo/per_image" in values:
        text += (
            f" | {values['pseudo/per_image']:.1f} boxes/img, {values['pseudo/kept']:.0%} kept, "
            f"tau {values['pseudo/tau']:.2f}"
        )
    if "mined/per_image" in values:
        text += f" | {values['mined/per_image']:.2f} mined/img"
    return text


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # the extra `tb` is not installed: the CSV has everything
        return None
    return SummaryWriter(str(folder / "tensorboard"))
