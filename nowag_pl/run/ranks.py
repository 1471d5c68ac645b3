"""The processes of a run, whether there is one or many."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
Shareable = TypeVar("Shareable", Tensor, list[str])


@dataclass(frozen=True)
class Ranks:
    """This process among those of the default process group.

    Attributes:
        rank: number of this process.
        world_size: number of processes.
    """

    rank: int = 0
    world_size: int = 1

    @classmethod
    def current(cls) -> "Ranks":
        """Return the ranks of the default process group, or a single one where there is none."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def is_zero(self) -> bool:
        """Whether this process writes files and draws progress."""
        return self.rank == 0

    def share(self, items: Shareable) -> Shareable:
        """Return this process's share of what every process has: every n-th item."""
        return items[self.rank :: self.world_size]

    def broadcast(self, value: T) -> T:
        """Return rank zero's value on every rank."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in their order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def gather_work(self, work: Callable[[], T]) -> list[T]:
        """Do a part of a work on each rank, and return the results of all, in their order, on every rank.

        Args:
            work: this rank's part, without exchange between ranks.

        Raises:
            ValueError: the work of a rank has raised one, on every rank, as the others wait for it.
        """
        problem, result = None, None
        try:
            result = work()
        except (OSError, ValueError) as error:
            problem = str(error)
        gathered: list[Any] = self.gather((problem, result))
        for told, _ in gathered:
            if told is not None:
                raise ValueError(told)
        return [each for _, each in gathered]
