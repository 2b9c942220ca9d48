"""The film: what the teacher draws on the same few images, over the run, with the reason for every box.

In the run folder:

    pseudo/step000400.json          COCO JSON, boxes in pixels of the image files, see docs/pseudo_labels.md
    pseudo/images/ID.jpg            the images, small, once
    pseudo/views/step000400-ID.jpg  weak and strong view of some, as training makes them, with the boxes in both
    pseudo/last.jpg                 all images at the newest moment

At most MOMENTS moments are kept. The one that goes is the one whose neighbours are nearest to each other, so those that
stay are spread over the run. Of an image all kept boxes and the DROPPED surest others are written.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ssod import dist
from ssod.deploy.infer import to_source
from ssod.engine.callbacks import Callback, State
from ssod.engine.watch.board import by_class, picture
from ssod.engine.watch.film_draw import film_sheet, jpeg, pair_picture, thumbnail
from ssod.engine.watch.observers import Observer
from ssod.engine.watch.reel import Reel, Still, pixels
from ssod.files import replacing
from ssod.nn.precision import autocast
from ssod.strategies.verdicts import Verdict
from ssod.structures import View

if TYPE_CHECKING:
    from ssod.engine.trainer import SemiTrainer

FOLDER = "pseudo"
MOMENTS = 40
DROPPED = 30
PAIRS = 4  # images of a moment whose two views are drawn


class Film(Observer):
    """Records moments in the first process alone; it decides nothing and leaves the strategy as it is."""

    name = "film"

    def __init__(self, trainer: SemiTrainer) -> None:
        self.trainer = trainer
        self.reel = Reel(trainer)
        self._wanted: list[str] = []  # paths that a resumed run goes on with
        self._told: set[str] = set()
        self._shown = -math.inf  # step of the newest sheet in TensorBoard

    def events(self) -> dict[str, Callback]:
        if not self.reel.pool or not dist.is_main():
            return {}
        moment = "on_step_end" if self.trainer.config.film_interval else "on_val_end"
        return {"on_train_start": self._begin, moment: self._moment}

    def state_dict(self) -> dict[str, Any]:
        return {"images": self.reel.paths()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._wanted = state["images"]

    def _begin(self, state: State) -> None:
        """Choose the images. Moments after the checkpoint that the run goes on from will be recorded again."""
        folder = state.folder / FOLDER
        for sub in ("images", "views"):
            (folder / sub).mkdir(parents=True, exist_ok=True)
        for step in _moments(folder):
            if step > state.step or state.step == 0:
                _remove(folder, step)
        for i, still in enumerate(self.reel.choose(self.trainer.config.film, self._wanted), start=1):
            _write(folder / "images" / f"{i}.jpg", thumbnail(still.image))
        self._say_bad()

    def _moment(self, state: State) -> None:
        interval = self.trainer.config.film_interval
        if not interval or state.step % interval == 0 or state.step == self.trainer.plan.iters:
            self.record(state.folder / FOLDER, state.step)

    def record(self, folder: Path, step: int) -> None:
        """Write what there is to see after `step` steps."""
        stills = {i: still for i, index in enumerate(self.reel.chosen, start=1) if (still := self.reel.still(index))}
        if stills:
            verdicts = dict(zip(stills, self._verdicts([s.view for s in stills.values()], step), strict=True))
            content = self._content(stills, verdicts, step)
            _write(folder / f"{_name(step)}.json", json.dumps(content, separators=(",", ":")).encode())
            self._count(content, step)
            if self.trainer.config.plots:
                self._draw(folder, stills, verdicts, step)
        self._say_bad()
        thin_out(folder)

    def _verdicts(self, views: list[View], step: int) -> list[Verdict]:
        """The strategy's verdicts on views of one image each, on the CPU."""
        trainer = self.trainer
        with autocast(trainer.dtype, trainer.device):
            found = trainer.strategy.verdicts((v.to(trainer.device) for v in views), step)
        return [v.to("cpu") for v in found]

    def _content(self, stills: dict[int, Still], verdicts: dict[int, Verdict], step: int) -> dict[str, Any]:
        """COCO JSON: of each box also score, quality, weights, whether it is kept, and why."""
        trainer, names = self.trainer, self.trainer.data.names
        tau = next(iter(verdicts.values())).tau
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for i, still in stills.items():
            rows, left_out = _annotations(still, verdicts[i])
            size = {"width": still.size[1], "height": still.size[0]}
            name = str(self.reel.pool[still.index].path)
            images.append({"id": i, "file_name": name, **size, "left_out": left_out})
            annotations += [{"id": len(annotations) + k, "image_id": i, **row} for k, row in enumerate(rows, start=1)]
        info = {
            "description": f"pseudo labels after {step} steps",
            "step": step,
            "strategy": trainer.config.strategy.name,
            "network": self._network(step),
            "burn_in": step < trainer.plan.burn_in,
            "tau": None if tau is None else dict(zip(names, (round(t, 4) for t in tau.tolist()), strict=True)),
        }
        categories = [{"id": k, "name": name} for k, name in enumerate(names, start=1)]
        return {"info": info, "images": images, "categories": categories, "annotations": annotations}

    def _network(self, step: int) -> str:
        return "student" if self.trainer.strategy.teacher is None or step < self.trainer.plan.burn_in else "teacher"

    def _count(self, content: dict[str, Any], step: int) -> None:
        """Kept boxes an image of each class, as curves."""
        counts = dict.fromkeys(self.trainer.data.names, 0)
        for row in content["annotations"]:
            counts[self.trainer.data.names[row["category_id"] - 1]] += row["kept"]
        images = len(content["images"])
        by_class(self.trainer, "film_kept_per_image", {n: c / images for n, c in counts.items()}, step)

    def _draw(self, folder: Path, stills: dict[int, Still], verdicts: dict[int, Verdict], step: int) -> None:
        names, title = self.trainer.data.names, f"step {step}, {self._network(step)}"
        if step < self.trainer.plan.burn_in:
            title += ": burn-in, nothing is learned from these yet"
        page = film_sheet([s.image for s in stills.values()], list(verdicts.values()), names, title)
        encoded = jpeg(page)
        _write(folder / "last.jpg", encoded)
        if step - self._shown >= self.trainer.plan.iters / MOMENTS:  # an event file cannot be thinned out afterwards
            picture(self.trainer, "film", encoded, page.shape[:2], step)
            self._shown = step
        for i, pair in self._pairs(list(stills.items())[:PAIRS], step):
            (verdict,) = self._verdicts([pair[0]], step)
            drawn = pair_picture(pair, (pixels(pair[0]), pixels(pair[1])), verdict, names, title)
            _write(folder / "views" / f"{_name(step)}-{i}.jpg", jpeg(drawn))

    def _pairs(self, stills: list[tuple[int, Still]], step: int) -> Iterator[tuple[int, tuple[View, View]]]:
        for i, still in stills:
            pair = self.reel.pair(still.index, step)
            if pair is not None:
                yield i, pair

    def _say_bad(self) -> None:
        for path, reason in self.reel.bad:
            if path not in self._told:
                self._told.add(path)
                self.trainer.say(f"WARNING: {path} cannot be read ({reason}); the film of pseudo labels leaves it out.")
        self.reel.bad.clear()


