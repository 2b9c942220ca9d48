"""A dataclass from JSON, each value checked against the type of its field. What runs an exported model needs no package
but numpy and pillow, so this is not pydantic's."""

from __future__ import annotations

import dataclasses
import types
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
MOST = 1e30  # no number of a description comes near; a whole number of JSON may be too large for a float


def described(kind: type[T], values: Any) -> T:
    """`kind` with these values. JSON's lists become tuples where the type says so, its whole numbers floats.

    Raises ValueError with the path of the first value that is not of its type, and with what it should be.
    """
    if not isinstance(values, dict):
        raise ValueError(f"it is no mapping but {_shown(values)}")
    hints = get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]  # Card or Sidecar
    optional = {name for name, f in fields.items() if f.default is not dataclasses.MISSING}
    if missing := [name for name in fields if name not in values and name not in optional]:
        raise ValueError(f"{missing[0]} is missing")
    if unknown := [name for name in values if name not in fields]:
        raise ValueError(f"{unknown[0]} is not known")
    return kind(**{name: _value(value, hints[name], name) for name, value in values.items()})


def _value(value: Any, kind: Any, where: str) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        for one in args:
            try:
                return _value(value, one, where)
            except ValueError:
                continue
    elif origin in (list, tuple) and isinstance(value, (list, tuple)):
        of_each = [args[0]] * len(value) if origin is list or args[-1] is Ellipsis else list(args)
        if len(of_each) == len(value):
            return origin(_value(v, k, f"{where}.{i}") for i, (v, k) in enumerate(zip(value, of_each, strict=True)))
    elif origin is dict and isinstance(value, dict):
        return {_value(k, args[0], where): _value(v, args[1], f"{where}.{k}") for k, v in value.items()}
    elif kind is float:
        if type(value) in (int, float) and abs(value) < MOST:  # neither NaN nor infinite
            return float(value)
    elif origin is None and type(value) is kind:  # not isinstance: a bool is no number here
        return value
    raise ValueError(f"{where} is {_shown(value)}, which does not fit {getattr(kind, '__name__', kind)}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
