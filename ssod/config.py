"""A YAML and `key=value` words become one typed, frozen config per mode.

Precedence: defaults < `base:` of the YAML < the YAML (`cfg=`) < the command line. Dotted keys reach into
sections (`strategy.tau=0.8`). Types are strict and unknown keys are refused with the closest known one.
Nothing here imports torch: `ssod help` and `ssod cfg` answer at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from ssod.errors import UserError, did_you_mean
from ssod.modes import MODES, TrainConfig
from ssod.recipe import rescale
from ssod.sections import three_views

_COMPONENTS = ("detector", "strategy")
_EITHER = ("iters", "epochs")


def cfg_folders() -> list[Path]:
    """Where `cfg=NAME` and `base:` are looked up after the working folder: the package's own YAMLs."""
    here = Path(__file__).resolve().parent
    return [d for d in (here / "cfg", here.parent / "cfg") if (d / "default.yaml").is_file()]


def find_yaml(name: str, near: Path | None = None, data: bool = False) -> Path:
    """Find a YAML by path (from `near`, then the working folder) or by its name among the package's own.

    With `data`, the package's data YAMLs come before its recipes: voc.yaml is one of each.
    """
    own = cfg_folders() + [d / "data" for d in cfg_folders()]
    own.sort(key=lambda d: data and d.name != "data")  # stable: without `data` nothing moves
    places = [p for p in (near, Path()) if p is not None] + own
    names = [name] if Path(name).suffix in (".yaml", ".yml") else [name, f"{name}.yaml"]
    for place in places:
        for n in names:
            if (place / n).is_file():
                return place / n
    if data and "/" in name:
        raise UserError(f"there is no data YAML {name}. A folder of splits is made by `ssod split`: `ssod help split`.")
    known = [p.name for d in cfg_folders() for p in sorted([*d.glob("*.yaml"), *d.glob("data/*.yaml")])]
    raise UserError(
        f"there is no YAML '{name}' here or among the package's own.{did_you_mean(name, known)} `ssod cfg` lists them."
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a mapping from a YAML file. Raises UserError on bad syntax, on python tags, on anything but a mapping."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where} is not plain YAML: {getattr(error, 'problem', None) or error}.") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or any(not isinstance(k, str) for k in content):
        raise UserError(f"{path} must hold `key: value` lines.")
    return {k: _numbers(v) for k, v in content.items()}