def _annotations(still: Still, verdict: Verdict) -> tuple[list[dict[str, Any]], int]:
    """The rows of one image by descending score, and how many of the unsurest boxes are left out."""
    found = to_source(verdict.found, still.view.matrices[0], still.size)
    assert found.scores is not None
    order = found.scores.argsort(descending=True, stable=True).tolist()
    dropped = [i for i in order if not verdict.kept[i]]
    left_out = set(dropped[DROPPED:])
    quality = _numbers(found.quality, len(found))
    cls, box = _numbers(verdict.cls_weight, len(found)), _numbers(verdict.box_weight, len(found))
    rows = []
    for i in order:
        if i in left_out:
            continue
        x1, y1, x2, y2 = found.boxes[i].double().nan_to_num().tolist()
        rows.append(
            {
                "category_id": int(found.labels[i]) + 1,
                "bbox": [round(v, 2) for v in (x1, y1, x2 - x1, y2 - y1)],
                "area": round((x2 - x1) * (y2 - y1), 1),
                "iscrowd": 0,
                "score": round(float(found.scores[i]), 4),
                "quality": quality[i],
                "cls_weight": cls[i],
                "box_weight": box[i],
                "kept": bool(verdict.kept[i]),
                "reason": verdict.reasons[i],
            }
        )
    return rows, len(left_out)


def _numbers(values: Tensor | None, count: int) -> list[float | None]:
    """JSON has no NaN: a number that does not exist becomes null."""
    if values is None:
        return [None] * count
    return [round(v, 4) if math.isfinite(v) else None for v in values.tolist()]


def _name(step: int) -> str:
    return f"step{step:06d}"


def thin_out(folder: Path) -> None:
    """Leave at most MOMENTS moments, the first and the last among them."""
    steps = _moments(folder)
    while len(steps) > MOMENTS:
        gone = min(range(1, len(steps) - 1), key=lambda i: steps[i + 1] - steps[i - 1])
        _remove(folder, steps.pop(gone))


def _moments(folder: Path) -> list[int]:
    """Steps of the moments in the folder, ascending."""
    return sorted(int(m[1]) for p in folder.glob("step*.json") if (m := re.fullmatch(r"step(\d+)\.json", p.name)))


def _remove(folder: Path, step: int) -> None:
    for path in (folder / f"{_name(step)}.json", *(folder / "views").glob(f"{_name(step)}-*.jpg")):
        path.unlink(missing_ok=True)


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)
