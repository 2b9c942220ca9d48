"""The command line as a user meets it: whole processes, exit codes, sentences."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ssod import __version__
from ssod.cli import SUMMARY, help_text, main


def ssod(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "ssod", *words], capture_output=True, text=True, timeout=120)


def test_help_and_import_do_not_load_torch() -> None:
    code = (
        "import sys, ssod.cli; ssod.cli.main(['help']); ssod.cli.main(['help', 'train']); print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert out.stdout.splitlines()[-1] == "False", out.stderr


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, ssod; dir(ssod); print([m for m in ('torch', 'numpy', 'pydantic', 'yaml') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert out.stdout.strip() == "[]", out.stderr


def test_public_names_exist_and_others_do_not() -> None:
    import ssod as package

    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = package.nothing_of_the_kind


def test_help_names_every_mode_and_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(mode in shown for mode in SUMMARY)
    assert "ema_decay" in help_text("train")
    assert main(["predict", "--help"]) == 0
    assert "source" in capsys.readouterr().out
    assert main(["version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


def test_cfg_lists_the_package_and_prints_one_complete(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cfg"]) == 0
    listed = capsys.readouterr().out
    assert "demo.yaml" in listed
    assert "data/bccd.yaml" in listed
    assert main(["cfg", "cfg=demo.yaml", "batch=3"]) == 0
    assert "batch: 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["trian"], "'trian' is not a mode. Did you mean 'train'?"),
        (["epochs=3"], "which mode?"),
        (["train", "epoch=100"], "'epoch' is not a valid argument. Did you mean epochs?"),
        (["train"], "there is no data: give data=DATA.yaml"),
        (
            ["train", "data=shapes", "strategy=mean_teecher"],
            "'mean_teecher' is not a strategy. Did you mean 'mean_teacher'",
        ),
        (
            ["train", "data=shapes", "strategy.taw=1"],
            "'strategy.taw' is not a valid argument. Did you mean strategy.tau",
        ),
        (["train", "data=shapes", "detector=fcoss"], "'fcoss' is not a detector"),
        (["train", "data=shapes", "device=cuda:99"], "CUDA devices"),
        (["train", "data=no.yaml"], "there is no YAML 'no.yaml'"),
        (["train", "resume=nowhere"], "resume=nowhere is neither a run folder nor a checkpoint"),
        (["predict", "model=no.pt", "source=x"], "there is no checkpoint no.pt"),
        (["help", "trian"], "Did you mean 'train'?"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert "Traceback" not in error


def test_a_whole_process_answers_with_the_code() -> None:
    out = ssod("train", "epoch=100")
    assert out.returncode == 2
    assert out.stderr.startswith("ssod: 'epoch' is not a valid argument.")
