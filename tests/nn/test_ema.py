"""The moving average of a network: its equation, and which tensors it moves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ssod.nn.ema import Ema, ema_decay_at, frozen_copy
from ssod.nn.frozen_norm import FrozenNorm


def network() -> nn.Sequential:
    """A frozen layer, a frozen norm and a layer that learns."""
    torch.manual_seed(0)
    frozen = nn.Conv2d(3, 4, 1).requires_grad_(False)
    return nn.Sequential(frozen, FrozenNorm(nn.BatchNorm2d(4)), nn.Conv2d(4, 2, 1))


def test_a_moving_average_by_hand() -> None:
    student, teacher = torch.nn.BatchNorm1d(1), torch.nn.BatchNorm1d(1)
    with torch.no_grad():
        teacher.weight.fill_(1.0)
        student.weight.fill_(5.0)
        student.running_mean.fill_(10.0)
        student.num_batches_tracked.fill_(7)
    Ema(teacher, student).update(0.75)
    assert teacher.weight.item() == 2.0  # 0.75 * 1 + 0.25 * 5
    assert teacher.running_mean.item() == 2.5  # 0.75 * 0 + 0.25 * 10
    assert teacher.num_batches_tracked.item() == 7
    assert [ema_decay_at(t, 0.9) for t in (0, 1, 8, 9, 100)] == pytest.approx([0, 0.5, 1 - 1 / 9, 0.9, 0.9])


def test_every_tensor_follows_as_the_loop_over_state_dicts_moves_it() -> None:
    student = network()
    teacher, looped = frozen_copy(student), frozen_copy(student)
    average = Ema(teacher, student)
    for step in range(3):
        with torch.no_grad():
            student[2].weight.add_(step + 1.0)
            student[2].bias.mul_(-1.5)
        average.update(0.9)
        for name, value in looped.state_dict().items():
            if value.is_floating_point():
                value.mul_(0.9).add_(student.state_dict()[name], alpha=1 - 0.9)
    for name, value in teacher.state_dict().items():
        torch.testing.assert_close(value, looped.state_dict()[name])
    assert teacher[0].weight.equal(student[0].weight)
    assert not teacher[2].weight.allclose(student[2].weight)


def test_a_teacher_of_other_origin_comes_to_its_student_in_what_is_frozen_too() -> None:
    student, teacher = network(), frozen_copy(network())
    with torch.no_grad():
        teacher[0].bias.add_(1.0)
        teacher[1].running_mean.add_(1.0)
    before = teacher[0].bias.clone()
    average = Ema(teacher, student)
    average.update(0.75)
    torch.testing.assert_close(teacher[0].bias, 0.75 * before + 0.25 * student[0].bias)
    torch.testing.assert_close(teacher[1].running_mean, torch.full((4,), 0.75))
    average.copy()
    assert all(t.equal(s) for t, s in zip(teacher.state_dict().values(), student.state_dict().values(), strict=True))
