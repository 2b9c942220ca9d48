"""What a step draws at random on its device: sampled regions, jittered boxes, dropout."""

from __future__ import annotations

import torch

from ssod import dist
from ssod.data.streams import generator

STEP = 3  # the number of these draws among the streams of the loader


def seed_step(seed: int, step: int) -> None:
    """Start torch's generators of every device anew from (seed, step, rank).

    So a step draws the same numbers whatever came before it: validation, watching, a stop and a resume, on any rank.
    Nothing of it needs to be kept in a checkpoint. It takes about a tenth of a millisecond.
    """
    torch.manual_seed(int(generator(seed, STEP, step, dist.rank()).integers(2**62)))
