"""What stands beside an engine, in `NAME.engine.json`: the plan itself has no room for it.

A plan with a header of ours could not be read by trtexec or any other program of NVIDIA's.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ssod.deploy.contract import Card, ForeignModel, from_description
from ssod.errors import UserError

FORMAT = 1
Shape = tuple[int, ...]
Profile = dict[str, tuple[Shape, Shape, Shape]]


@dataclass(frozen=True)
class Sidecar:
    """What a program must know to run a plan.

    card           of the ONNX file that it was built from
    flavour        "tensorrt" or "tensorrt_rtx"; version  of the package that built it: no other one runs it
    capabilities   GPU generations it runs on, as "sm86"; none: all that tensorrt_rtx knows but sm75
    profile        least, usual and largest shape of each input; images [B, 3, H, W], sizes [B, 2]
    onnx_sha256, plan_sha256  of the two files
    """

    card: Card
    flavour: str
    version: str
    capabilities: list[str]
    profile: Profile
    onnx_sha256: str
    plan_sha256: str

    def dumps(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self), "card": self.card.dumps()}, ensure_ascii=False, indent=1)

    @staticmethod
    def loads(text: str, path: object) -> Sidecar:
        """Raises ForeignModel, naming the file `path`, for text that no export of ssod wrote."""
        try:
            values = json.loads(text)
            found = values.pop("format")
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ForeignModel(f"{path} is not a description by ssod. Export the engine again.") from None
        if found != FORMAT:
            raise ForeignModel(
                f"{path} has format {found}; this version of ssod reads format {FORMAT}. Export it again."
            )
        return from_description(Sidecar, values | {"card": Card.loads(values.get("card"), path)}, path)


def sidecar_path(engine: Path) -> Path:
    return engine.with_name(f"{engine.name}.json")


def read_engine(path: Path) -> tuple[bytes, Sidecar]:
    """A plan and what stands beside it. Raises UserError where one is missing or they do not belong together."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such engine.")
    beside = sidecar_path(path)
    if not beside.is_file():
        raise ForeignModel(
            f"{path}: {beside.name} is not beside it, so nothing is known of this engine. Copy it from where the "
            "engine was built, or export the engine with `ssod export model=best.pt format=engine`."
        )
    sidecar = Sidecar.loads(beside.read_text(encoding="utf-8", errors="replace"), beside)
    plan = path.read_bytes()
    if hashlib.sha256(plan).hexdigest() != sidecar.plan_sha256:
        raise UserError(
            f"{path} is not the engine that {beside.name} describes (its SHA-256 differs): the file is damaged or was "
            "replaced. Copy both again from where they were built, or export the engine again."
        )
    return plan, sidecar


def check_shape(sidecar: Sidecar, images: Shape) -> None:
    """Raises UserError for a shape [B, 3, H, W] that the engine was not built for."""
    least, _, largest = sidecar.profile["images"]
    if len(images) != 4 or images[1] != 3:
        raise UserError(f"images have the shape {list(images)}; an engine takes [B, 3, H, W].")
    for name, place in (("batch", 0), ("height", 2), ("width", 3)):
        if not least[place] <= images[place] <= largest[place]:
            raise UserError(
                f"{name} {images[place]}: the engine was built for {_span(least[place], largest[place])}. "
                "Use that, or export an engine for more."
            )
    if any(side % sidecar.card.multiple for side in images[2:]):
        raise UserError(
            f"images of {images[2]} x {images[3]} pixels: height and width must be "
            f"multiples of {sidecar.card.multiple}."
        )


def _span(least: int, largest: int) -> str:
    return f"{least} only" if least == largest else f"{least} to {largest}"
