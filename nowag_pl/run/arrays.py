"""Large arrays over sequences, written in shares by the ranks and read by all of them."""

import logging
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from nowag_pl.files import LATE, check_array, new_array, read_array
from nowag_pl.run.ranks import Ranks

_log = logging.getLogger("nowag_pl")


class SequenceArray:
    """One entry per sequence, in as many files as there were ranks when it was written.

    Args:
        shares: entries of each of those ranks: every n-th one.
    """

    def __init__(self, shares: Sequence[Tensor]) -> None:
        self._shares = shares

    def __len__(self) -> int:
        return sum(len(share) for share in self._shares)

    def __getitem__(self, index: int) -> Tensor:
        return self._shares[index % len(self._shares)][index // len(self._shares)]

    def take(self, indices: Iterable[int]) -> Tensor:
        """Return some entries, `[len(indices), ...]`."""
        return torch.stack([self[index] for index in indices])


class ArrayFolder:
    """Arrays by name in a folder; each is whole or absent.

    Args:
        folder: where the files are.
        ranks: the processes of the run; all of them see the folder.
        in_memory: read whole arrays into memory, on every rank; False maps the files.
    """

    def __init__(self, folder: Path, ranks: Ranks, in_memory: bool = False) -> None:
        self.folder = folder
        self.ranks = ranks
        self._in_memory = in_memory

    def __contains__(self, name: str) -> bool:
        """Tell whether an array is there and whole, the same on every rank; one that is damaged is deleted."""
        return self.ranks.broadcast(self.ranks.is_zero and self._is_whole(name))

    def _is_whole(self, name: str) -> bool:
        count = self._num_shares(name)
        try:
            for rank in range(count):
                check_array(self._file(name, rank, count))
        except ValueError as error:
            _log.warning("Making it anew: %s", error)
            self.remove(name)
            return False
        return count > 0

    def write(
        self,
        specs: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        num_entries: int,
        batches: Iterable[tuple[Tensor, ...]],
    ) -> None:
        """Write this rank's share of arrays that are made together, and wait for the other ranks.

        Args:
            specs: name of each array to shape and type of an entry.
            num_entries: entries of all ranks together.
            batches: this rank's entries in their order, a tensor `[batch, *shape]` for each array.
        """
        rank, world_size = self.ranks.rank, self.ranks.world_size
        if self.ranks.is_zero:
            for name in specs:
                self.remove(name)  # perhaps shares of another number of ranks
        self.ranks.broadcast(None)
        mine = len(range(rank, num_entries, world_size))
        with ExitStack() as stack:
            arrays = [
                stack.enter_context(new_array(self._file(name, rank, world_size), (mine, *shape), dtype))
                for name, (shape, dtype) in specs.items()
            ]
            done = 0
            for batch in batches:
                for array, values in zip(arrays, batch, strict=True):
                    array[done : done + len(values)] = values
                done += len(batch[0])
            assert done == mine
        self.ranks.gather(None)

    def read(self, name: str, dtype: torch.dtype) -> SequenceArray:
        """Return an array that is there.

        Raises:
            ValueError: a file is damaged, or of another type.
        """
        count = self._shown(name)
        shares = [read_array(self._file(name, rank, count), dtype) for rank in range(count)]
        return SequenceArray([share.clone() for share in shares] if self._in_memory else shares)

    def _shown(self, name: str) -> int:
        """Return how many files hold an array that was written; those of other machines may be seen late."""
        end = time.monotonic() + (LATE if self.ranks.world_size > 1 else 0.0)
        while not (found := self._num_shares(name)) and time.monotonic() < end:
            time.sleep(0.05)
        return found

    def remove(self, name: str) -> None:
        """Delete an array, if it is there."""
        for file in self.folder.glob(f"{name}.*_of_*.npy"):
            file.unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, name: str, rank: int, world_size: int) -> Path:
        return self.folder / f"{name}.{rank}_of_{world_size}.npy"

    def _num_shares(self, name: str) -> int:
        """Return how many files hold an array, or 0 where one is missing."""
        for first in self.folder.glob(f"{name}.0_of_*.npy"):
            count = int(first.stem.rpartition("_")[2])
            if all(self._file(name, rank, count).is_file() for rank in range(count)):
                return count
        return 0
