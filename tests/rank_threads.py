"""Ranks that are threads of this process: several at once, without a process group."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, TypeVar

from nowag_pl.run.ranks import Ranks

T = TypeVar("T")


class ThreadRanks(Ranks):
    """One of several threads that wait for each other."""

    def __init__(self, rank: int, values: list[Any], barrier: Barrier) -> None:
        super().__init__(rank, len(values))
        object.__setattr__(self, "_values", values)
        object.__setattr__(self, "_barrier", barrier)

    def gather(self, value: T) -> list[T]:
        self._values[self.rank] = value
        self._barrier.wait(30)
        gathered = list(self._values)
        self._barrier.wait(30)
        return gathered

    def broadcast(self, value: T) -> T:
        return self.gather(value)[0]


def on_ranks(world_size: int, function: Callable[[Ranks], T]) -> list[T]:
    """Return what a function gives on each rank; the first error of one is raised."""
    values, barrier = [None] * world_size, Barrier(world_size)
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(lambda rank: function(ThreadRanks(rank, values, barrier)), range(world_size)))
