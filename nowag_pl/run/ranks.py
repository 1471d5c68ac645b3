"""The processes of a run, whether there is one or many.

Before they exchange anything they meet in the store of the process group, under numbered names: so a process that does
not come is named, whatever the backend.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

TIMEOUT = "NOWAG_PL_TIMEOUT"  # environment variable: seconds for which ranks wait for each other
_DEFAULT_TIMEOUT = 3600.0
_meetings = count()  # of this process; all processes have the same
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
        self.meet()
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in their order, on every rank."""
        if self.world_size == 1:
            return [value]
        self.meet()
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def meet(self) -> None:
        """Wait until every rank has come here.

        Raises:
            TimeoutError: a rank does not come; the message says which.
        """
        if self.world_size == 1 or not dist.is_initialized():
            return
        number, seconds = next(_meetings), float(os.environ.get(TIMEOUT, _DEFAULT_TIMEOUT))
        store = dist.distributed_c10d._get_default_store()
        names = [f"nowag_pl/{number}/{rank}" for rank in range(self.world_size)]
        try:
            store.set(names[self.rank], "")
            store.wait(names, timedelta(seconds=seconds))
        except (dist.DistStoreError, dist.DistNetworkError) as error:
            raise TimeoutError(_absence(store, names, seconds)) from error
        if self.is_zero and number:
            # All that are here have left the meeting before.
            for rank in range(self.world_size):
                store.delete_key(f"nowag_pl/{number - 1}/{rank}")

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


def _absence(store: dist.Store, names: list[str], seconds: float) -> str:
    """Return who did not come to a meeting, in a sentence."""
    try:
        absent = [str(rank) for rank, name in enumerate(names) if not store.check([name])]
    except (dist.DistStoreError, dist.DistNetworkError):
        # Its process keeps the store.
        absent = ["0"]
    return (
        f"Expected all {len(names)} ranks within {seconds:g} s, but rank {' and rank '.join(absent)} did not come: it "
        f"has ended, hangs, or is slower. Its log is in run_dir/logs; {TIMEOUT} sets the seconds."
    )
