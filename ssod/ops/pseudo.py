"""From a teacher's detections to targets of the student: thresholds and their statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from ssod.ops.assign import pad_targets
from ssod.ops.host import true_rows
from ssod.structures import Candidates, Instances, Weigh, Weights

BINS = 100


def reaches(instances: Instances, tau: Tensor) -> Tensor:
    """Whether the score of each detection reaches the threshold of its class: tau [K], 0..1 -> bool [N]."""
    assert instances.scores is not None
    return instances.scores >= tau[instances.labels]


def above(every: list[Instances], tau: Tensor) -> list[Instances]:
    """The detections of each image that reach the threshold of their class: tau [K], 0..1."""
    return [i[rows] for i, rows in zip(every, true_rows([reaches(i, tau) for i in every]), strict=True)]


def ignore_within(uncertain: list[Instances]) -> Weigh:
    """Weights that take background candidates out of the class loss where their centre lies in an uncertain box of
    their image: there may be an object, and a student that learns "background" there would unlearn it."""
    padded = pad_targets(uncertain)

    def weigh(candidates: Candidates) -> Weights:
        x, y = ((candidates.boxes[:, :2] + candidates.boxes[:, 2:]) / 2).unbind(1)  # [M]
        x1, y1, x2, y2 = padded.boxes[candidates.image].unbind(2)  # [M, U]
        inside = (x[:, None] >= x1) & (x[:, None] <= x2) & (y[:, None] >= y1) & (y[:, None] <= y2)
        doubtful = (inside & padded.valid[candidates.image]).any(1) & (candidates.matched < 0)
        return Weights(cls=(~doubtful).float())

    return weigh


def class_counts(instances: list[Instances], num_classes: int) -> Tensor:
    """Boxes of each class over a batch: float32 [K]."""
    labels = torch.cat([i.labels for i in instances])
    # `bincount` would wait for a GPU twice.
    return (labels[:, None] == torch.arange(num_classes, device=labels.device)).sum(0).float()


def score_histogram(instances: list[Instances], num_classes: int) -> Tensor:
    """Detections of each class by score: float32 [K, BINS], bin b holds scores in [b, b+1) / BINS."""
    labels = torch.cat([i.labels for i in instances])
    scores = torch.cat([i.scores for i in instances if i.scores is not None])
    cell = labels * BINS + (scores * BINS).long().clamp(0, BINS - 1)
    counts = torch.zeros(num_classes * BINS, device=cell.device)
    return counts.index_add_(0, cell, torch.ones_like(scores)).view(num_classes, BINS)


def matching_thresholds(per_image: Tensor, wanted: Tensor, low: float, high: float) -> Tensor:
    """The lowest score of each class at which the teacher yields no more boxes an image than people draw.

    per_image  [K, BINS]  teacher's detections of an image by class and score (running mean)
    wanted     [K]        annotated boxes of an image by class (running mean)
    Returns tau [K] in [low, high]. A class whose teacher never exceeds `wanted` gets `low`.
    Idea: class-wise thresholds from the label distribution, Label Matching, Chen et al., CVPR 2022.
    """
    at_least = per_image.flip(1).cumsum(1).flip(1)  # [K, BINS]: boxes an image scoring >= b / BINS
    too_many = (at_least > wanted[:, None]).sum(1)  # at_least falls with b, so this is the first bin that is few enough
    return (too_many.float() / BINS).clamp(low, high)
