"""The zoo with an entry of its own: a student of six steps, packed, found by name, used, damaged, fetched."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from ssod import SSOD, zoo
from ssod.checkpoint import CheckpointError, is_checkpoint, load_checkpoint
from ssod.cli import main
from ssod.config import load_config
from ssod.deploy.predictor import Predictor, load_detector
from ssod.errors import Fault, UserError
from ssod.packed import read_packed, write_packed
from ssod.zoo.fetch import locate, resolve

NAME = "tiny_fcos"


@pytest.fixture(scope="session")
def made(shapes_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(checkpoint, zoo folder with the entry made of it)."""
    root = tmp_path_factory.mktemp("zoo")
    tiny = {"name": "fcos", "fpn_channels": 32, "head_convs": 1}
    model = SSOD("fcos")
    model.train(
        str(shapes_data),
        detector=tiny,
        backbone="mobilenetv3_small_050",
        strategy={"name": "supervised"},
        imgsz=64,
        iters=12,
        val_interval=12,
        batch=4,
        workers=0,
        amp=False,
        plots=False,
        device="cpu",
        project=str(root),
    )
    words = [f"model={model.path}", f"data={shapes_data}", f"out={root / 'home'}", f"project={root}", "workers=0"]
    facts = [
        "trained_by=supervised",
        "labels=all 24 images",
        "data_licence=CC0-1.0",
        "command=ssod train",
        "commit=abc",
    ]
    assert main(["zoo", "pack", NAME, *words, *facts, "supervised_ap=0.0"]) == 0
    assert model.path is not None
    return model.path, root / "home"


