"""What is going wrong, said once, with numbers and a way out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ssod import dist
from ssod.engine.callbacks import Callback, State
from ssod.engine.observers import Observer

if TYPE_CHECKING:
    from ssod.engine.trainer import SemiTrainer

PATIENCE = 3  # log lines in a row
FILE = "diagnosis.jsonl"  # in the run folder, a line an alarm


class Diagnosis(Observer):
    """Says each alarm once: in the console, and as a line {"step", "code", "level", "text", "numbers"} of FILE."""

    name = "diagnosis"

    def __init__(self, trainer: SemiTrainer) -> None:
        self.trainer = trainer
        self._said: set[str] = set()
        self._starvation = Starvation(trainer.data.unlabeled != [])

    def events(self) -> dict[str, Callback]:
        return {"on_log": self._on_log}

    def state_dict(self) -> dict[str, Any]:
        return {"said": sorted(self._said)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._said = set(state["said"])

    def _on_log(self, state: State) -> None:
        if alarm := self._starvation.look(state.stats):
            self._say(state.step, "starving", "warning", alarm, state.stats)

    def _say(self, step: int, code: str, level: str, text: str, numbers: dict[str, float]) -> None:
        if code in self._said:
            return
        self._said.add(code)
        self.trainer.say(f"{level.upper()}: {text}")
        if dist.is_main():
            line = {"step": step, "code": code, "level": level, "text": text, "numbers": numbers}
            with open(self.trainer.folder / FILE, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


class Starvation:
    """An unsupervised loss of nothing: the teacher has given (almost) no pseudo box for several log lines."""

    def __init__(self, expects_pseudo_boxes: bool) -> None:
        self._waiting = expects_pseudo_boxes
        self._lines = 0

    def look(self, values: dict[str, float]) -> str | None:
        """Read one log line; return the alarm the first time it is due."""
        per_image = values.get("pseudo/per_image")
        if per_image is None or not self._waiting:
            return None
        wanted = values.get("pseudo/labeled_per_image", 1.0)
        self._lines = self._lines + 1 if per_image < 0.02 * wanted else 0
        if self._lines < PATIENCE:
            return None
        self._waiting = False
        return (
            f"the teacher gives {per_image:.3f} pseudo boxes an image where the labelled images have "
            f"{wanted:.1f}, so the unlabelled images teach nothing. It finds too little above the threshold "
            f"(mean tau {values.get('pseudo/tau', float('nan')):.2f}): lower strategy.tau or strategy.tau_low, or give "
            "it a longer burn_in."
        )
