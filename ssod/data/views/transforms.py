"""Views by name or by list.

A view is a list of operations (`geometric`, `photometric`), in a recipe or below:

    weak: [{resize: {scale: [0.8, 1.2]}}, {flip: 0.5}]
    strong: [weak, {color: {hue: 0.1}}, {blur: {p: 0.5}}]
    labeled: [{mosaic: 0.5}, {mixup: 0.1}, weak]

A list that begins with `weak` goes on from the weak view of the same image: the same geometry, the same draw.
Any other list starts from the decoded image. `mosaic` and `mixup` stand at the head and make a new source image.
A list of nothing but names, `[weak, strong]`, is several views (labelled images only).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal, TypeVar

from ssod.data.views.geometric import Affine, Crop, Flip, OneAffine, Resize, Window
from ssod.data.views.geometry import Size, sides
from ssod.data.views.mixing import Mixing, MixUp, Mosaic
from ssod.data.views.operations import Frame, Operation, Ranged, Rng
from ssod.data.views.photometric import Blur, Color, Cutout, Erase, OneColor
from ssod.data.views.presets import BASE, RECIPES, VIEWS, WEAK_VIEWS
from ssod.errors import UserError, did_you_mean

Spec = str | Sequence[object]
Role = Literal["labeled", "weak", "strong"]
T = TypeVar("T", bound=Ranged)

OPERATIONS: dict[str, type[Operation]] = {
    cls.name: cls for cls in (Resize, Flip, Crop, Window, Affine, OneAffine, Color, OneColor, Blur, Erase, Cutout)
}
MIXINGS: dict[str, type[Mixing]] = {cls.name: cls for cls in (Mosaic, MixUp)}


@dataclass(frozen=True)
class Chain:
    """One view: operations in order, from the source image or, with `from_weak`, from the weak view.

    mixing  what makes the source image of several; the views of one source share it, see `loader`
    """

    operations: tuple[Operation, ...]
    from_weak: bool = False
    mixing: tuple[Mixing, ...] = ()

    def __call__(self, start: Frame, rng: Rng) -> Frame:
        for operation in self.operations:
            start = operation(start, rng)
        return start

    @property
    def longest(self) -> int:
        """The longest side in pixels this chain resizes to, 0 when it does not resize."""
        return max((o.longest for o in self.operations if isinstance(o, Resize)), default=0)


@dataclass(frozen=True)
class Views:
    """The views of one image in a stream, at least one; `preset` is the built-in weak view at this `imgsz`."""

    chains: tuple[Chain, ...]
    preset: Chain

    def as_weak(self) -> Chain:
        """This, taken as the run's own weak view: here, a leading `weak` means the preset."""
        (chain,) = self.chains
        return Chain(self.preset.operations + chain.operations, mixing=chain.mixing) if chain.from_weak else chain


def pipeline(spec: Spec, imgsz: Size, role: Role = "strong") -> Views:
    """Read a name, a list of names (several views) or a list of operations (one view).

    imgsz  the long side in pixels that `resize` aims at, or (short, long)
    role   which view this is for: a paper's name (`presets.RECIPES`) means that paper's own view of this role

    Raises UserError for an unknown name or parameter, for a value out of range, and for what the role cannot be.
    """
    names = ", ".join(VIEWS)
    if not isinstance(spec, str) and (isinstance(spec, dict) or not isinstance(spec, Sequence) or not spec):
        raise UserError(f"A view must be a name ({names}) or a list of operations, got {spec!r}.")
    if isinstance(spec, str):
        spec = [spec]
    single = str(spec[0]) if len(spec) == 1 else ""
    if single in RECIPES:
        lists = RECIPES[single][role]
    elif role == "weak" and single in VIEWS and single not in WEAK_VIEWS:
        raise UserError(
            f"'{single}' is a strong view: the teacher labels what it sees in the weak one, so write "
            f"augment.strong={single}, and for augment.weak one of {', '.join([*WEAK_VIEWS, *RECIPES])}."
        )
    elif all(isinstance(entry, str) and entry in VIEWS for entry in spec):
        lists = [VIEWS[str(name)] for name in spec]
    elif len(spec) == 1 and isinstance(spec[0], str) and spec[0] not in OPERATIONS:
        raise UserError(f"'{spec[0]}' is not a view; known: {names}.{did_you_mean(spec[0], VIEWS)}")
    else:
        lists = [list(spec)]
    views = Views(tuple(_chain(entries, imgsz) for entries in lists), Chain(_operations(BASE, imgsz)))
    if role == "strong" and any(chain.mixing for chain in views.chains):
        raise UserError(
            "mosaic and mixup cannot stand in a strong view: its boxes come from the weak view by one matrix. "
            "Write them at the head of augment.weak, and both views show the same mixed image."
        )
    return views


def _chain(entries: Sequence[object], imgsz: Size) -> Chain:
    heads = 0
    while heads < len(entries) and _name(entries[heads]) in MIXINGS:
        heads += 1
    mixing = tuple(_build(MIXINGS, entry, imgsz) for entry in entries[:heads])
    rest = entries[heads:]
    from_weak = bool(rest) and rest[0] == "weak"
    chain = Chain(_operations(rest[from_weak:], imgsz), from_weak, mixing)
    if not from_weak and not chain.longest:
        raise UserError("A view must begin with 'weak' or hold a 'resize', or its images have any size.")
    return chain


def _operations(entries: Sequence[object], imgsz: Size) -> tuple[Operation, ...]:
    for entry in entries:
        name = _name(entry)
        if name in MIXINGS:
            raise UserError(f"'{name}' cannot stand here: it makes the source image, so it begins the list.")
        if name in VIEWS:
            raise UserError(f"'{name}' cannot stand here: a list of operations may only begin with 'weak'.")
    return tuple(_build(OPERATIONS, entry, imgsz) for entry in entries)


def _name(entry: object) -> str:
    """Of `name` or `{name: anything}`."""
    if isinstance(entry, str):
        return entry
    if not isinstance(entry, dict) or len(entry) != 1:
        raise UserError(f"An operation is written {{name: value}} or {{name: {{parameter: value}}}}, got {entry!r}.")
    return str(next(iter(entry)))


def _build(known_types: Mapping[str, type[T]], entry: object, imgsz: Size) -> T:
    """Read `name`, `{name: value}`, `{name: [low, high]}` or `{name: {parameter: value}}`."""
    name = _name(entry)
    given = next(iter(entry.values())) if isinstance(entry, dict) else {}
    if name not in known_types:
        raise UserError(f"'{name}' is not an operation of a view.{did_you_mean(name, [*OPERATIONS, *MIXINGS])}")
    cls = known_types[name]
    known = [f.name for f in fields(cls)]
    values = given if isinstance(given, dict) else {} if given is None else {known[0]: given}
    for key in values:
        if key not in known:
            raise UserError(
                f"'{name}' has no parameter '{key}'; known: {', '.join(known)}.{did_you_mean(str(key), known)}"
            )
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    if "imgsz" in known and "imgsz" not in values:
        values["imgsz"], short = sides(imgsz)
        if "short" in known:
            values.setdefault("short", short)
    return cls(**values)
