"""Every argument of every mode, and the options of detectors and strategies, as a page:

python tests/config_page.py > docs/config.md
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from ssod.cli import SUMMARY
from ssod.config import shown_defaults
from ssod.detectors import DETECTORS, detector_class
from ssod.modes import MODES
from ssod.strategies import STRATEGIES, strategy_class

WORDS = {"boolean": "true, false", "integer": "whole number", "number": "number", "string": "text", "object": "by name"}
SECTIONS = {"Component": "name, options", "Augment": "name, list, or one a view"}
BOUNDS = {"minimum": ">= ", "exclusiveMinimum": "> ", "maximum": "<= ", "exclusiveMaximum": "< "}


def values(schema: dict[str, Any]) -> str:
    """What a key takes, in words: the part of a JSON schema that one property is."""
    if "anyOf" in schema:
        parts = [values(part) for part in schema["anyOf"] if part.get("type") != "null"]
        return " or ".join(dict.fromkeys(parts))
    if "$ref" in schema:
        return SECTIONS[schema["$ref"].rsplit("/", 1)[-1]]
    if "enum" in schema or "const" in schema:
        return ", ".join(str(value) for value in schema.get("enum", [schema.get("const")]))
    if schema["type"] == "array":
        return "list of " + re.sub(r"\b(number|text)\b", r"\1s", values(schema["items"])) if schema["items"] else "list"
    bounds = ", ".join(f"{sign}{schema[key]:g}" for key, sign in BOUNDS.items() if key in schema)
    return f"{WORDS[schema['type']]} {bounds}".rstrip()


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def table(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """One row a key: how it is written, its default, what it takes, what it means."""
    properties = model.model_json_schema()["properties"]
    yield f"| {'option' if prefix else 'argument'} | default | takes | meaning |"
    yield "|---|---|---|---|"
    for key, shown, field in shown_defaults(model):
        default = "" if shown == "null" else shown if shown == "(required)" else f"`{shown}`"
        yield f"| `{prefix}{key}` | {default} | {cell(values(properties[key]))} | {cell(field.description or '')} |"
    yield ""


def options(title: str, kinds: dict[str, type[BaseModel]], prefix: str) -> Iterator[str]:
    yield f"## {title}"
    yield ""
    for name, model in kinds.items():
        yield f"### `{prefix}={name}`"
        yield ""
        yield from table(model, f"{prefix}.") if model.model_fields else ["No options.", ""]


def page() -> str:
    """The text of docs/config.md."""
    lines = [
        "# Every argument",
        "",
        "This page is written by `tests/config_page.py` from the types that read the arguments; do not edit it.",
        "`ssod help train` prints the same lines; [cfg/default.yaml](../cfg/default.yaml) has them as a YAML.",
        "",
        "Arguments are `key=value` in any order; sections are reached by dots (`strategy.tau=0.6`). Defaults lie under",
        "`cfg=FILE`, which every mode takes, and that under the command line. An empty default means: not given. In",
        'Python the same names are keywords: `SSOD("fcos").train(data="my.yaml", batch=4)` ([python.md](python.md)).',
        "",
    ]
    for mode, model in MODES.items():
        lines += [f"## `ssod {mode}`", "", f"{SUMMARY[mode][0].upper()}{SUMMARY[mode][1:]}.", "", *table(model)]
    detectors = {name: detector_class(name).Options for name in DETECTORS}
    strategies = {name: strategy_class(name).Options for name in STRATEGIES}
    lines += options("Options of the detectors", detectors, "detector")
    lines += options("Options of the strategies", strategies, "strategy")
    return "\n".join(lines).rstrip("\n") + "\n"


if __name__ == "__main__":
    print(page(), end="")
