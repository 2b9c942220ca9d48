"""docs/licences.md: what `pip install ssod` and its extras bring, and under which licence.

python tests/licence_page.py > docs/licences.md
"""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10; pytest brings it
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("export", "fast", "openvino", "rtx", "tb", "video")  # `gpu` and `trt` are their builds for a GPU
TOP = """# Licences of the dependencies
What an install brings, as each package's own metadata say. Written by `tests/licence_page.py`; a test keeps GPL and
AGPL out. NVIDIA's packages (CUDA, TensorRT) are proprietary and free to use; torch's CPU builds need none of them.
"""


def wanted() -> list[Requirement]:
    """The requirements of the package and its extras."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    more = [line for extra in EXTRAS for line in project["optional-dependencies"][extra]]
    return [Requirement(line) for line in project["dependencies"] + more]


def closure(start: list[Requirement]) -> dict[str, metadata.Distribution]:
    """Installed distributions that these bring, by canonical name; what is not installed here is left out."""
    found: dict[str, metadata.Distribution] = {}
    waiting = [(r, "") for r in start]
    while waiting:
        need, extra = waiting.pop()
        name = canonicalize_name(need.name)
        if need.marker is not None and not need.marker.evaluate({"extra": extra}):
            continue
        if name not in found:
            try:
                found[name] = metadata.distribution(need.name)
            except metadata.PackageNotFoundError:
                continue
            waiting += [(Requirement(line), "") for line in found[name].requires or []]
        for more in need.extras:
            waiting += [(Requirement(line), more) for line in found[name].requires or [] if "extra" in line]
    return dict(sorted(found.items()))


def licence(one: metadata.Distribution) -> str:
    """What the metadata say: the expression, else the classifiers, else the first line of the field."""
    said = one.metadata
    if said["License-Expression"]:
        return str(said["License-Expression"])
    classes = [c.rsplit("::", 1)[-1].strip() for c in said.get_all("Classifier") or [] if c.startswith("License ::")]
    classes = [c for c in classes if c != "OSI Approved"]
    if classes:
        return ", ".join(sorted(classes))
    lines = (said["License"] or "").strip().splitlines()
    return lines[0][:80] if lines else "not said"


def forbidden(text: str) -> bool:
    """GPL or AGPL, where no other licence may be chosen; the LGPL is neither."""
    choices = re.split(r"\s+OR\s+", text)
    return all(re.search(r"(?<!L)GPL|(?<!Lesser )General Public|Affero", c) for c in choices)


def page() -> str:
    rows = [f"| {name} | {licence(one)} |" for name, one in closure(wanted()).items()]
    return "\n".join([TOP, "| package | licence |", "|---|---|", *rows]) + "\n"


if __name__ == "__main__":
    print(page(), end="")
