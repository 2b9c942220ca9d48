"""What is given to `SSOD` and its methods becomes options as the command line has them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssod import zoo
from ssod.deploy.formats import ENDINGS
from ssod.detectors import DETECTORS
from ssod.errors import UserError, did_you_mean


def from_scratch(model: str | Path) -> dict[str, Any] | None:
    """Options of `ssod train` for a training YAML or the name of a detector; None for a file with weights.

    Raises UserError for a YAML that cannot be used, and for a word that is neither a name nor a file.
    """
    word = str(model)
    if Path(word).suffix in (".yaml", ".yml"):
        from ssod.config import load_config

        load_config("train", {"cfg": word})
        return {"cfg": word}
    if word in DETECTORS:
        return {"detector": word}
    known = zoo.entries()
    if word in known:
        return None
    if Path(word).name != word or Path(word).suffix or word.endswith(tuple(ENDINGS)) or Path(word).exists():
        return None
    raise UserError(
        f"'{word}' is no model.{did_you_mean(word, [*DETECTORS, *known])} Give a file (best.pt, best.onnx), a training "
        f"YAML, a name of the zoo (`ssod zoo` lists them), or a detector to train: {', '.join(DETECTORS)}."
    )


def options_of(arguments: dict[str, Any]) -> dict[str, Any]:
    """Of a method's arguments (its locals() before any other) the options that were given, as the configs take them."""
    own = {k: v for k, v in arguments.items() if k not in ("self", "callbacks", "overrides")}
    return {k: plain(v) for k, v in (own | arguments["overrides"]).items() if v is not None}


def plain(value: Any) -> Any:
    """Paths as text, tuples as lists: what a YAML could hold."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value
