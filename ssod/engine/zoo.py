"""Entries of the zoo: made from a checkpoint, and scored again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from ssod import zoo
from ssod.config import validate as check
from ssod.deploy.predictor import load_detector
from ssod.detectors.fetch import sha256
from ssod.engine.validate import validate
from ssod.errors import UserError
from ssod.modes import ValConfig, ZooConfig
from ssod.packed import SUFFIX, write_packed
from ssod.zoo.fetch import locate

Say = Callable[[str], None]


@dataclass(frozen=True)
class Verified:
    """AP, 0 .. 1: what the table says and what the file scored here; same  within zoo.TOLERANCE of each other."""

    name: str
    said: float
    scored: float

    @property
    def same(self) -> bool:
        return abs(self.said - self.scored) <= zoo.TOLERANCE

    def text(self) -> str:
        verdict = "the same" if self.same else f"NOT the same: they differ by more than {zoo.TOLERANCE:g}"
        return f"{self.name}: AP {self.scored:.4f} here, {self.said:.4f} in the table: {verdict}"


def verify(config: ZooConfig, say: Say = print) -> Verified:
    """Score an entry on val of its data, or of `config.data`, and hold its AP against the table's.

    Raises UserError for an unknown entry, a damaged file, and data that are not there or have other classes.
    """
    assert config.entry is not None  # ZooConfig has seen to it
    entry = zoo.find(config.entry)
    return Verified(entry.name, entry.ap, _ap(config, locate(entry), config.data or entry.data, "auto", say))


def pack(config: ZooConfig, say: Say = print) -> zoo.Entry:
    """Write a checkpoint's network as OUT/weights/ENTRY.safetensors in fp16 and put it into OUT/entries.json.

    Its AP is that of the fp16 file; what the checkpoint scores is said beside it. Raises UserError for a model or data
    that cannot be used, a name that is none, and a file too large to come with the package.
    """
    assert config.entry is not None
    assert config.model is not None
    assert config.data is not None
    zoo.check_name(config.entry)
    detector, content = load_detector(config.model, config.weights)
    use = content["use"] if config.weights == "auto" else config.weights
    before = _ap(config, Path(config.model), config.data, config.weights, say)
    facts: dict[str, Any] = {
        "name": config.entry,
        "data": config.data,
        "strategy": config.trained_by,
        "labels": config.labels,
        "supervised_ap": config.supervised_ap,
        "weights_licence": config.weights_licence,
        "data_licence": config.data_licence,
        "command": config.command,
        "commit": config.commit,
        "date": date.today().isoformat(),
    }
    home = Path(config.out)
    (home / "weights").mkdir(parents=True, exist_ok=True)
    path = home / "weights" / f"{config.entry}{SUFFIX}"
    old = path.read_bytes() if path.exists() else None
    write_packed(content | {"use": use}, path, facts)
    try:
        size = path.stat().st_size
        if size > zoo.LARGEST:
            raise UserError(
                f"{config.entry} takes {size / 1e6:.1f} MB, and the package holds files of {zoo.LARGEST / 1e6:g} MB at "
                "most. Train a smaller network, or give others the checkpoint itself."
            )
        after = _ap(config, path, config.data, "auto", say)
        card = {"names": content["names"], "spec": detector.spec, "imgsz": content["imgsz"]}
        entry = zoo.Entry(**facts, **card, ap=after, size=size, sha256=sha256(path), file=path.name)
        zoo.add(entry, home)
    except BaseException:  # the table and the files belong together
        path.unlink() if old is None else path.write_bytes(old)
        raise
    say(f"{path}: {size / 1e6:.2f} MB; AP {before:.4f} of the checkpoint, {after:.4f} in fp16")
    return entry


def _ap(config: ZooConfig, model: Path, data: str, weights: str, say: Say) -> float:
    values = {"model": str(model), "weights": weights, "data": data}
    own = ("data_path", "strict", "device", "workers", "batch", "project", "name", "exist_ok")
    return validate(check(ValConfig, values | {k: getattr(config, k) for k in own}, ""), say).ap
