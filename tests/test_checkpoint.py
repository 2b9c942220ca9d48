"""Checkpoints: atomic, verified, unable to run code (FAULTS 1, 2, 3, 27)."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssod import checkpoint
from ssod.checkpoint import FORMAT, CheckpointError, load_checkpoint, load_last_good, save_checkpoint, sweep


def content(value: float) -> dict[str, object]:
    return {"format": FORMAT, "weights": torch.full((50, 50), value), "names": ["a", "b"], "value": value}


def test_what_goes_in_comes_out_also_by_plain_torch(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    save_checkpoint(content(1.5), path)
    assert load_checkpoint(path)["value"] == 1.5
    assert torch.equal(torch.load(path, weights_only=True)["weights"], torch.full((50, 50), 1.5))
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_keep_moves_the_old_file(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        save_checkpoint(content(value), tmp_path / "last.pt", keep=tmp_path / "previous.pt")
    assert load_checkpoint(tmp_path / "last.pt")["value"] == 2.0
    assert load_checkpoint(tmp_path / "previous.pt")["value"] == 1.0


@settings(max_examples=40, deadline=None)
@given(st.data())
@pytest.mark.fault(3)
def test_any_flipped_bit_is_noticed(data: st.DataObject) -> None:
    path = Path(os.environ.get("PYTEST_TMP", "/tmp")) / f"ssod-flip-{os.getpid()}.pt"
    save_checkpoint(content(1.0), path)
    raw = bytearray(path.read_bytes())
    bit = data.draw(st.integers(0, len(raw) * 8 - 1))
    raw[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(raw)
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    path.unlink()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
@pytest.mark.fault(3)
def test_a_truncated_file_falls_back_to_the_last_good_one(tmp_path: Path, share: float) -> None:
    for value in (1.0, 2.0):
        save_checkpoint(content(value), tmp_path / "last.pt", keep=tmp_path / "previous.pt")
    raw = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(raw[: int(len(raw) * share)])
    loaded, said = load_last_good(tmp_path)
    assert loaded["value"] == 1.0
    assert "last.pt" in said
    (tmp_path / "previous.pt").unlink()
    with pytest.raises(CheckpointError, match=r"last\.pt.*previous\.pt"):
        load_last_good(tmp_path)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.fault(27)
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    witness, path = tmp_path / "witness", tmp_path / "evil.pt"
    pickle.loads(pickle.dumps(Evil(witness)))  # the payload works
    assert witness.is_dir()
    witness.rmdir()
    path.write_bytes(pickle.dumps(Evil(witness)))
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        load_checkpoint(path)
    save_checkpoint({"format": FORMAT, "evil": Evil(witness)}, path)  # even with a valid checksum
    with pytest.raises(CheckpointError, match="other than tensors and plain values"):
        load_checkpoint(path)
    assert not witness.exists()


def test_foreign_files_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "none.pt")
    torch.save({"model": torch.zeros(3)}, tmp_path / "foreign.pt")
    with pytest.raises(CheckpointError, match="was not written by ssod"):
        load_checkpoint(tmp_path / "foreign.pt")
    save_checkpoint({"format": 99}, tmp_path / "future.pt")
    with pytest.raises(CheckpointError, match="has format 99"):
        load_checkpoint(tmp_path / "future.pt")


@pytest.mark.fault(2)
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pt"
    save_checkpoint(content(1.0), path)
    code = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from ssod.checkpoint import save_checkpoint\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"  # writes beyond 4 kB fail as on a full disk
        f"save_checkpoint({{'format': 1, 'w': torch.zeros(100000)}}, Path({str(path)!r}))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode != 0
    assert "OSError" in out.stderr
    assert load_checkpoint(path)["value"] == 1.0
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.fault(1)
def test_a_kill_while_writing_leaves_old_or_new_and_strays_are_swept(tmp_path: Path) -> None:
    code = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from ssod.checkpoint import save_checkpoint\n"
        "n = 0\n"
        "while True:\n"
        "    n += 1\n"
        f"    save_checkpoint({{'format': 1, 'n': n, 'w': torch.zeros(2000000)}}, Path({str(tmp_path / 'a.pt')!r}))\n"
        "    print(n, flush=True)\n"
    )
    strays = 0
    for attempt in range(5):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        acknowledged = int(process.stdout.readline())
        deadline = time.monotonic() + 30  # strike while a temporary file is there, each time a little later
        while not any(tmp_path.glob(".*")) and time.monotonic() < deadline:
            pass
        time.sleep(0.001 * attempt)
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split()
        process.wait()
        acknowledged = int(rest[-1]) if rest else acknowledged
        assert process.returncode == -signal.SIGKILL
        assert load_checkpoint(tmp_path / "a.pt")["n"] >= acknowledged
        strays += len([p for p in tmp_path.iterdir() if p.name != "a.pt"])
        sweep(tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]
    assert strays > 0, "no kill hit a write: the test did not test"


@pytest.mark.fault(1)
def test_a_stray_temporary_file_is_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / f".last.pt.1{checkpoint._TEMPORARY}").write_bytes(b"x")
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []
