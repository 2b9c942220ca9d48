"""Sections that the configs of several modes share: run folder, inference, data, views, named parts.

As ssod.config, this imports no torch.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Pipeline = str | list[Any]


def _image_size(value: int | list[int]) -> int | list[int]:
    sides = [value] if isinstance(value, int) else value
    if len(sides) not in (1, 2) or min(sides) < 32 or sides != sorted(sides):
        raise ValueError(f"imgsz={value}: give a long side of at least 32 pixels, or [short, long] such as [800, 1333]")
    return value


ImageSize = Annotated[int | list[int], AfterValidator(_image_size)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Component(Section):
    """A named part and its own options; the part itself (detector, strategy) checks the options."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    name: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


def three_views(value: Any) -> Any:
    """`augment=NAME` means that name for each of the three; a list is a strong view."""
    if isinstance(value, str):
        return dict.fromkeys(("labeled", "weak", "strong"), value)
    return {"strong": value} if isinstance(value, list) else value


class Augment(Section):
    """Names of pipelines, or lists of steps, for the three kinds of view."""

    labeled: Pipeline = Field("weak", description="view of the labelled images")
    weak: Pipeline = Field("weak", description="view of the unlabelled images that the teacher sees")
    strong: Pipeline = Field("strong", description="view of the unlabelled images that the student learns from")
    _by_name = model_validator(mode="before")(three_views)


class RunFolder(Section):
    """Where a mode writes."""

    project: str = Field("runs", description="parent folder; a run goes to PROJECT/MODE/NAME")
    name: str = Field("exp", description="name of the run folder; where it exists, NAME-2 and so on")
    exist_ok: bool = Field(False, description="write into an existing run folder instead of NAME-2")
    verbose: bool = Field(False, description="print the traceback of an error")


class Inference(Section):
    """How raw predictions become detections, and on what."""

    device: str | int = Field("auto", description="auto, cpu, cuda, cuda:0 or 0; train, label: 0,1 for several")
    workers: int = Field(2, ge=0, description="loader processes; 0 loads in the main process")
    imgsz: ImageSize = Field(640, description="long side of the image, pixels; or [short, long], both at most")
    conf: float = Field(0.05, ge=0, le=1, description="lowest score of a detection")
    iou: float = Field(0.6, ge=0, le=1, description="class-wise NMS threshold")
    max_det: int = Field(100, ge=1, description="most detections of one image")

    def given_limits(self) -> dict[str, Any]:
        """conf, iou and max_det where the user gave them, else None: an exported model has its own."""
        return {k: getattr(self, k) if k in self.model_fields_set else None for k in ("conf", "iou", "max_det")}


class Data(Section):
    """Which images and annotations."""

    data: str | None = Field(
        None, description="data YAML (path, train, unlabeled, val, test, names), or shapes: the drawn demo set"
    )
    data_path: str | None = Field(None, description="folder of the data, instead of `path:` in the data YAML")
    strict: bool = Field(False, description="stop at the first flaw of the data instead of reporting it")
