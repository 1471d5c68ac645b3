"""Hidden states of many sequences, moved through the blocks one after the other."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nowag_pl.models.streaming import StreamedModel, find_linears
from nowag_pl.modules import SecondMoment
from nowag_pl.run.progress import block_progress
from nowag_pl.run.ranks import Ranks


class HiddenStream:
    """The hidden states in front of a block. They lie in host memory, a batch at a time goes to the device.

    Args:
        model: the model whose blocks they pass.
        windows: token ids `[num_sequences, seq_len]`; possibly none.
        batch_size: sequences that pass a block together.
    """

    def __init__(self, model: StreamedModel, windows: Tensor, batch_size: int) -> None:
        self._model = model
        self._hidden: list[Tensor] = []
        for tokens in windows.split(batch_size) if len(windows) else ():
            self._hidden.append(model.embed(tokens).hidden.cpu())

    @torch.no_grad()
    def run(self, block: nn.Module, index: int, advance: bool = True) -> None:
        """Run a block over the hidden states in front of it.

        Args:
            block: the block, dense or compressed.
            index: its number in the model.
            advance: replace the hidden states by those behind the block; False runs it for its hooks alone.
        """
        for number, hidden in enumerate(self._hidden):
            output = self.forward(block, index, hidden)
            if advance:
                self._hidden[number] = output.cpu()

    def forward(self, block: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """Return what a block makes of one of the batches, on the device.

        Args:
            block: the block, dense or compressed.
            index: its number in the model.
            hidden: `[batch, seq_len, hidden]`.
        """
        arguments = self._model.arguments(index, *hidden.shape[:2])
        return self._model.forward_block(block, hidden.to(self._model.device), arguments)

    def fork(self) -> "HiddenStream":
        """Return another stream at the same place. What both have not moved on from is in memory once."""
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


def streamed(
    model: StreamedModel,
    load_block: Callable[[int], nn.Module],
    title: str,
    windows: Tensor,
    batch_size: int,
    ranks: Ranks,
) -> HiddenStream:
    """Return this rank's share of windows behind the last block.

    Args:
        model: embeddings, and what the blocks are called with.
        load_block: gives a block.
        title: for the progress bar.
        windows: token ids `[num_windows, seq_len]`, the same on every rank.
        batch_size: windows that pass a block together.
        ranks: who shares them.
    """
    stream = HiddenStream(model, ranks.share(windows), batch_size)
    with block_progress(title, len(model), ranks.is_zero, model.device) as report:
        for index in range(len(model)):
            stream.run(load_block(index).to(model.device), index)
            report("")
    return stream


@contextmanager
def observed_inputs(block: nn.Module) -> Iterator[dict[str, SecondMoment]]:
    """Gather second moments of the input of every linear of a block while the context is open."""
    moments: dict[str, SecondMoment] = {}
    handles = []
    for name, linear in find_linears(block).items():
        moments[name] = moment = SecondMoment(linear.in_features).to(linear.weight.device)
        handles.append(linear.register_forward_pre_hook(lambda _, args, moment=moment: moment.update(args[0])))
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()
