"""The film under each kind of strategy: RPL's running sums, SED without boxes, Co-mining on partly labelled images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ssod.checkpoint import load_checkpoint
from ssod.cli import main
from ssod.config import load_config
from ssod.engine.trainer import SemiTrainer
from ssod.engine.watch.film import Film

Tiny = dict[str, Any]
SHORT = {"val_fraction": 0.25, "max_det": 10, "film": 3, "iters": 4, "burn_in": 2, "val_interval": 2}


def run(overrides: Tiny, **more: Any) -> SemiTrainer:
    trainer = SemiTrainer(load_config("train", overrides | SHORT | more))
    trainer.train()
    return trainer


def moments(trainer: SemiTrainer) -> dict[int, dict[str, Any]]:
    files = sorted((trainer.folder / "pseudo").glob("*.json"))
    return {int(p.stem.removeprefix("step")): json.loads(p.read_text()) for p in files}


def test_running_thresholds_do_not_notice(tiny: Tiny) -> None:
    tiny |= {"strategy": {"name": "rpl", "certainty": False, "tau": 0.06, "teacher": "ema"}}
    without, with_ = run(tiny, film=0, name="without"), run(tiny, film_interval=1, name="with")
    assert list(moments(with_)) == [1, 2, 3, 4]
    a, b = (load_checkpoint(t.folder / "weights" / "last.pt")["train"] for t in (without, with_))
    assert a["strategy"].keys() == b["strategy"].keys()
    assert all(torch.equal(v, b["strategy"][k]) for k, v in a["strategy"].items())
    assert a["strategy"]["balance.sums"].abs().sum() > 0
    tau = with_.strategy.thresholds_in_force()
    assert tau is not None
    assert list(moments(with_)[4]["info"]["tau"].values()) == [round(t, 4) for t in tau.tolist()]


def test_no_box_of_sed_is_kept_or_dropped(tiny: Tiny) -> None:
    trainer = run(tiny | {"strategy": "sed", "detector": tiny["detector"] | {"half_scale": True}})
    told = moments(trainer)
    assert list(told) == [2, 4]
    for content in told.values():
        assert content["info"]["tau"] is None
        assert len(content["annotations"])
        for a in content["annotations"]:
            assert (a["kept"], a["cls_weight"], a["box_weight"]) == (False, None, None)
            assert a["reason"] == "sed learns from all candidates; no box is kept or dropped"


def test_without_unlabelled_images_there_is_no_film(tiny: Tiny) -> None:
    trainer = SemiTrainer(load_config("train", tiny | {"strategy": "supervised"}))
    assert Film(trainer).events() == {}


def test_comining_shows_what_it_mines(tiny: Tiny, shapes_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "sparse"
    assert main(["split", f"data={shapes_data}", f"out={out}", "sparse=hard"]) == 0
    own = {"strategy": {"name": "comining", "tau": 0.01}, "labeled": "all", "augment": "comining"}
    trainer = run(tiny | own, burn_in=0, data=str(out / "hard" / "fold0" / "data.yaml"))
    told = moments(trainer)
    assert {c["info"]["network"] for c in told.values()} == {"student"}
    assert not any(c["info"]["burn_in"] for c in told.values())
    assert any(a["kept"] and "nobody has annotated it" in a["reason"] for a in told[4]["annotations"])
    film = Film(trainer)
    (still,) = film.reel.choose(1)
    assert still.view.complete is not None
    assert not any(still.view.complete)
    pair = film.reel.pair(still.index, 1)
    assert pair is not None
    assert torch.equal(pair[0].matrices, pair[1].matrices), "two views of one geometry"
    assert not torch.equal(pair[0].images, pair[1].images), "in other colours"
