"""The zoo: trained students by name. The table is entries.json, their files lie in weights/; needs no torch.

A name stands for its file wherever a model or `weights=` is asked for: ssod.zoo.fetch.resolve.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ssod.errors import Fault, UserError, did_you_mean

HOME = Path(__file__).resolve().parent
TASK = "detection"
LARGEST, TOGETHER = 8_000_000, 30_000_000  # bytes of a file in the package, of all of them
TOLERANCE = 0.001  # of AP 0..1: what another machine's arithmetic may change


@dataclass(frozen=True)
class Entry:
    """A trained network and all that makes it possible to judge and repeat it.

    data, data_licence   data YAML it was trained and scored on, and the licence of those images
    strategy, labels     how it was trained, and how many labels it saw, such as "77 of 765 images (10%)"
    ap, supervised_ap    COCO AP, 0 .. 1, of this file on val; of the same network trained on the labels alone, or None
    spec                 what `build_detector` takes; names  classes in label order; imgsz  as in the training config
    file or url          its name in weights/, or where it can be fetched, https only
    size, sha256         of the file, bytes and hex digits
    command, commit, date  what made it
    """

    name: str
    data: str
    strategy: str
    labels: str
    ap: float
    supervised_ap: float | None
    imgsz: int | list[int]
    names: list[str]
    spec: dict[str, Any]
    size: int
    sha256: str
    weights_licence: str
    data_licence: str
    command: str
    commit: str
    date: str
    file: str | None = None
    url: str | None = None
    task: str = TASK

    def __post_init__(self) -> None:
        check_name(self.name)
        if (self.file is None) == (self.url is None):
            raise Fault(f"the zoo's {self.name} needs a file or a url, and not both.")
        if self.file is not None and Path(self.file).name != self.file:
            raise Fault(f"the zoo's {self.name}: {self.file} is no plain name of a file in weights/.")
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise Fault(f"the zoo's {self.name}: {self.sha256!r} is no SHA-256.")

    @property
    def detector(self) -> str:
        return str(self.spec["name"])

    @property
    def backbone(self) -> str:
        return str(self.spec["backbone"])


def check_name(name: str) -> None:
    """Raises UserError for a name that is not one in Python, too (torch.hub asks for that), or is a file's."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name.endswith("_openvino"):
        raise UserError(f"'{name}' is no name for the zoo: lower-case letters, digits and _, such as bccd_fcos.")


def entries(home: Path | None = None) -> dict[str, Entry]:
    """The table by name. Raises Fault where it cannot be used."""
    path = (home or HOME) / "entries.json"
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        known = {f.name for f in fields(Entry)}
        found = [Entry(**{k: v for k, v in row.items() if k in known}) for row in rows]
    except (OSError, ValueError, TypeError) as error:
        raise Fault(f"the zoo's table {path} cannot be read: {error}.") from None
    return {entry.name: entry for entry in found}


def find(name: str) -> Entry:
    """The entry of that name. Raises UserError, with the closest name, where there is none."""
    known = entries()
    if name not in known:
        there = f"It has {', '.join(known)}." if known else "It is empty so far."
        raise UserError(f"the zoo has no '{name}'.{did_you_mean(name, known)} {there}")
    return known[name]


def add(entry: Entry, home: Path) -> None:
    """Put an entry into the table of `home`, in place of one of the same name."""
    from ssod.files import replacing

    known = entries(home) if (home / "entries.json").exists() else {}
    known[entry.name] = entry
    with replacing(home / "entries.json") as file:
        rows = [asdict(known[name]) for name in sorted(known)]
        file.write((json.dumps(rows, indent=1) + "\n").encode())


def text(known: dict[str, Entry]) -> str:
    """What `ssod zoo` prints."""
    if not known:
        return "the zoo holds no weights yet; docs/zoo.md says how an entry is made: ssod zoo pack."
    rows = [("name", "task", "network", "data", "strategy", "labels", "AP", "supervised", "MB", "licence")]
    for e in known.values():
        without = "-" if e.supervised_ap is None else f"{e.supervised_ap:.4f}"
        network = f"{e.detector} {e.backbone}"
        labels = (e.data, e.strategy, e.labels, f"{e.ap:.4f}", without)
        rows.append((e.name, e.task, network, *labels, f"{e.size / 1e6:.1f}", e.weights_licence))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{v:<{w}}" for v, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.append("")
    for e in known.values():
        where = f", from {e.url}" if e.url else ""
        lines.append(f"{e.name}: sha256 {e.sha256}{where}; data: {e.data_licence}; {e.date}, commit {e.commit}")
        lines.append(f"  {e.command}")
    lines.append("supervised: AP of the same network trained on the same labels alone.")
    return "\n".join(lines)
