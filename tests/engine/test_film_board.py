"""TensorBoard: the real event file, read back."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ssod.config import load_config
from ssod.engine.trainer import SemiTrainer
from ssod.engine.watch.audit import read_audit

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="extra `tb`")


def train(tiny: dict[str, Any], **more: Any) -> tuple[SemiTrainer, Any]:
    trainer = SemiTrainer(load_config("train", {"val_fraction": 0.25, "film": 2, **tiny, **more}))
    trainer.train()
    return trainer, read(trainer.folder)


def read(folder: Path) -> Any:
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


def test_classes_audit_and_pictures(tiny: dict[str, Any]) -> None:
    trainer, events = train(tiny, plots=True, audit=2, labeled="50%", strategy={"name": "mean_teacher", "tau": 0.02})
    tags = events.Tags()
    names = trainer.data.names
    known = {"film_kept_per_image", "audit_tau", "AP_teacher"}
    sections = {t.split("/")[0] for t in tags["scalars"]}
    assert known | {"sup", "unsup", "pseudo", "val", "audit"} <= sections
    assert {t.removeprefix("film_kept_per_image/") for t in tags["scalars"] if t.startswith("film_kept")} == set(names)

    last = trainer.history[-1]
    for name, ap in last["teacher"]["per_class"].items():
        if np.isfinite(ap):
            value = events.Scalars(f"AP_teacher/{name}")[-1]
            assert (value.step, value.value) == (6, pytest.approx(ap))
    audit = read_audit(trainer.folder)[-1]
    for name, figures in audit["classes"].items():
        for number in ("precision", "recall", "tau"):
            tag = f"audit_{number}/{name}"
            values = {s.step: s.value for s in events.Scalars(tag)} if tag in tags["scalars"] else {}
            assert values.get(6) == (None if figures[number] is None else pytest.approx(figures[number]))

    assert tags["images"] == ["film"]
    shown = events.Images("film")
    assert [s.step for s in shown] == [3, 6]
    with (
        Image.open(io.BytesIO(shown[-1].encoded_image_string)) as image,
        Image.open(trainer.folder / "pseudo" / "last.jpg") as file,
    ):
        assert image.size == (shown[-1].width, shown[-1].height)
        assert np.array_equal(np.asarray(image), np.asarray(file)), "the newest moment"


def test_no_pictures_without_plots_and_numbers_by_class_of_the_strategy(tiny: dict[str, Any]) -> None:
    trainer, events = train(tiny, strategy={"name": "rpl", "certainty": False, "tau": 0.06})
    assert events.Tags()["images"] == []
    assert not (trainer.folder / "pseudo" / "last.jpg").exists()
    assert list((trainer.folder / "pseudo" / "views").iterdir()) == []
    for name, tau in trainer.history[-1]["by_class"]["tau"].items():
        assert events.Scalars(f"by_class_tau/{name}")[-1].value == pytest.approx(tau)
