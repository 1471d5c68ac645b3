"""Hidden states of many sequences, moved through the blocks one after the other: in memory, or in files."""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nowag_pl.models.streaming import StreamedModel
from nowag_pl.run.arrays import ArrayFolder, SequenceArray
from nowag_pl.run.progress import block_progress
from nowag_pl.run.ranks import Ranks


class HiddenStates:
    """The hidden states before a block. They are in host memory; one batch at a time goes to the device.

    Args:
        model: the model whose blocks they pass.
        windows: token ids `[num_sequences, seq_len]`; possibly none.
        batch_size: sequences that pass through a block together.
    """

    def __init__(self, model: StreamedModel, windows: Tensor, batch_size: int) -> None:
        self._model = model
        self._hidden: list[Tensor] = []
        for tokens in windows.split(batch_size) if len(windows) else ():
            self._hidden.append(model.embed(tokens).hidden.cpu())

    @torch.no_grad()
    def run(self, block: nn.Module, index: int, advance: bool = True) -> None:
        """Run a block over the hidden states before it.

        Args:
            block: the block, dense or compressed.
            index: its number in the model.
            advance: replace the hidden states by those after the block; False runs it only for its hooks.
        """
        for number, hidden in enumerate(self._hidden):
            output = forward(self._model, block, index, hidden)
            if advance:
                self._hidden[number] = output.cpu()

    def fork(self) -> "HiddenStates":
        """Return others at the same place. States that neither has moved on from are in memory only once."""
        other = copy.copy(self)
        other._hidden = list(self._hidden)
        return other

    def take(self, indices: Iterable[int]) -> Tensor:
        """Return the hidden states of some of the windows, `[len(indices), seq_len, hidden]`."""
        size = len(self._hidden[0])
        return torch.stack([self._hidden[index // size][index % size] for index in indices])

    def batches(self) -> Iterator[Tensor]:
        """Yield the hidden states, `[batch, seq_len, hidden]` each, in the order of the windows."""
        yield from self._hidden


def forward(model: StreamedModel, block: nn.Module, index: int, hidden: Tensor) -> Tensor:
    """Return the output of a block on hidden states, on the device.

    Args:
        model: gives the other arguments of the block.
        block: the block, dense or compressed.
        index: its number in the model.
        hidden: `[batch, seq_len, hidden]`.
    """
    arguments = model.arguments(index, *hidden.shape[:2])
    return model.forward_block(block, hidden.to(model.device), arguments)


class Passage(NamedTuple):
    """Blocks that windows pass, and how.

    Attributes:
        model: embeddings, and the other arguments of the blocks.
        load_block: gives a block.
        title: for the progress bar.
    """

    model: StreamedModel
    load_block: Callable[[int], nn.Module]
    title: str


def passed(passage: Passage, windows: Tensor, batch_size: int, ranks: Ranks) -> HiddenStates:
    """Return this rank's share of windows after the last block.

    Args:
        passage: the blocks.
        windows: token ids `[num_windows, seq_len]`, the same on every rank.
        batch_size: windows that pass through a block together.
        ranks: who shares them.
    """
    model = passage.model
    states = HiddenStates(model, ranks.share(windows), batch_size)
    with block_progress(passage.title, len(model), ranks.is_zero, model.device) as report:
        for index in range(len(model)):
            states.run(passage.load_block(index).to(model.device), index)
            report("")
    return states


class HiddenFiles:
    """Hidden states by name in the files of a folder, each whole or absent; a killed run continues from there.

    Args:
        model: the model that they belong to.
        arrays: the folder.
        windows: token ids of all sequences `[num_sequences, seq_len]`, the same on every rank.
        batch_size: sequences of this rank that pass through a block together.
    """

    def __init__(self, model: StreamedModel, arrays: ArrayFolder, windows: Tensor, batch_size: int) -> None:
        self._model = model
        self._arrays = arrays
        self._windows = windows
        self._batch_size = batch_size

    def __contains__(self, name: str) -> bool:
        """Return whether the hidden states are there, the same on every rank."""
        return name in self._arrays

    def read(self, name: str) -> SequenceArray:
        """Return hidden states that are there."""
        return self._arrays.read(name, self._model.checkpoint.dtype)

    def embed(self, name: str) -> None:
        """Write the hidden states that enter block 0, if they are not there."""
        self._write(name, lambda rows: self._model.embed(self._windows[rows]).hidden)

    def run(
        self, name: str, inputs: SequenceArray, outputs: Callable[[Tensor], Tensor], width: int | None = None
    ) -> None:
        """Write what a block makes of its inputs, if it is not there.

        Args:
            name: of the file.
            inputs: hidden states before the block.
            outputs: gives `[batch, seq_len, width]` for some of them.
            width: numbers of a token. None: those of a hidden state.
        """
        self._write(name, lambda rows: outputs(inputs.take(rows.tolist())), width)

    @torch.no_grad()
    def _write(self, name: str, compute: Callable[[Tensor], Tensor], width: int | None = None) -> None:
        """Write hidden states; `compute` makes those of some sequences."""
        if name in self._arrays:
            return
        mine = self._arrays.ranks.share(torch.arange(len(self._windows)))
        batches = ((compute(rows).cpu(),) for rows in (mine.split(self._batch_size) if len(mine) else ()))
        entry = ((self._windows.shape[1], width or self._model.hidden_size), self._model.checkpoint.dtype)
        self._arrays.write({name: entry}, len(self._windows), batches)

    def remove(self, *names: str) -> None:
        """Delete hidden states, those that are there, on rank zero."""
        for name in names if self._arrays.ranks.is_zero else ():
            self._arrays.remove(name)

    def clear(self) -> None:
        """Delete everything, on rank zero."""
        if self._arrays.ranks.is_zero:
            self._arrays.clear()
