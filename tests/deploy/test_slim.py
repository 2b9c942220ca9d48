"""Exported models without torch: the list of packages, and an environment made of it."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from dockerfiles import FILES, ROOT, build, megabytes, run
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image
from small_models import card, write_onnx

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

DIRECT = {"numpy", "pillow", "onnxruntime", "pydantic", "pyyaml"}  # what ssod itself imports to run an ONNX file
SLIM = {"python_version": "3.12", "python_full_version": "3.12.12"}  # the image's


def read(name: str) -> dict[str, Requirement]:
    """{package: requirement} of a file, as the image's Python sees it."""
    found = {}
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            one = Requirement(line)
            if one.marker is None or one.marker.evaluate(default_environment() | SLIM):
                found[canonicalize_name(one.name)] = one
    return found


def version(one: Requirement) -> str:
    (pin,) = one.specifier
    assert pin.operator == "==", f"{one} is not pinned"
    return pin.version


def test_the_list_agrees_with_the_constraints_and_the_project() -> None:
    slim, constraints = read("docker/slim-requirements.txt"), read("constraints.txt")
    assert slim.keys() >= DIRECT
    for name, one in slim.items():
        if name in constraints:
            assert version(one) == version(constraints[name]), name
    assert slim.keys() & constraints.keys() >= DIRECT
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [Requirement(r) for r in [*project["dependencies"], *project["optional-dependencies"]["export"]]]
    asked = {canonicalize_name(r.name): r.specifier for r in wanted}
    for name in DIRECT:
        assert asked[name].contains(version(slim[name])), name
    heavy = {"torch", "torchvision", "timm", "matplotlib", "scipy", "onnx", "opencv-python-headless"}
    assert not slim.keys() & heavy


def test_the_list_is_complete() -> None:
    """Nothing that it names needs a package, or a version, that it does not name: pip has nothing to choose."""
    slim = read("docker/slim-requirements.txt")
    needed = set(DIRECT)
    for name, one in slim.items():
        distribution = importlib.metadata.distribution(name)
        if distribution.version != version(one):
            pytest.skip(f"{name} {distribution.version} is installed, not the version of the list")
        for text in distribution.requires or []:
            need = Requirement(text)
            if need.marker is None or need.marker.evaluate(default_environment() | SLIM | {"extra": ""}):
                other = canonicalize_name(need.name)
                assert other in slim, f"{name} needs {need}"
                assert need.specifier.contains(version(slim[other]), prereleases=True), f"{name} needs {need}"
                needed.add(other)
    assert needed == set(slim), "packages of the list that nothing needs"


ONLY = """
import sys

class Only:
    def find_spec(self, name, path=None, target=None):
        first = name.split(".")[0]
        if first not in sys.stdlib_module_names | ALLOWED and not first.startswith("_sysconfigdata"):
            raise ModuleNotFoundError("not in slim-requirements.txt: " + name, name=first)

sys.meta_path.insert(0, Only())
from ssod.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.fromarray(np.full((80, 120, 3), 255, np.uint8)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def slim_ssod(*words: str) -> subprocess.CompletedProcess[str]:
    """The command line, with nothing importable but what the list names."""
    slim = read("docker/slim-requirements.txt")
    modules = {
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if any(canonicalize_name(owner) in slim for owner in owners)
    }
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.run(
        [sys.executable, "-c", f"ALLOWED = {modules | {'ssod'}!r}\n{ONLY}", *words],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_predict_imports_nothing_beyond_the_list(photo: Path) -> None:
    model = write_onnx(photo.with_name("small.onnx"), card())
    project = f"project={photo.parent / 'runs'}"
    done = slim_ssod("predict", f"model={model}", f"source={photo}", project, "save_json=true")
    assert done.returncode == 0, done.stderr
    assert "2 objects on 1 images" in done.stdout


def test_what_takes_more_is_said_in_a_sentence() -> None:
    done = slim_ssod("val", "model=best.pt", "data=my.yaml")
    assert done.returncode == 2
    assert "which is not installed here" in done.stderr
    assert "Traceback" not in done.stderr


PROGRAM = """
from ssod import SSOD

model = SSOD("small.onnx")
for result in model.predict("photo.png"):
    print(result, result.boxes.xyxy.tolist())
try:
    import torch
except ImportError:
    print("no torch")
"""


@pytest.mark.slow
def test_an_environment_of_the_list_runs_models(photo: Path, tmp_path: Path) -> None:
    """The commands of Dockerfile.slim, word for word, in a fresh environment without system packages."""
    bin_ = build(FILES[1], tmp_path)
    installed = {canonicalize_name(n) for n in re.findall(r"^(\S+)==", run("pip freeze", bin_, tmp_path), re.M)}
    assert installed - {"ssod"} == set(read("docker/slim-requirements.txt"))
    write_onnx(tmp_path / "small.onnx", card())

    said = run(["python", "-c", PROGRAM], bin_, tmp_path)
    assert said.startswith("Results(photo.png: 1 dog, 1 cat) [[30.0, 20.0, 60.0, 60.0]")
    assert said.endswith("no torch\n")
    said = run(["ssod", "predict", "model=small.onnx", "source=photo.png"], bin_, tmp_path)
    assert "2 objects on 1 images" in said
    assert (tmp_path / "runs" / "predict" / "exp" / "photo.jpg").is_file()

    size = megabytes(bin_.parent)
    print(f"slim environment: {size:.0f} MB")
    assert size < 300, "docs/export.md says 216"