@pytest.fixture
def home(made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, which is the zoo for this test."""
    shutil.copytree(made[1], tmp_path / "home")
    monkeypatch.setattr(zoo, "HOME", tmp_path / "home")
    monkeypatch.setenv("SSOD_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def test_the_package_holds_small_sound_files_and_a_table_of_them() -> None:
    here = zoo.entries()
    files = {p.name: p for p in (zoo.HOME / "weights").glob("*.safetensors")}
    assert set(files) == {e.file for e in here.values() if e.file}
    assert all(p.stat().st_size <= zoo.LARGEST for p in files.values())
    assert sum(p.stat().st_size for p in files.values()) <= zoo.TOGETHER
    for entry in here.values():
        assert entry.url is None or entry.url.startswith("https://")
        assert all((entry.command, entry.commit, entry.data_licence, entry.weights_licence))
        if entry.file:
            detector, content = load_detector(locate(entry))
            assert (content["names"], content["spec"]) == (entry.names, entry.spec)
            assert detector.spec["options"].items() >= entry.spec["options"].items()  # options that came later are new
            assert files[entry.file].stat().st_size == entry.size


def test_a_packed_network_is_the_checkpoint_to_half_a_thousandth(made: tuple[Path, Path]) -> None:
    checkpoint, folder = made
    path = folder / "weights" / f"{NAME}.safetensors"
    content = load_checkpoint(checkpoint)
    there, here = content["networks"][content["use"]], load_checkpoint(path)["networks"][content["use"]]
    assert set(there) == set(here)
    whole = 0
    for key, value in there.items():
        assert here[key].dtype == value.dtype
        if value.is_floating_point():
            torch.testing.assert_close(here[key], value, rtol=1e-3, atol=1e-7)
        else:
            whole += 1
            assert torch.equal(here[key], value)
    assert whole > 0
    assert path.stat().st_size < checkpoint.stat().st_size
    assert is_checkpoint(path)
    alone, _ = load_detector(path)  # the file says all that is needed
    assert next(alone.parameters()).dtype == torch.float32
    assert read_packed(path)["about"]["data_licence"] == "CC0-1.0"


def test_numbers_beyond_fp16_are_not_written(made: tuple[Path, Path], tmp_path: Path) -> None:
    content = load_checkpoint(made[0])
    state = content["networks"][content["use"]]
    key = next(k for k, v in state.items() if v.is_floating_point())
    state[key] = torch.full_like(state[key], 1e6)
    with pytest.raises(UserError, match="65504"):
        write_packed(content, tmp_path / "x.safetensors", {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault(30)
def test_any_changed_byte_is_noticed(made: tuple[Path, Path], tmp_path: Path) -> None:
    raw = (made[1] / "weights" / f"{NAME}.safetensors").read_bytes()
    path = tmp_path / "x.safetensors"
    for place in (3, 100, raw.index(b'"spec'), raw.index(b"sha256") + 20, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        with pytest.raises(CheckpointError):
            load_checkpoint(path)
    for length in (0, 7, 200, len(raw) - 1):
        path.write_bytes(raw[:length])
        with pytest.raises(CheckpointError):
            load_checkpoint(path)


def test_other_peoples_safetensors_are_not_ours(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"conv1.weight": torch.ones(2)}, tmp_path / "x.safetensors")
    assert not is_checkpoint(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="not written by ssod"):
        load_checkpoint(tmp_path / "x.safetensors")


def test_the_list_names_what_is_there(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in (NAME, "supervised", "all 24 images", "CC0-1.0", zoo.find(NAME).sha256))
    (home / "entries.json").write_text("[]")
    assert main(["zoo", "list"]) == 0
    assert "no weights yet" in capsys.readouterr().out


def test_verify_scores_again(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["zoo", "verify", NAME, "device=cpu", "workers=0", f"project={tmp_path}"]
    assert main(words) == 0
    assert "the same" in capsys.readouterr().out
    entry = zoo.find(NAME)
    zoo.add(dataclasses.replace(entry, ap=entry.ap + 0.002), home)
    assert main(words) == 1
    assert "NOT the same" in capsys.readouterr().out
    assert main(["zoo", "verify", "tiny_fcso"]) == 2
    assert f"Did you mean '{NAME}'" in capsys.readouterr().err
    assert main(["zoo", "verify"]) == 2
    assert "needs a name behind it" in capsys.readouterr().err


def test_a_name_is_a_model_everywhere(home: Path, shapes_data: Path, made: tuple[Path, Path], tmp_path: Path) -> None:
    photo = shapes_data.parent / "images" / "val" / "0.png"
    found = Predictor(NAME, device="cpu", conf=0.01)(photo)[0]
    model = SSOD(NAME, device="cpu")
    again = model.predict(photo, conf=0.01)[0]
    assert len(found.boxes.conf) > 0
    assert found.boxes.xyxy.tolist() == again.boxes.xyxy.tolist()
    assert model.info(verbose=False).detector == "fcos"
    with pytest.raises(UserError, match="Did you mean 'tiny_fcos'"):
        Predictor("tiny_fcso")
    with pytest.raises(UserError, match="Did you mean 'tiny_fcos'"):
        SSOD("tiny_fcso")
    assert main(["label", f"model={NAME}", f"source={photo}", f"out={tmp_path / 'labels'}", "device=cpu"]) == 0
    assert main(["check", f"model={NAME}", "imgsz=64", "device=cpu"]) == 0


def test_an_export_is_not_written_into_the_package(home: Path, tmp_path: Path) -> None:
    before = sorted(home.rglob("*"))
    # Nothing of this model scores as high: which of two equal scores comes first is not the question here.
    assert SSOD(NAME, device="cpu").export(format="torchscript", conf=0.9).resolve() == tmp_path / f"{NAME}.torchscript"
    assert sorted(home.rglob("*")) == before


def test_a_name_that_is_also_a_file_is_asked_about(home: Path, tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    with pytest.raises(UserError, match=f"./{NAME}"):
        resolve(NAME)
    assert resolve(f"./{NAME}") == Path(NAME)


def test_a_student_trains_onward_on_other_classes(home: Path, shapes_data: Path, tmp_path: Path) -> None:
    """One class of the new data is known by name, the other is not: the head has two rows, one of them the old one."""
    root = tmp_path / "mine"
    known = zoo.find(NAME).names
    for split in ("train", "val"):
        truth = json.loads((shapes_data.parent / "annotations" / f"instances_{split}.json").read_text())
        truth["categories"] = [{"id": 1, "name": "something new"}, {"id": 2, "name": known[1]}]
        truth["annotations"] = [a for a in truth["annotations"] if a["category_id"] <= 2]
        (root / "annotations").mkdir(parents=True, exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(truth))
        shutil.copytree(shapes_data.parent / "images" / split, root / "images" / split)
    (root / "data.yaml").write_text("path: .\ntrain: images/train\nval: images/val\n")
    from ssod.engine.setup import build_student

    spec = zoo.find(NAME).spec
    start = {"weights": NAME, "detector": {"name": "fcos"} | spec["options"], "backbone": spec["backbone"]}
    names = ["something new", known[1]]
    student, note = build_student(load_config("train", start), names)
    assert "1 of 2 classes found by name" in str(note)
    old = load_checkpoint(resolve(NAME))["networks"]
    row = next(iter(old.values()))["cls_logits.weight"][1]
    assert torch.equal(student.state_dict()["cls_logits.weight"][1], row)

    model = SSOD(NAME, device="cpu")
    done = model.train(
        str(root / "data.yaml"), iters=2, batch=2, workers=0, plots=False, strategy="supervised", project=str(tmp_path)
    )
    assert list(model.names.values()) == names
    assert done.step > 0
    words = f"data={root / 'data.yaml'} iters=1 batch=2 workers=0 plots=false device=cpu project={tmp_path}"
    assert main(["train", f"model={NAME}", "strategy=supervised", *words.split()]) == 0


class _Server(ThreadingHTTPServer):
    def __init__(self, folder: Path) -> None:
        self.requests = 0
        server = self

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                server.requests += 1
                super().do_GET()

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))


@pytest.fixture
def far(home: Path, tmp_path: Path):
    """(entry whose file a server on this machine gives, the server); the package does not hold it any more."""
    shutil.move(home / "weights", tmp_path / "served")
    server = _Server(tmp_path / "served")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/{NAME}.safetensors"
    entry = dataclasses.replace(zoo.find(NAME), file=None, url=url)
    zoo.add(entry, home)
    yield entry, server
    server.shutdown()
    server.server_close()


def test_a_file_elsewhere_is_fetched_once(far, tmp_path: Path) -> None:
    entry, server = far
    path = resolve(NAME)
    assert path.parent == tmp_path / "cache" / "zoo"
    assert SSOD(NAME, device="cpu").path == path
    assert server.requests == 1
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="is damaged"):
        locate(entry)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"size": 1000}, "larger than the 1000 bytes"),
        ({"sha256": "0" * 64}, "has the SHA-256"),
        ({"url": "http://example.org/x.safetensors"}, "not https"),
        ({"url": "file:///etc/hostname"}, "not https"),
    ],
)
@pytest.mark.fault(30)
def test_what_is_not_the_entry_leaves_nothing_behind(far, tmp_path: Path, change: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        locate(dataclasses.replace(far[0], **change))
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] == []


def test_a_table_that_cannot_be_right_is_refused(home: Path) -> None:
    entry = zoo.find(NAME)
    for change in ({"file": None}, {"url": "https://x.org/y"}, {"file": "../x"}, {"sha256": "abc"}):
        with pytest.raises(Fault):
            dataclasses.replace(entry, **change)
    with pytest.raises(UserError, match="no name for the zoo"):
        dataclasses.replace(entry, name="Tiny-FCOS")
    (home / "entries.json").write_text("{")
    with pytest.raises(Fault, match="cannot be read"):
        zoo.entries()
