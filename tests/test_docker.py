"""The Dockerfiles: their form, and their commands. No Docker is needed, and no image is built here.

The form is checked by rules of our own (`dockerfiles.py`) in every run, and by checkov in `make lint-docker`.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from dockerfiles import FILES, ROOT, build, faults, ignored, instructions, megabytes, run

GOOD = """
# comment
FROM python:3.12.12-slim-trixie
COPY README.md \\
  ./
RUN pip install --no-cache-dir -r x.txt
USER 1000
ENTRYPOINT ["ssod"]
"""


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_a_dockerfile_keeps_the_rules(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert faults(text) == []
    assert "has not been built" in text, "what was not tried is said"
    assert len(text.splitlines()) <= 25


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("python:3.12.12-slim-trixie", "python", "FROM python: no tag with a whole version"),
        ("python:3.12.12-slim-trixie", "python:3.12-slim", "FROM python:3.12-slim: no tag"),
        ("python:3.12.12-slim-trixie", "python:latest", "FROM python:latest: no tag"),
        ("COPY README.md", "ADD https://example.org/README.md", "ADD unpacks"),
        ("COPY README.md", "COPY READYOU.md", "COPY READYOU.md: is not there"),
        ("COPY README.md", "COPY tests", "COPY tests: .dockerignore leaves it out"),
        (" --no-cache-dir", "", "leaves a cache"),
        ("-r x.txt", "torch", "versions are not pinned"),
        ("pip install", "apt-get install -y git && pip install", "apt-get install -y git: what it brings"),
        ("USER 1000", "", "USER root"),
        ("USER 1000", "USER 0", "USER 0"),
        ("USER 1000", "USER 1000\nUSER root", "USER root"),
        ('["ssod"]', "ssod", "ENTRYPOINT ssod: in a shell"),
        ('ENTRYPOINT ["ssod"]', "", "not one ENTRYPOINT"),
        ("USER 1000", "ENV API_TOKEN=1\nUSER 1000", "stays readable"),
    ],
)
def test_a_breach_is_found(old: str, new: str, fault: str) -> None:
    assert faults(GOOD) == []
    assert old in GOOD
    assert any(fault in found for found in faults(GOOD.replace(old, new)))


def test_data_and_runs_stay_out_of_the_context() -> None:
    for path in ("runs", "tests", ".venv", ".git", "data/a.jpg", "best.pt", "docker/Dockerfile"):
        assert ignored(path, ROOT), path
    for path in ("ssod", "ssod/cli.py", "cfg/default.yaml", "docker/slim-requirements.txt"):
        assert not ignored(path, ROOT), path
    assert ignored("ssod/data/__pycache__", ROOT)


def test_commands_in_comments_and_docs_name_files_that_are_there() -> None:
    texts = [path.read_text(encoding="utf-8") for path in [*FILES, ROOT / "docs" / "export.md"]]
    named = [name for text in texts for name in re.findall(r"docker build -f (\S+)", text)]
    assert len(named) >= len(FILES)
    assert {ROOT / name for name in named} == set(FILES)
    tags = dict(re.findall(r"docker build -f (\S+) -t (\S+)", "\n".join(texts)))
    ran = re.findall(r"docker run .*?/work\" (\S+)", "\n".join(texts))
    assert set(ran) == set(tags.values())


def test_what_docker_would_run_is_run_by_make() -> None:
    """Every RUN is a pip command, which `build` runs word for word, or the line that makes the user."""
    for path in FILES:
        for word, rest in instructions(path.read_text(encoding="utf-8")):
            if word == "RUN":
                assert rest.startswith("pip install ") or rest == (
                    "useradd --create-home --home-dir /work --uid 1000 ssod"
                )
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "-m slow tests/test_docker.py" in makefile
    assert "-m slow tests/deploy/test_slim.py" in makefile


@pytest.mark.slow
def test_the_training_image_s_commands(tmp_path: Path) -> None:
    """Gigabytes of packages; the environment then trains and exports."""
    bin_ = build(FILES[0], tmp_path)
    print(f"training environment: {megabytes(bin_.parent):.0f} MB")
    assert run(["ssod", "help"], bin_, tmp_path).startswith("ssod MODE")
    words = ["detector.name=fcos", "detector.fpn_channels=32", "backbone=resnet10t", "imgsz=64", "iters=2", "burn_in=1"]
    words += ["data=shapes", "labeled=10%", "batch=2", "workers=0", "plots=false", "device=cpu", "ema_decay=0.5"]
    run(["ssod", "train", *words], bin_, tmp_path)
    said = run(["ssod", "export", "model=runs/train/exp/weights/best.pt"], bin_, tmp_path)
    assert "compared in onnxruntime" in said
