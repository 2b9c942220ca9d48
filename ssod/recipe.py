"""A recipe's numbers belong to its batch size: another batch rescales them, and every change is said.

With k = batch / nominal_batch, so that a run sees as many images and learns as much from each:

    batch_unlabeled                                                * k
    lr0                                                            * k for SGD (Goyal et al., 2017, linear scaling),
                                                                   * sqrt(k) for AdamW (Malladi et al., 2022)
    iters, warmup_iters, burn_in (in steps), val_interval, save_period, save_interval       / k
    ema_decay                                                      to the power of k: the same memory in images
    strategy.ramp                                                  / k

Shares (milestones, burn_in below 1), epochs and weights stay. What the user gives beside the recipe is taken as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

PER_STEP = ("iters", "warmup_iters", "burn_in", "val_interval", "save_period", "save_interval")
MOST = 10**9  # beyond, and below 1, numbers are left to the config, which refuses them


def rescale(recipe: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The values of a recipe for the batch in `given`, and a line for each one that changed.

    recipe  the YAML's values; nothing happens without `nominal_batch` in it
    given   the command line's, which stay: a value there is never rescaled
    """
    nominal, batch = recipe.get("nominal_batch"), given.get("batch", recipe.get("batch"))
    out = dict(recipe)
    if (
        not isinstance(nominal, int)
        or not isinstance(batch, int)
        or batch == nominal
        or not (0 < batch < MOST and 0 < nominal < MOST)
    ):
        return out, []
    k = batch / nominal
    out["nominal_batch"] = batch  # what is written into the run folder must not be rescaled again
    changed: dict[str, Any] = {}
    if isinstance(recipe.get("batch_unlabeled"), int):
        changed["batch_unlabeled"] = max(1, round(recipe["batch_unlabeled"] * k))
    for key in PER_STEP:
        value = recipe.get(key)
        if isinstance(value, int | float) and 1 <= value < MOST:
            changed[key] = max(1, round(value / k))
    if isinstance(recipe.get("lr0"), int | float):
        # Another optimizer than the recipe's comes with a learning rate of its own.
        changed["lr0"] = _digits(recipe["lr0"] * (math.sqrt(k) if recipe.get("optimizer") == "adamw" else k))
    if isinstance(recipe.get("ema_decay"), float) and 0 < recipe["ema_decay"] < 1:
        changed["ema_decay"] = _digits(recipe["ema_decay"] ** k)
    if given.get("epochs") is not None:
        changed.pop("iters", None)
    changed = {key: value for key, value in changed.items() if key not in given and value != recipe[key]}
    lines = [f"{key} {recipe[key]:g} -> {value:g}" for key, value in changed.items()]

    strategy, own = recipe.get("strategy"), given.get("strategy")
    if isinstance(strategy, Mapping) and isinstance(strategy.get("ramp"), int) and not _names(own, "ramp"):
        ramp = round(strategy["ramp"] / k)
        changed["strategy"] = {**strategy, "ramp": ramp}
        lines.append(f"strategy.ramp {strategy['ramp']} -> {ramp}")
    head = f"batch {batch} instead of the recipe's {nominal}:"
    return {**out, **changed}, [f"{head} {', '.join(lines)}"] if lines else []


def _names(own: Any, option: str) -> bool:
    """Whether the command line sets this option, or another strategy altogether."""
    return isinstance(own, str) or (isinstance(own, Mapping) and (option in own or "name" in own))


def _digits(value: float) -> float:
    """Six significant digits: what a person would write into the YAML."""
    return float(f"{value:.6g}")
