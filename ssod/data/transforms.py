"""Weak and strong views by name or by list.

A view is a list of operations (`ssod.data.operations`), in a recipe or below:

    weak: [{resize: {scale: [0.8, 1.2]}}, {flip: 0.5}]
    strong: [weak, {color: {hue: 0.1}}, {blur: {p: 0.5}}]

A list that begins with `weak` goes on from the weak view of the same image: the same geometry, the same draw.
Any other list starts from the decoded image. A list of nothing but names, `[weak, strong]`, is several views.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from ssod.data.operations import OPERATIONS, Frame, Operation, Resize, Rng
from ssod.errors import UserError, did_you_mean

Spec = str | Sequence[object]

PRESETS: dict[str, list[object]] = {
    "weak": [{"resize": {}}, {"flip": 0.5}],
    # Unbiased Teacher (Liu et al., ICLR 2021)
    "strong": [
        "weak",
        {"color": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "p": 0.8, "gray": 0.2}},
        {"blur": {"sigma": [0.1, 2.0], "p": 0.5}},
        {"erase": {"p": 0.7, "area": [0.05, 0.2], "ratio": [0.3, 3.3]}},
        {"erase": {"p": 0.5, "area": [0.02, 0.2], "ratio": [0.1, 6.0]}},
        {"erase": {"p": 0.3, "area": [0.02, 0.2], "ratio": [0.05, 8.0]}},
    ],
    # Soft Teacher (Xu et al., ICCV 2021): short side 400 .. 1200 around 800
    "strong_geo": [
        {"resize": {"scale": [0.5, 1.5]}},
        {"flip": 0.5},
        "one_color",
        {"one_affine": {"translate": 0.1, "rotate": 30, "shear": 30}},
        {"cutout": {"count": [1, 4], "side": 0.2}},
    ],
}


@dataclass(frozen=True)
class Chain:
    """One view: operations in order, from the decoded image or, with `from_weak`, from the weak view."""

    operations: tuple[Operation, ...]
    from_weak: bool = False

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
        return Chain(self.preset.operations + chain.operations) if chain.from_weak else chain


def pipeline(spec: Spec, imgsz: int) -> Views:
    """Read a preset name, a list of names (several views) or a list of operations (one view).

    `imgsz` is the long side in pixels that `resize` aims at. Raises UserError for an unknown name or
    parameter and for a value out of range.
    """
    weak = Chain(_operations(PRESETS["weak"], imgsz))
    if isinstance(spec, str):
        spec = [spec]
    if not isinstance(spec, Sequence) or not spec:
        raise UserError(f"A view must be a name ({', '.join(PRESETS)}) or a list of operations, got {spec!r}.")
    if all(isinstance(entry, str) and entry in PRESETS for entry in spec):
        return Views(tuple(_chain(PRESETS[str(name)] if name != "weak" else ["weak"], imgsz) for name in spec), weak)
    if len(spec) == 1 and isinstance(spec[0], str) and spec[0] not in OPERATIONS:
        raise UserError(f"'{spec[0]}' is not a view; known: {', '.join(PRESETS)}.{did_you_mean(spec[0], PRESETS)}")
    return Views((_chain(spec, imgsz),), weak)


def _chain(entries: Sequence[object], imgsz: int) -> Chain:
    from_weak = entries[0] == "weak"
    chain = Chain(_operations(entries[from_weak:], imgsz), from_weak)
    if not from_weak and not chain.longest:
        raise UserError("A view must begin with 'weak' or hold a 'resize', or its images have any size.")
    return chain


def _operations(entries: Sequence[object], imgsz: int) -> tuple[Operation, ...]:
    return tuple(_operation(entry, imgsz) for entry in entries)


def _operation(entry: object, imgsz: int) -> Operation:
    """Read `name`, `{name: value}`, `{name: [low, high]}` or `{name: {parameter: value}}`."""
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, dict) or len(entry) != 1:
        raise UserError(f"An operation is written {{name: value}} or {{name: {{parameter: value}}}}, got {entry!r}.")
    ((name, given),) = entry.items()
    if name in PRESETS:
        raise UserError(f"'{name}' cannot stand here: a list of operations may only begin with 'weak'.")
    if name not in OPERATIONS:
        raise UserError(f"'{name}' is not an operation of a view.{did_you_mean(str(name), OPERATIONS)}")
    cls = OPERATIONS[name]
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    values = given if isinstance(given, dict) else {} if given is None else {known[0]: given}
    for key in values:
        if key not in known:
            raise UserError(
                f"'{name}' has no parameter '{key}'; known: {', '.join(known)}.{did_you_mean(str(key), known)}"
            )
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    if cls is Resize:
        values.setdefault("imgsz", imgsz)
    return cls(**values)
