"""A run whose strong view is painted on the device: another place, the same guarantees."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ssod.checkpoint import load_checkpoint
from ssod.config import load_config
from ssod.engine.trainer import SemiTrainer
from ssod.strategies.mean_teacher import MeanTeacher
from ssod.structures import SemiBatch

Tiny = dict[str, Any]


def weights(trainer: SemiTrainer) -> dict[str, torch.Tensor]:
    return load_checkpoint(trainer.folder / "weights" / "last.pt")["train"]["strategy"]


@pytest.mark.slow
@pytest.mark.fault(18)
def test_a_run_that_paints_on_the_device_resumes_bit_exactly(tiny: Tiny) -> None:
    tiny |= {"augment_on": "device", "accumulate": 2}
    whole = SemiTrainer(load_config("train", tiny | {"name": "whole"}))
    whole.train()
    part = SemiTrainer(load_config("train", tiny | {"name": "part"}))
    step = part._step

    def interrupted(*args: Any) -> bool:
        if part.step == 5:
            raise KeyboardInterrupt
        return step(*args)

    part._step = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        part.train()
    resumed = SemiTrainer(load_config("train", {"resume": str(part.folder)}))
    assert resumed.step == 5
    resumed.train()
    a, b = weights(whole), weights(resumed)
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_the_student_gets_the_painted_view_and_the_teacher_the_plain_one(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    unsupervised = MeanTeacher.unsupervised

    def watch(self: MeanTeacher, batch: SemiBatch, step: int, output: Any) -> Any:
        assert batch.weak is not None
        assert batch.strong is not None
        seen.append((batch.weak.images, batch.strong.images))
        return unsupervised(self, batch, step, output)

    monkeypatch.setattr(MeanTeacher, "unsupervised", watch)
    for place in ("worker", "device"):
        SemiTrainer(load_config("train", tiny | {"augment_on": place, "name": place})).train()
    half = len(seen) // 2
    assert half > 0
    for (weak, strong), (same_weak, painted) in zip(seen[:half], seen[half:], strict=True):
        assert torch.equal(weak, same_weak)  # the geometry and its draws stay in the workers
        assert not torch.equal(strong, painted)
        assert not torch.equal(same_weak, painted)
