"""What `ssod predict` writes into its run folder, result by result. Needs no torch."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from ssod.deploy.results import Results
from ssod.deploy.video import NoEncoder, VideoWriter
from ssod.files import replacing


class Saver:
    """Files named after the images; where a name is taken, the image's number is put before it.

    save       drawn images, STEM.jpg; of a video or webcam STEM.mp4, or STEM/000000.jpg ... where there is no encoder
    save_txt   labels/STEM.txt; of a video's frames labels/STEM_000000.txt
    save_json  predictions.json: [{path, frame (of a video), boxes}, ...], complete when the `with` block ends well
    """

    def __init__(self, folder: Path, save: bool, save_txt: bool, save_json: bool) -> None:
        self.folder, self.save, self.save_txt, self.save_json = folder, save, save_txt, save_json
        self.images = self.boxes = 0
        self._ms: dict[str, float] = {}  # of each stage, over all images
        self._stems: set[str] = set()
        self._stem = ""
        self._video: VideoWriter | None = None
        self._stack = ExitStack()
        self._json: BinaryIO | None = None

    def __enter__(self) -> Saver:
        if self.save_json:
            self._json = self._stack.enter_context(replacing(self.folder / "predictions.json"))
            self._json.write(b"[")
        self._stack.push(self._finish)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, at)

    def _finish(self, kind: type[BaseException] | None, error: BaseException | None, at: object) -> None:
        if self._video is not None and kind is not None:
            self._video.drop()
        elif self._video is not None:
            self._video.close()
        if self._json is not None:
            self._json.write(b"\n]\n")

    def add(self, result: Results) -> None:
        frame = result.frame
        if frame is None or frame.number == 0:
            if self._video is not None:
                self._video.close()
                self._video = None
            self._stem = self._free(result.path.stem)
        if self.save:
            self._draw(result)
        if self.save_txt:
            name = self._stem if frame is None else f"{self._stem}_{frame.number:06d}"
            result.save_txt(self.folder / "labels" / f"{name}.txt")
        if self._json is not None:
            place = {} if frame is None else {"frame": frame.number, "time": round(frame.time, 3)}
            row = {"path": str(result.path), **place, "boxes": result.summary()}
            text = json.dumps(row, indent=1, ensure_ascii=False)
            self._json.write(f"{',' if self.images else ''}\n{text}".encode())
        self.images += 1
        self.boxes += len(result)
        for stage, ms in result.speed.items():
            self._ms[stage] = self._ms.get(stage, 0.0) + ms

    def summary(self) -> str:
        """One line: objects, images, mean time of an image."""
        parts = {stage: ms / self.images for stage, ms in self._ms.items()}
        told = ", ".join(f"{stage} {ms:.1f}" for stage, ms in parts.items())
        return f"{self.boxes} objects on {self.images} images, {sum(parts.values()):.0f} ms an image ({told})"

    def _free(self, stem: str) -> str:
        name = stem
        while name in self._stems:
            name = f"{self.images:05d}_{name}"
        self._stems.add(name)
        return name

    def _draw(self, result: Results) -> None:
        frame = result.frame
        if frame is None:
            result.save(self.folder / f"{self._stem}.jpg")
            return
        if frame.number == 0:
            self._video = VideoWriter(self.folder / f"{self._stem}.mp4", frame.rate)
        if self._video is not None:
            try:
                self._video.add(result.plot())
                return
            except NoEncoder as error:
                self._video = None
                print(f"ssod: {error} Its frames are written as images instead.", file=sys.stderr)
        result.save(self.folder / self._stem / f"{frame.number:06d}.jpg")
