"""Dockerfiles as data: their instructions, what in them breaks a rule, and their commands run without Docker."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FILES = [ROOT / "docker" / "Dockerfile", ROOT / "docker" / "Dockerfile.slim"]
_FROM = re.compile(r"[\w./-]+:\d+\.\d+\.\d+[\w.-]*")  # a name and a tag that holds a whole version


class Instruction(NamedTuple):
    word: str
    rest: str


def instructions(text: str) -> list[Instruction]:
    """Without comments; lines that go on are joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [Instruction(*line.split(None, 1)) for line in joined.splitlines()]


def faults(text: str, root: Path = ROOT) -> list[str]:
    """What breaks a rule in a Dockerfile whose context is `root`."""
    found = []
    given = instructions(text)
    user = ""
    for word, rest in given:
        if word == "FROM" and not _FROM.fullmatch(rest):
            found.append(f"FROM {rest}: no tag with a whole version")
        elif word == "ADD":
            found.append("ADD unpacks and downloads, COPY does not")
        elif word == "USER":
            user = rest
        elif word == "RUN":
            found += _faults_of_run(rest)
        elif word == "COPY":
            found += _faults_of_copy(rest, root)
        elif word in ("ENTRYPOINT", "CMD") and not _is_list(rest):
            found.append(f"{word} {rest}: in a shell, which takes the signals")
        elif word == "ENV" and re.search(r"(?i)token|secret|passw", rest):
            found.append(f"ENV {rest}: stays readable in the image")
    if not re.fullmatch(r"[1-9]\d*", user):
        found.append(f"USER {user or 'root'}: not the number of a user without rights")
    if [i.word for i in given].count("ENTRYPOINT") != 1:
        found.append("not one ENTRYPOINT")
    return found


def _faults_of_run(command: str) -> list[str]:
    found = []
    for part in re.split(r"&&|;|\|", command):
        if re.search(r"\b(curl|wget|sudo|apt|apt-get)\b", part):
            found.append(f"RUN {part.strip()}: what it brings is not pinned")
        if "pip install" in part:
            if "--no-cache-dir" not in part:
                found.append(f"RUN {part.strip()}: leaves a cache")
            if not re.search(r"--constraint |-r |--no-deps ", part):
                found.append(f"RUN {part.strip()}: versions are not pinned")
    return found


def _faults_of_copy(rest: str, root: Path) -> list[str]:
    *sources, _ = rest.split()
    found = [f"COPY {s}: is not there" for s in sources if not (root / s).exists()]
    return found + [f"COPY {s}: .dockerignore leaves it out" for s in sources if ignored(s, root)]


def ignored(source: str, root: Path) -> bool:
    """Whether .dockerignore keeps a path out of the context: the last pattern that fits it or a folder above it."""
    out = False
    above = [source, *(str(p) for p in Path(source).parents if str(p) != ".")]
    for line in (root / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.strip().removeprefix("!")
        if pattern and not pattern.startswith("#") and any(fnmatch.fnmatch(path, pattern) for path in above):
            out = not line.startswith("!")
    return out


def _is_list(text: str) -> bool:
    try:
        return isinstance(json.loads(text), list)
    except ValueError:
        return False


def build(dockerfile: Path, folder: Path) -> Path:
    """Do in `folder` what the Dockerfile does, but for the base image and users: copy what it copies, and no more, and
    run its pip commands word for word in a fresh virtual environment. Returns the environment's `bin`."""
    venv.create(folder / "venv", with_pip=True)
    bin_ = folder / "venv" / ("Scripts" if sys.platform == "win32" else "bin")
    context = folder / "context"
    context.mkdir()
    for word, rest in instructions(dockerfile.read_text(encoding="utf-8")):
        if word == "COPY":
            *sources, to = rest.split()
            for source in sources:
                _copy(ROOT / source, context / to)
        elif word == "RUN" and "pip" in rest:
            run(rest, bin_, context)
    return bin_


def _copy(source: Path, to: Path) -> None:
    """As COPY does: the content of a folder, but a file under its name."""
    if source.is_dir():
        shutil.copytree(source, to, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        to.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, to)


def run(command: str | list[str], bin_: Path, folder: Path) -> str:
    """What a command prints, in `folder` with the environment's programs first and none of this process's packages."""
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")
    env = {k: v for k, v in os.environ.items() if k not in hidden}
    env["PATH"] = os.pathsep.join([str(bin_), env["PATH"]])
    shell = isinstance(command, str)
    done = subprocess.run(command, shell=shell, cwd=folder, env=env, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def megabytes(folder: Path) -> float:
    """Size on disk of all files in a folder, in 10^6 bytes."""
    return sum(p.stat().st_blocks * 512 for p in folder.rglob("*") if p.is_file() and not p.is_symlink()) / 1e6
