"""docs/export.md: its programs, commands and faults are run from the page itself."""

from __future__ import annotations

import importlib.util
import re
import runpy
import shlex
from pathlib import Path

import numpy as np
import pytest
from dockerfiles import FILES, ROOT, instructions
from PIL import Image
from small_models import card, write_onnx

from ssod import SSOD
from ssod.cli import main
from ssod.config import load_config, parse_words

PAGE = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.M | re.S)  # (language, text)


def blocks(language: str) -> list[str]:
    return [text for found, text in BLOCKS if found == language]


def commands() -> list[list[str]]:
    """Words of every command, in the order of the page."""
    return [shlex.split(line, comments=True) for text in blocks("") for line in text.splitlines()]


SSOD_COMMANDS = list({tuple(words): None for words in commands() if words[0] == "ssod"})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the page speaks of, as far as it takes no training."""
    monkeypatch.chdir(tmp_path)
    write_onnx(tmp_path / "best.onnx", card(inputs=("images",), size=(96, 160)), sized=False)
    write_onnx(tmp_path / "foreign.onnx", None)
    (tmp_path / "best.pt").write_bytes(b"not looked into before the arguments are right")
    (tmp_path / "photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg", quality=95)
    Image.fromarray(pixels).save(tmp_path / "photos" / "a.jpg")
    return tmp_path


def program(number: int, folder: Path) -> Path:
    file = folder / f"program{number}.py"
    file.write_text(blocks("python")[number], encoding="utf-8")
    return file


def test_the_program_with_bare_onnxruntime(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = runpy.run_path(str(program(0, folder)))
    (result,) = SSOD("best.onnx").predict("photo.jpg", conf=0.05)
    assert len(result.boxes) == held["found"] == 2
    own = np.clip(held["boxes"][0, :2] / held["scale"], 0, [120, 90, 120, 90])
    np.testing.assert_allclose(own, result.boxes.xyxy, atol=1e-3)
    np.testing.assert_allclose(held["scores"][0, :2], result.boxes.conf, atol=1e-6)
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == ["dog", "cat"]


def test_the_program_with_ssod(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(program(1, folder)))
    assert "['dog', 'cat']" in capsys.readouterr().out
    assert len(blocks("python")) == 2, "a third program is not run"


@pytest.mark.parametrize("words", SSOD_COMMANDS, ids=" ".join)
def test_a_command_has_arguments_that_exist(words: tuple[str, ...]) -> None:
    load_config(words[1], parse_words(words[2:]))


def test_the_faults(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (text,) = blocks("console")
    pairs = re.findall(r"^\$ ssod (.+)\n(ssod: .+)$", text, re.M)
    assert len(pairs) * 2 == len(text.splitlines()) > 10
    before = sorted(p.name for p in folder.iterdir())
    for command, expected in pairs:
        assert main(shlex.split(command)) == 2, command
        assert capsys.readouterr().err.startswith(expected), command
    assert sorted(p.name for p in folder.iterdir()) == before, "nothing is left"


def test_other_commands_are_those_of_the_dockerfiles() -> None:
    """pip's are run by test_slim.py, word for word; docker's stand in the Dockerfiles (see test_docker.py)."""
    lines = [line for text in blocks("") for line in text.splitlines()]
    slim = [
        rest for word, rest in instructions(FILES[1].read_text(encoding="utf-8")) if word == "RUN" and "pip" in rest
    ]
    assert [line for line in lines if line.startswith("pip ")] == slim
    comments = [path.read_text(encoding="utf-8") for path in FILES]
    for line in lines:
        assert line.startswith(("ssod ", "pip ", "docker ")), line
        if line.startswith("docker "):
            assert any(f"#   {line}\n" in text for text in comments), line


def masked(line: str) -> str:
    """A line without its numbers."""
    return re.sub(r"[+-]?\d[\d.]*(?:e[+-]?\d+)?", "0", line)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_every_command_runs(
    folder: Path, tiny: dict[str, object], shapes_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a checkpoint of six steps; in the order of the page, since some need what others made."""
    from ssod.config import to_yaml

    run = tiny | {"project": str(folder / "runs")}
    (folder / "run.yaml").write_text(to_yaml(load_config("train", run)), encoding="utf-8")
    assert main(["train", "cfg=run.yaml"]) == 0, capsys.readouterr().err
    next(folder.glob("runs/train/*/weights/best.pt")).replace(folder / "best.pt")
    (folder / "best.onnx").unlink()
    text = shapes_data.read_text(encoding="utf-8").replace("path: .", f"path: {shapes_data.parent}")
    (folder / "my.yaml").write_text(text, encoding="utf-8")
    capsys.readouterr()

    said: list[str] = []
    rtx = importlib.util.find_spec("tensorrt_rtx") is not None  # builds engines without a GPU
    for words in SSOD_COMMANDS:
        if "format=engine" in words and not rtx:
            continue
        code = main(list(words[1:]))
        told = capsys.readouterr()
        assert code == 0, f"{' '.join(words)}\n{told.out}\n{told.err}"
        said += told.out.splitlines()
    for name in ("best.onnx", "any.onnx", "best.fp16.onnx", "best.int8.onnx", "best.tensorrt.onnx"):
        assert (folder / name).is_file(), name
    assert (folder / "best.engine").is_file() == rtx
    (text,) = blocks("text")
    for line in text.splitlines():
        assert masked(line) in {masked(one) for one in said}, line
