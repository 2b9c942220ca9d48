"""What this package never does, read from its syntax trees: run what a file says, or unpack it wherever it wants."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = [*sorted((ROOT / "ssod").rglob("*.py")), ROOT / "hubconf.py"]
NEVER = {
    "eval": "runs text",
    "exec": "runs text",
    "compile": "runs text",
    "__import__": "imports what a text names",
    "os.system": "a shell",
    "os.popen": "a shell",
    "subprocess.getoutput": "a shell",
    "yaml.load": "runs Python tags; yaml.safe_load does not",
    "yaml.unsafe_load": "runs Python tags",
    "yaml.full_load": "builds Python objects",
    "pickle.load": "runs what the file says",
    "pickle.loads": "runs what the file says",
    "pickle.Unpickler": "runs what the file says",
    "marshal.loads": "crashes on made-up bytes",
    "shelve.open": "is a pickle",
    "tempfile.mktemp": "a name that another may take",
    "random.seed": "global random numbers",
    "pandas.read_pickle": "runs what the file says",
    "joblib.load": "runs what the file says",
}


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call with its dotted name, as far as it has one: ("torch.load", node)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if all(part.isidentifier() for part in name.split(".")):
                yield name, node


def dangers(source: str) -> list[str]:
    """What is not allowed in a file's text, one sentence each."""
    found = []
    for name, node in calls(ast.parse(source)):
        said = {k.arg: ast.unparse(k.value) for k in node.keywords if k.arg is not None}
        where = f"line {node.lineno}: {name}"
        if name in NEVER:
            found.append(f"{where}: {NEVER[name]}")
        if name == "torch.load" and said.get("weights_only") != "True":
            found.append(f"{where} without weights_only=True")
        if name.endswith((".load", ".memmap")) and said.get("allow_pickle") == "True":
            found.append(f"{where} with allow_pickle")
        if said.get("shell", "False") != "False":
            found.append(f"{where} in a shell")
        if name.endswith((".extract", ".extractall", ".unpack_archive")):
            found.append(f"{where}: an archive may name any place; members are read one at a time")
        if name.endswith("verify") and said.get("verify") == "False":
            found.append(f"{where}: unverified")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_of_it_is_in_the_package(path: Path) -> None:
    assert dangers(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "eval(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "pickle.loads(raw)",
        "subprocess.run(words, shell=True)",
        "tar.extractall(folder)",
        "os.system(words)",
    ],
)
def test_the_reader_sees_it(line: str) -> None:
    assert len(dangers(line)) == 1


def test_sound_lines_are_left_alone() -> None:
    sound = "model.eval()\ntorch.load(path, map_location='cpu', weights_only=True)\nyaml.safe_load(text)\nre.compile(x)"
    assert dangers(sound) == []


def test_actions_are_pinned_by_commit() -> None:
    used = [
        line.split("uses:")[1].strip()
        for path in sorted((ROOT / ".github").rglob("*.yml"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if "uses:" in line
    ]
    assert used
    for action in used:  # with the release that the commit is, for the reader
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action
