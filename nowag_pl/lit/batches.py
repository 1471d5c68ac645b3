"""Batches that are the same whatever the number of ranks, and loaders that resume inside an epoch."""

from collections.abc import Iterator
from math import ceil
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Sampler


class Share(NamedTuple):
    """One rank's part of a batch. Padding has weight 0, so that every rank has a part of every batch."""

    indices: list[int]
    weights: list[float]


class SharedBatches(Sampler[Share]):
    """Batches over all ranks together, of which each rank takes every n-th item.

    Nothing is dropped or counted twice: the last batch may be smaller, and ranks that get fewer items are padded by
    items of weight 0. The sum of a rank's weighted values, averaged over the ranks as gradients are, is the mean over
    the batch.

    Args:
        num_items: items to go over.
        batch_size: items in a batch of all ranks together.
        rank: this rank.
        world_size: number of ranks.
        seed: seed of the order, which differs in each epoch. None: in order.
        repeats: times that each batch comes, one after the other.
    """

    def __init__(
        self,
        num_items: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int | None = None,
        repeats: int = 1,
    ) -> None:
        self._num_items = num_items
        self._batch_size = batch_size
        self._rank = rank
        self._world_size = world_size
        self._seed = seed
        self._repeats = repeats
        self._epoch = 0
        self.skip = 0  # batches that an earlier process has done in this epoch

    def __len__(self) -> int:
        return ceil(self._num_items / self._batch_size) * self._repeats

    def set_epoch(self, epoch: int) -> None:
        """Choose the order; Lightning calls this."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[Share]:
        order = torch.arange(self._num_items)
        if self._seed is not None:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
            order = torch.randperm(self._num_items, generator=generator)
        first, self.skip = self.skip, 0
        parts = order.split(self._batch_size)
        for batch in (parts[number // self._repeats] for number in range(first, len(self))):
            mine = batch[self._rank :: self._world_size].tolist()
            padding = ceil(len(batch) / self._world_size) - len(mine)
            weight = self._world_size / len(batch)
            yield Share(mine + [int(batch[0])] * padding, [weight] * len(mine) + [0.0] * padding)


class ResumableLoader(DataLoader[Any]):
    """A loader of shared batches whose place in the epoch goes into checkpoints.

    Args:
        dataset: gives a whole batch for a :class:`Share`.
        batches: the batches to load.
    """

    def __init__(self, dataset: Dataset[Any], batches: SharedBatches) -> None:
        super().__init__(dataset, batch_size=None, sampler=batches)
        self._position = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = self.sampler
        assert isinstance(batches, SharedBatches)
        self._position = batches.skip
        for batch in super().__iter__():
            self._position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the number of batches of this epoch that were handed out."""
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin after those batches; after the last one, with the next epoch."""
        assert isinstance(self.sampler, SharedBatches)
        self.sampler.skip = state["position"] % len(self.sampler)
