"""Another batch than the recipe's: the rule of ssod/recipe.py, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssod.config import load_config
from ssod.recipe import rescale

RECIPE = {
    "nominal_batch": 32,
    "batch": 32,
    "batch_unlabeled": 32,
    "lr0": 0.01,
    "iters": 180000,
    "burn_in": 2000,
    "warmup_iters": 1000,
    "ema_decay": 0.9996,
    "milestones": [0.67, 0.89],
    "strategy": {"name": "mean_teacher", "ramp": 400},
}


def test_a_quarter_of_the_batch_by_hand() -> None:
    values, notes = rescale(RECIPE, {"batch": 8})
    assert values["batch_unlabeled"] == 8
    assert values["lr0"] == pytest.approx(0.0025)
    assert (values["iters"], values["burn_in"], values["warmup_iters"]) == (720000, 8000, 4000)
    assert values["ema_decay"] == pytest.approx(0.9999, abs=1e-6)  # four of these steps forget as one of those
    assert values["strategy"]["ramp"] == 1600
    assert values["milestones"] == [0.67, 0.89]
    assert "batch 8 instead of the recipe's 32: batch_unlabeled 32 -> 8, iters 180000 -> 720000" in notes[0]


def test_adamw_takes_the_square_root_and_shares_stay() -> None:
    values, _ = rescale({**RECIPE, "optimizer": "adamw", "burn_in": 0.25}, {"batch": 8})
    assert values["lr0"] == pytest.approx(0.005)
    assert values["burn_in"] == 0.25


def test_what_the_user_gives_is_taken_as_it_is() -> None:
    values, notes = rescale(RECIPE, {"batch": 16, "lr0": 0.3, "epochs": 5, "strategy": {"ramp": 7}})
    assert values["lr0"] == 0.01  # the recipe's, which the given one then covers
    assert values["iters"] == 180000
    assert values["strategy"]["ramp"] == 400
    assert "lr0" not in notes[0]


@pytest.mark.parametrize("given", [{}, {"batch": 32}, {"lr0": 1.0}])
def test_the_recipes_own_batch_changes_nothing(given: dict[str, object]) -> None:
    assert rescale(RECIPE, given) == (RECIPE, [])
    without = {k: v for k, v in RECIPE.items() if k != "nominal_batch"}
    assert rescale(without, {"batch": 2}) == (without, [])


def test_a_config_says_it_once_and_is_not_rescaled_again(tmp_path: Path) -> None:
    from ssod.config import to_yaml

    file = tmp_path / "r.yaml"
    file.write_text("nominal_batch: 16\nbatch: 16\nlr0: 0.02\niters: 100\n")
    config = load_config("train", {"cfg": str(file), "batch": 4})
    assert (config.lr0, config.iters, len(config.notes)) == (0.005, 400, 1)
    (tmp_path / "args.yaml").write_text(to_yaml(config))
    again = load_config("train", {"cfg": str(tmp_path / "args.yaml")})
    assert (again.lr0, again.iters, again.notes) == (0.005, 400, [])
