"""Callbacks: when they come, what they are told, what their failure does, and that they change nothing."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from ssod.checkpoint import load_checkpoint
from ssod.config import load_config
from ssod.engine.callbacks import EVENTS, Callbacks, State
from ssod.engine.trainer import SemiTrainer
from ssod.errors import Fault, UserError

Tiny = dict[str, Any]
FAST = {"val_fraction": 0.25, "max_det": 10}


def run(overrides: Tiny, *callbacks: dict[str, Any], **more: Any) -> SemiTrainer:
    trainer = SemiTrainer(load_config("train", FAST | overrides | more), Callbacks(*callbacks))
    trainer.train()
    return trainer


def listening(told: list[State]) -> dict[str, Any]:
    return dict.fromkeys(EVENTS, told.append)


def test_each_event_comes_at_its_place_and_says_what_there_is(tiny: Tiny) -> None:
    told: list[State] = []
    trainer = run(tiny, listening(told), save_interval=4, accumulate=2)
    happened = [(s.event.removeprefix("on_"), s.step) for s in told if s.event != "on_save"]
    assert happened == [
        ("train_start", 0),
        ("step_end", 1),
        ("log", 1),
        ("step_end", 2),
        ("log", 2),
        ("step_end", 3),
        ("log", 3),
        ("val_end", 3),
        ("burn_in_end", 3),
        ("pseudo_labels", 4),
        ("step_end", 4),
        ("log", 4),
        ("pseudo_labels", 5),
        ("step_end", 5),
        ("log", 5),
        ("pseudo_labels", 6),
        ("step_end", 6),
        ("log", 6),
        ("val_end", 6),
        ("train_end", 6),
    ]
    saved = [(s.file.name, s.step) for s in told if s.file is not None]
    assert ("best.pt", 3) in saved
    assert [s for s in saved if s[0] == "last.pt"] == [("last.pt", 4), ("last.pt", 6)]
    assert all(s.folder == trainer.folder and s.trainer is trainer for s in told)

    steps = {s.step: s for s in told if s.event == "on_step_end"}
    assert set(steps[3].losses) == {"sup/cls", "sup/box", "sup/centerness"}
    assert set(steps[4].losses) > set(steps[3].losses)
    assert "pseudo/tau" in steps[4].stats
    with open(trainer.folder / "results.csv", newline="") as file:
        rows = {int(r["step"]): r for r in csv.DictReader(file) if r["sup/cls"]}
    for step, state in steps.items():
        for name, value in (state.losses | state.stats).items():
            assert float(rows[step][name]) == pytest.approx(value, rel=1e-4, abs=1e-6), (step, name)
    logged = [s for s in told if s.event == "on_log"]
    assert [{**s.losses, **s.stats}.keys() >= {"lr", "seconds", "sup/cls"} for s in logged] == [True] * 6
    assert logged[-1].losses["unsup/cls"] == pytest.approx(steps[6].losses["unsup/cls"])
    before, *_, after = (s.metrics for s in told if s.event in ("on_train_start", "on_train_end"))
    assert before == {}
    assert after["teacher"]["AP"] == trainer.history[-1]["teacher"]["AP"]
    assert set(after) == {"student", "teacher"}
    at_burn_in = next(s for s in told if s.event == "on_burn_in_end")
    assert set(at_burn_in.metrics) == {"student", "teacher"}, "the validation of the same step"


def test_pseudo_labels_lie_in_their_images(tiny: Tiny) -> None:
    told: list[State] = []
    flips = {"labeled": "weak", "weak": [{"resize": {}}, {"flip": 1.0}], "strong": [{"resize": {"scale": [0.5, 0.5]}}]}
    trainer = run(tiny, {"on_pseudo_labels": told.append}, accumulate=2, augment=flips, iters=5)
    assert [len(s.pseudo) for s in told] == [4, 4], "two batches of two images a step"
    known = {Path(s.path) for s in trainer.data.unlabeled}
    images = [p for s in told for p in s.pseudo]
    assert {p.path for p in images} <= known
    assert sum(len(p.used) for p in images) > 0
    for one in images:
        assert one.found.scores is not None
        # Weak: as large as imgsz and mirrored; strong: half of it. In the image's own pixels they are the same boxes.
        for box in one.used.boxes:
            assert (one.found.boxes - box).abs().max(1).values.min() < 0.05
        assert len(one.used) <= len(one.found)


@pytest.mark.parametrize("strategy", ["sed", "supervised"])
def test_strategies_without_pseudo_boxes_have_none(tiny: Tiny, strategy: str) -> None:
    told: list[State] = []
    tiny |= {"strategy": strategy, "detector": tiny["detector"] | {"half_scale": True}}
    run(tiny, listening(told), iters=4)
    labels = [s for s in told if s.event == "on_pseudo_labels"]
    assert [s.pseudo for s in labels] == ([[]] if strategy == "sed" else [])
    assert ("on_burn_in_end" in [s.event for s in told]) == (strategy == "sed")


def test_a_run_with_callbacks_is_the_same_to_the_last_bit(tiny: Tiny) -> None:
    told: list[State] = []
    without, with_ = run(tiny, name="without"), run(tiny, listening(told), name="with")
    assert told
    a, b = (load_checkpoint(t.folder / "weights" / "last.pt")["train"] for t in (without, with_))
    for key in ("strategy", "history", "best"):
        assert _flat(a[key]) == _flat(b[key]), key
    curves = [(t.folder / "results.csv").read_text().splitlines() for t in (without, with_)]
    place = curves[0][0].split(",").index("seconds")
    assert [_without(line, place) for line in curves[0]] == [_without(line, place) for line in curves[1]]


def _without(line: str, place: int) -> list[str]:
    cells = line.split(",")
    return cells[:place] + cells[place + 3 :]  # seconds, time/data, memory/rss


def _flat(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.flatten().contiguous().view(torch.uint8).tolist() if value.dim() else value.item()
    if isinstance(value, dict):
        return {k: _flat(v) for k, v in value.items()}
    return str(value)


def test_nothing_is_computed_for_nobody(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("computed for nobody")

    monkeypatch.setattr("ssod.engine.callbacks._in_source", refuse)  # boxes to the CPU: a GPU would wait for it
    run(tiny, {"on_train_end": []}, iters=4)


@pytest.mark.parametrize(("event", "resumes_at"), [("on_pseudo_labels", 4), ("on_save", None)])
def test_an_exception_ends_the_run_and_says_whose_it_is(tiny: Tiny, event: str, resumes_at: int | None) -> None:
    told: list[State] = []

    def broken(state: State) -> None:
        if state.step == 4 or event == "on_save":
            raise KeyError("no such thing")

    trainer = SemiTrainer(
        load_config("train", FAST | tiny), Callbacks({"on_save": told.append}, {event: [told.append, broken]})
    )
    sentence = rf"the callback .*broken of {event} failed at step \d and ended the run: KeyError: 'no such thing'"
    with pytest.raises(Fault, match=sentence) as fault:
        trainer.train()
    assert isinstance(fault.value.__cause__, KeyError)
    calls = len(told)
    if resumes_at is not None:
        assert told[-1].event == event, "the checkpoint written at the end calls nobody"
        resumed = SemiTrainer(load_config("train", {"resume": str(trainer.folder)}))
        assert resumed.step == resumes_at
        resumed.train()
        whole = run(tiny, name="whole")
        states = [_flat(t.strategy.state_dict()) for t in (whole, resumed)]
        assert states[0] == states[1], "broken off at a step's end"
    assert len(told) == calls


def test_mistakes_are_told_before_the_run() -> None:
    for given, sentence in (
        ({"on_step_ned": print}, "'on_step_ned' is not an event. Did you mean 'on_step_end'"),
        ({"on_save": 3}, "the callback of on_save is a int; give a function"),
        ({"on_save": "print"}, "the callback of on_save is a str"),
        ({"on_save": [print, None]}, "the callback of on_save is a NoneType"),
    ):
        with pytest.raises(UserError, match=sentence):
            Callbacks(given)  # type: ignore[arg-type]
