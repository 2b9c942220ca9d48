"""The film of pseudo labels: what is written, that it is what the strategy says, and that the run does not notice."""

from __future__ import annotations

import contextlib
import io
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from ssod.checkpoint import load_checkpoint
from ssod.config import load_config
from ssod.data.evalset import EvalLoader
from ssod.deploy.infer import to_source
from ssod.engine.callbacks import Callbacks, State
from ssod.engine.trainer import SemiTrainer
from ssod.engine.watch.film import MOMENTS, Film, thin_out
from ssod.engine.watch.reel import Reel
from ssod.errors import Fault
from ssod.strategies.verdicts import looking

Tiny = dict[str, Any]
FAST = {"val_fraction": 0.25, "max_det": 10, "film": 3}


def run(overrides: Tiny, *callbacks: dict[str, Any], **more: Any) -> SemiTrainer:
    trainer = SemiTrainer(load_config("train", FAST | overrides | more), Callbacks(*callbacks))
    trainer.train()
    return trainer


def moments(trainer: SemiTrainer) -> dict[int, dict[str, Any]]:
    files = sorted((trainer.folder / "pseudo").glob("*.json"))
    return {int(p.stem.removeprefix("step")): json.loads(p.read_text()) for p in files}


def flat(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.flatten().contiguous().view(torch.uint8).tolist() if value.dim() else value.item()
    if isinstance(value, dict):
        return {k: flat(v) for k, v in value.items()}
    return str(value)


def learned(trainer: SemiTrainer) -> dict[str, Any]:
    content = load_checkpoint(trainer.folder / "weights" / "last.pt")["train"]
    return {k: flat(content[k]) for k in ("strategy", "history", "best", "optimizer")}


def test_what_a_run_leaves(tiny: Tiny) -> None:
    trainer = run(tiny, plots=True, val_interval=2)
    folder = trainer.folder / "pseudo"
    told = moments(trainer)
    assert list(told) == [2, 3, 4, 6], "with every validation, that at the end of burn-in too"
    assert {p.name for p in (folder / "images").iterdir()} == {"1.jpg", "2.jpg", "3.jpg"}
    views = {p.name for p in (folder / "views").iterdir()}
    assert views == {f"step{s:06d}-{i}.jpg" for s in told for i in (1, 2, 3)}
    for path in (folder / "last.jpg", *(folder / "views").iterdir(), *(folder / "images").iterdir()):
        with Image.open(path) as image:
            image.load()
            assert max(image.size) <= (320 if path.parent.name == "images" else 1100)

    unlabeled = {str(s.path) for s in trainer.data.unlabeled}
    for step, content in told.items():
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO(folder / f"step{step:06d}.json")
        assert len(coco.imgs) == 3
        assert {i["file_name"] for i in content["images"]} <= unlabeled
        info = content["info"]
        assert (info["step"], info["network"], info["burn_in"]) == (
            step,
            "student" if step < 3 else "teacher",
            step < 3,
        )
        assert info["tau"] == dict.fromkeys(trainer.data.names, 0.02)
        sizes = {i["id"]: (i["width"], i["height"]) for i in content["images"]}
        for a in content["annotations"]:
            x, y, w, h = a["bbox"]
            assert 0 <= x <= x + w <= sizes[a["image_id"]][0] + 0.01
            assert 0 <= y <= y + h <= sizes[a["image_id"]][1] + 0.01
            assert a["kept"] == (a["score"] >= 0.02) == (a["cls_weight"] == 1.0)
            assert a["box_weight"] == 0.0, "mean_teacher without box_loss"
            assert a["reason"].startswith("score ")
    assert len(told[6]["annotations"])

    # Boxes are those of the teacher on the whole image, carried back to its pixels.
    last, pool = told[6], {str(s.path): s for s in trainer.data.unlabeled}
    assert trainer.strategy.teacher is not None
    for image in last["images"]:
        sample = pool[image["file_name"]]
        (view,) = EvalLoader([sample], trainer.config.imgsz, 1)
        with looking([trainer.strategy.teacher]):
            (found,) = trainer.strategy.label(view, 0.01, trainer.strategy.teacher)
        found = to_source(found, view.matrices[0], (sample.height, sample.width))
        own = [a["bbox"] for a in last["annotations"] if a["image_id"] == image["id"] and a["kept"]]
        x1, y1, x2, y2 = found.boxes[: len(own)].unbind(1)
        torch.testing.assert_close(torch.tensor(own), torch.stack([x1, y1, x2 - x1, y2 - y1], 1), atol=0.02, rtol=0)
        assert len(own)

    without = run(tiny, film=0, val_interval=2, name="without")
    assert not (without.folder / "pseudo").exists()
    assert learned(without) == learned(trainer), "the run has not noticed"


def test_a_resumed_run_goes_on_with_the_same_images(tiny: Tiny) -> None:
    def broken(state: State) -> None:
        if state.step == 5:
            raise KeyError("stop")

    tiny |= {"film_interval": 1}
    whole = run(tiny, name="whole")
    trainer = SemiTrainer(load_config("train", FAST | tiny | {"save_interval": 4}), Callbacks({"on_log": broken}))
    with pytest.raises(Fault):
        trainer.train()
    # As if the machine had gone down after a later moment than the checkpoint's.
    late = trainer.folder / "pseudo" / "step000009.json"
    late.write_text("{}")
    resumed = SemiTrainer(load_config("train", {"resume": str(trainer.folder)}))
    resumed.train()
    assert not late.exists()
    assert learned(whole) == learned(resumed)
    a, b = moments(whole), moments(resumed)
    assert list(a) == list(b) == [1, 2, 3, 4, 5, 6]
    assert a == b


def test_images_that_cannot_be_read_are_left_out_and_named(
    tiny: Tiny, shapes_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "more"
    folder.mkdir()
    for i, source in enumerate(sorted((shapes_data.parent / "images" / "val").iterdir())[:4]):
        (folder / f"{i}.png").write_bytes(source.read_bytes())
    tiny |= {"unlabeled": str(folder), "max_bad": 1.0, "film": 3, "film_interval": 2}
    chosen = Reel(SemiTrainer(load_config("train", FAST | tiny | {"name": "first"})))
    chosen.choose(3)
    first, second, _ = chosen.paths()

    Path(first).write_bytes(b"no image")

    def spoil(state: State) -> None:
        if state.step == 3:
            Path(second).write_bytes(b"")

    trainer = run(tiny, {"on_log": spoil})
    told = moments(trainer)
    names = {step: [i["file_name"] for i in content["images"]] for step, content in told.items()}
    assert len(names[2]) == 3, "another one has taken the place of the first"
    assert first not in names[2]
    assert names[4] == names[6] == [n for n in names[2] if n != second]
    assert [i["id"] for i in told[6]["images"]] == [2, 3]
    said = capsys.readouterr().out
    for path in (first, second):
        assert said.count(f"WARNING: {path} cannot be read") == 1


def test_old_moments_become_fewer(tmp_path: Path) -> None:
    (tmp_path / "views").mkdir()
    for step in range(10, 2010, 10):
        (tmp_path / f"step{step:06d}.json").write_text("{}")
        (tmp_path / "views" / f"step{step:06d}-1.jpg").write_text("")
        thin_out(tmp_path)
    kept = sorted(int(p.stem.removeprefix("step")) for p in tmp_path.glob("*.json"))
    assert len(kept) == MOMENTS
    assert (kept[0], kept[-1]) == (10, 2000)
    gaps = [b - a for a, b in pairwise(kept)]
    assert max(gaps) <= 2.1 * 2000 / MOMENTS
    assert sorted(p.stem for p in (tmp_path / "views").iterdir()) == [f"step{s:06d}-1" for s in kept]


def test_the_views_are_drawn_anew_at_each_moment_and_alike_at_each_call(tiny: Tiny) -> None:
    reel = Reel(
        SemiTrainer(load_config("train", FAST | tiny | {"augment": {"weak": "mosaic_view", "strong": "strong"}}))
    )
    before = torch.get_rng_state()
    (still,) = reel.choose(1)
    one, again, other = (reel.pair(still.index, moment) for moment in (4, 4, 6))
    assert one is not None
    assert again is not None
    assert other is not None
    for a, b, c in zip(one, again, other, strict=True):
        assert torch.equal(a.images, b.images)
        assert a.images.shape != c.images.shape or not torch.equal(a.images, c.images)
    assert torch.equal(one[0].matrices, one[1].matrices), "strong goes on from weak"
    assert torch.equal(before, torch.get_rng_state())
    assert still.size == Image.open(reel.pool[still.index].path).size[::-1]


def test_only_the_first_process_watches(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    film = Film(SemiTrainer(load_config("train", FAST | tiny)))
    assert set(film.events()) == {"on_train_start", "on_val_end"}
    monkeypatch.setattr("ssod.dist.rank", lambda: 1)
    assert film.events() == {}