def _numbers(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as text; people mean a number."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)
    if isinstance(value, dict):
        return {k: _numbers(v) for k, v in value.items()}
    return [_numbers(v) for v in value] if isinstance(value, list) else value


def parse_words(words: Sequence[str]) -> dict[str, Any]:
    """Turn `key=value`, `--key=value` and `--key value` words into a nested dict of typed values."""
    out: dict[str, Any] = {}
    i = 0
    while i < len(words):
        word = words[i]
        key, equals, text = word.removeprefix("--").partition("=")
        if word.startswith("--") and not equals:
            follows = i + 1 < len(words) and not words[i + 1].startswith("--") and "=" not in words[i + 1]
            text = words[i + 1] if follows else "true"
            i += follows
        elif not equals:
            raise UserError(f"'{word}' is not an argument. Arguments look like key=value, such as epochs=100.")
        if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", key.replace("-", "_")):
            raise UserError(f"'{word}' is not an argument. Arguments look like key=value, such as epochs=100.")
        _set(out, key.replace("-", "_").split("."), _value(text), word)
        i += 1
    return out


def _value(text: str) -> Any:
    try:
        return _numbers(yaml.safe_load(text)) if text.strip() else None
    except yaml.YAMLError:
        return text  # a Windows path or a glob such as *.jpg is a plain word


def _set(tree: dict[str, Any], path: list[str], value: Any, word: str) -> None:
    for part in path[:-1]:
        inner = tree.setdefault(part, {})
        if not isinstance(inner, dict):  # `strategy=sed strategy.tau=.8` in one line
            inner = {"name": inner} if part in _COMPONENTS else three_views(inner) if part == "augment" else {}
            tree[part] = inner
        tree = inner
    if isinstance(tree.get(path[-1]), dict) and path[-1] in _COMPONENTS and isinstance(value, str):
        tree[path[-1]]["name"] = value
    else:
        tree[path[-1]] = value


def merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """Lay `high` over `low`. Another component name drops the options of the old one."""
    out = dict(low)
    for one, other in (_EITHER, _EITHER[::-1]):
        if high.get(one) is not None and other not in high:
            out.pop(other, None)
    for key, value in high.items():
        old = out.get(key)
        if key in _COMPONENTS and isinstance(value, str):
            value = {"name": value}
        if key in _COMPONENTS and isinstance(old, str):
            old = {"name": old}
        if key == "augment":
            value, old = three_views(value), three_views(old)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            renamed = key in _COMPONENTS and "name" in value and value["name"] != old.get("name")
            value = dict(value) if renamed else merge(old, value)
        out[key] = value
    return out


def read_cfg(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a config YAML over the one its `base:` names. Raises UserError when bases go in a circle."""
    path = path.resolve()
    if path in seen:
        raise UserError(f"{path} is its own `base:` ({' -> '.join(p.name for p in (*seen, path))}).")
    own = read_yaml(path)
    base = own.pop("base", None)
    if base is None:
        return own
    if not isinstance(base, str):
        raise UserError(f"{path}: `base:` must name one YAML.")
    return merge(read_cfg(find_yaml(base, near=path.parent), (*seen, path)), own)


def load_config(mode: str, overrides: Mapping[str, Any] | None = None) -> Any:
    """Build the config of a mode from overrides; their `cfg` names a YAML that goes beneath them.

    Raises UserError for an unknown mode or key (with the closest known one) and for a value of another type.
    """
    if mode not in MODES:
        raise UserError(f"'{mode}' is not a mode.{did_you_mean(mode, MODES)} Modes: {', '.join(MODES)}.")
    overrides = dict(overrides or {})
    cfg = overrides.pop("cfg", None)
    fields = MODES[mode].model_fields
    values: dict[str, Any] = {}
    notes: list[str] = []
    if cfg is not None:
        values = merge({}, read_cfg(find_yaml(str(cfg))))
        if mode == "train":
            values, notes = rescale(values, overrides)
    values = merge(values, overrides)
    for key in _COMPONENTS:  # options without a name are options of the default
        if key in fields and isinstance(values.get(key), dict):
            values[key] = {"name": fields[key].default.name} | values[key]
    if mode != "train" and cfg is not None:  # a training recipe also serves val, predict and check
        values = {k: v for k, v in values.items() if k in fields or k not in TrainConfig.model_fields}
    config = validate(MODES[mode], values, "")
    if isinstance(config, TrainConfig):
        config.notes.extend(notes)
    return config


def validate(model: type[BaseModel], values: Mapping[str, Any], prefix: str) -> Any:
    """Validate `values`; `prefix` ("strategy.") is how the user would spell the keys."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise UserError(_sentence(model, error, prefix)) from None


def _sentence(model: type[BaseModel], error: ValidationError, prefix: str) -> str:
    first = error.errors(include_url=False)[0]
    path = [str(p) for p in first["loc"] if isinstance(p, str) and not p.startswith(("function", "literal", "list"))]
    path = [p for i, p in enumerate(path) if not (i > 0 and p in ("str", "int", "float", "bool"))]
    key = prefix + ".".join(path)
    if first["type"] == "extra_forbidden":
        fields: Mapping[str, Any] = model.model_fields
        for part in path[:-1]:
            inner = fields[part].annotation
            fields = inner.model_fields if hasattr(inner, "model_fields") else {}
        lead = prefix + "".join(p + "." for p in path[:-1])
        hint = did_you_mean(path[-1], fields)
        near = hint.split("'")[1] if hint else None
        if near is not None:
            default = fields[near].default
            shown = "" if default is None or isinstance(default, BaseModel) else f"={default}"
            hint = f" Did you mean {lead}{near}{shown if shown != '=PydanticUndefined' else ''}?"
        mode = next((m for m, c in MODES.items() if c is model), "train")
        return f"'{key}' is not a valid argument.{hint} `ssod help {mode}` lists them."
    if first["type"] == "missing":
        return f"'{key}' is missing: {model.model_fields[path[-1]].description}." if path else "a value is missing."
    if first["type"] == "value_error":
        message = str(first["ctx"]["error"]) if "ctx" in first else first["msg"]
        return message if message.endswith((".", "?")) else message + "."
    expected = "; ".join(dict.fromkeys(e["msg"].replace("Input should be ", "") for e in error.errors()[:3]))
    return f"{key}={first['input']!r} does not fit: it should be {expected}."


def help_lines(mode: str) -> list[str]:
    """One line a key: name, default, meaning."""
    return [f"  {key:<17}{shown:<21} {f.description}" for key, shown, f in shown_defaults(MODES[mode])]


def default_yaml() -> str:
    """What cfg/default.yaml holds: every key of `ssod train` with its default and meaning."""
    lines = ["# Every argument of `ssod train` with its default. Start your own YAML with `base: default.yaml`."]
    for key, shown, f in shown_defaults(TrainConfig):
        lines.append(f"{key + ': ' + shown:<40} # {f.description}")
    return "\n".join(lines) + "\n"


def shown_defaults(model: type[BaseModel]) -> Iterator[tuple[str, str, FieldInfo]]:
    """(key, default as YAML, field); sections as one line."""
    for key, f in model.model_fields.items():
        value = f.default.model_dump() if isinstance(f.default, BaseModel) else f.default
        if f.is_required():
            shown = "(required)"
        elif isinstance(value, dict) and list(value) == ["name"]:
            shown = value["name"]
        else:
            shown = yaml.safe_dump(value, default_flow_style=True, width=1000, sort_keys=False).split("\n")[0]
        yield f.alias or key, shown, f


def to_yaml(config: BaseModel) -> str:
    """The config as a YAML that `cfg=` reads back."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)
