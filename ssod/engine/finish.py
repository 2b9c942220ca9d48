"""The end of a run: metrics.json, plots and drawn predictions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssod import dist
from ssod.engine.log import Logger

if TYPE_CHECKING:
    from ssod.engine.trainer import SemiTrainer


def finish(trainer: SemiTrainer, log: Logger) -> dict[str, Any]:
    """metrics.json, plots and drawn predictions."""
    folder = trainer.folder
    at_burn_in = next((h for h in trainer.history if h["step"] == trainer.plan.burn_in), None)
    final = trainer.history[-1] if trainer.history else {}
    summary = {
        "folder": str(folder),
        "burn_in": at_burn_in["student"] if at_burn_in and trainer.strategy.uses_unlabeled else None,
        "final": {k: v for k, v in final.items() if k not in ("step", "by_class")},
        "best": trainer.best,
        "steps": trainer.step,
        "labeled": len(trainer.data.labeled),
        "unlabeled": len(trainer.data.unlabeled),
        "val": len(trainer.data.val),
        "unreadable": trainer.bad | trainer.bad_val,
        "history": trainer.history,
    }
    for observer in trainer.observers:
        summary |= observer.summary()
    if dist.is_main():
        (folder / "metrics.json").write_text(json.dumps(_no_nan(summary), indent=1), encoding="utf-8")
        if trainer.config.plots:
            from ssod.report.plots import draw_predictions, plot_by_class, plot_run  # matplotlib takes a second to load

            plot_by_class(folder, trainer.history)
            plot_run(folder, log.table, trainer.plan.burn_in if trainer.strategy.uses_unlabeled else None)
            draw_predictions(folder / "predictions.png", folder / "weights" / "best.pt", trainer.data.val[:12])
    return dist.from_main(lambda: summary)  # only the first rank has validated


def _no_nan(value: Any) -> Any:
    """JSON has no NaN: a figure that does not exist becomes null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _no_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_no_nan(v) for v in value]
    return str(value) if isinstance(value, Path) else value
