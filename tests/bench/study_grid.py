"""A study's grid: which settings are compared, over which seeds, and how each of them is told from others.

    title: one line, the heading of the page
    cfg: demo_full.yaml                  # a recipe of the package beneath everything (may be left out)
    base: {batch: 4}                     # values of every arm
    control: supervised                  # arm that the others are compared with
    seeds: [0, 1, 2]
    arms:
      supervised: {strategy: {name: supervised, ema: true}}
      mean_teacher: {strategy: {name: mean_teacher, tau: 0.7}}

Precedence: recipe < base < arm < command line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ssod.config import find_yaml, load_config, merge, read_cfg, read_yaml
from ssod.engine.setup import check_options
from ssod.errors import UserError, did_you_mean

KEYS = {"title", "cfg", "base", "control", "seeds", "arms"}
# Where a run lies and what it runs on, not what it learns: no part of the hash.
PLACE = {"project", "name", "exist_ok", "device", "workers", "verbose", "plots", "data_path", "cache", "seed"}


@dataclass(frozen=True)
class Grid:
    """arms: {name: values of a training config}; control: one of the arms, or the empty string."""

    title: str
    control: str
    seeds: tuple[int, ...]
    arms: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Run:
    """One training run. config: the arm's YAML; digest: of what the run learns from, without its seed."""

    arm: str
    seed: int
    config: Path
    digest: str

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.seed}-{self.digest}"


def read_grid(
    path: Path, given: Mapping[str, Any], arms: Sequence[str] | None = None, seeds: Sequence[int] | None = None
) -> Grid:
    """The grid of a YAML; `given` are training values from the command line, `arms` and `seeds` a part of the grid.

    Raises UserError for an unknown key or arm and for a grid without arms.
    """
    content = read_yaml(path)
    for key in content:
        if key not in KEYS:
            raise UserError(f"{path}: '{key}' is not a key of a grid.{did_you_mean(key, KEYS)}")
    known = content.get("arms")
    if not isinstance(known, dict) or not known:
        raise UserError(f"{path} has no arms; give `arms:` with a name and its values for each.")
    for arm in arms or ():
        if arm not in known:
            raise UserError(f"{path} has no arm '{arm}'.{did_you_mean(arm, known)} Arms: {', '.join(known)}.")
    chosen = list(arms or known)
    control = content.get("control", "")
    if control and control not in known:
        raise UserError(f"{path}: control={control} is none of its arms: {', '.join(known)}.")

    recipe = read_cfg(find_yaml(content["cfg"])) if "cfg" in content else {}
    base = merge(recipe, content.get("base") or {})
    values = {arm: merge(merge(base, known[arm] or {}), given) for arm in chosen}
    use = tuple(content.get("seeds", [0, 1, 2]) if seeds is None else seeds)
    return Grid(content.get("title", path.stem), control, use, values)


def runs_of(grid: Grid, out: Path) -> list[Run]:
    """All runs, seed by seed; writes each arm's YAML into out/arms and checks it as `ssod train` would.

    Raises UserError for the first value that does not fit.
    """
    folder = out / "arms"
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, tuple[Path, str]] = {}
    for arm, values in grid.arms.items():
        path = folder / f"{arm}.yaml"
        path.write_text(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True), encoding="utf-8")
        try:
            check_options(load_config("train", {"cfg": str(path)}))
        except UserError as error:
            raise UserError(f"arm {arm}: {error}") from None
        found[arm] = path, digest(values)
    return [Run(arm, seed, *found[arm]) for seed in grid.seeds for arm in grid.arms]


def digest(values: Mapping[str, Any]) -> str:
    """Eight hex digits of what is learned from: equal for equal values, wherever files lie (weights by content)."""
    kept = _by_content({k: v for k, v in values.items() if k not in PLACE})
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:8]


def _by_content(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {k: _by_content(v, k) for k, v in value.items()}
    if key.endswith("weights") and isinstance(value, str) and Path(value).is_file():
        return hashlib.sha256(Path(value).read_bytes()).hexdigest()
    return value
