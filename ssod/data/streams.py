"""An endless, resumable order of samples: position -> (epoch, index), the same on every machine and worker."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def generator(*key: int) -> np.random.Generator:
    """The random numbers of one thing, named by integers >= 0 such as (seed, stream, epoch, index, view)."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


class Stream:
    """Epoch after epoch over `n` samples, each epoch its own permutation, in batches over `world` ranks.

    Position p of the stream is (epoch, index) = (p // n, permutation of that epoch at p % n), so an epoch
    holds every sample once, a batch may span epochs, and a set smaller than the batch is simply gone through
    several times. Rank r of step t takes positions (t * world + r) * batch + i: two ranks of batch b see
    exactly what one rank of batch 2 b sees.
    """

    def __init__(self, n: int, seed: int, batch: int, rank: int = 0, world: int = 1) -> None:
        assert n > 0
        assert batch > 0
        assert 0 <= rank < world
        self.n, self.seed, self.batch, self.rank, self.world = n, seed, batch, rank, world
        self._orders: dict[int, np.ndarray] = {}

    def positions(self, step: int) -> range:
        """The positions [batch] of this rank at `step`."""
        first = (step * self.world + self.rank) * self.batch
        return range(first, first + self.batch)

    def at(self, position: int, skip: int = 0) -> tuple[int, int]:
        """(epoch, index) at a position, or of the `skip`-th sample after it in the same epoch, cyclically."""
        epoch, place = divmod(position, self.n)
        return epoch, int(self._order(epoch)[(place + skip) % self.n])

    def step(self, step: int) -> Iterator[tuple[int, int]]:
        """(epoch, index) of every sample of this rank at `step`."""
        return (self.at(position) for position in self.positions(step))

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            if len(self._orders) == 4:  # a batch rarely spans more epochs; large sets have large orders
                del self._orders[min(self._orders)]
            self._orders[epoch] = generator(self.seed, epoch).permutation(self.n)
        return self._orders[epoch]
