"""Hidden states of many sequences, moved through the blocks one after the other."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nowag_pl.models.streaming import StreamedModel, find_linears
from nowag_pl.modules import SecondMoment


class HiddenStream:
    """The hidden states in front of a block. They lie in host memory, a batch at a time goes to the device.

    Args:
        model: the model whose blocks they pass.
        windows: token ids `[num_sequences, seq_len]`; possibly none.
        batch_size: sequences that pass a block together.
    """

    def __init__(self, model: StreamedModel, windows: Tensor, batch_size: int) -> None:
        self._model = model
        self._empty = torch.empty(0, windows.shape[1], model.hidden_size, dtype=model.checkpoint.dtype)
        self._hidden: list[Tensor] = []
        self._arguments: dict[int, list[dict[str, Any]]] = {}  # by batch size; they do not depend on the tokens
        for tokens in windows.split(batch_size) if len(windows) else ():
            inputs = model.embed(tokens)
            self._hidden.append(inputs.hidden.cpu())
            self._arguments[len(tokens)] = inputs.arguments

    @torch.no_grad()
    def run(self, block: nn.Module, index: int, advance: bool = True) -> None:
        """Run a block over the hidden states in front of it.

        Args:
            block: the block, dense or compressed.
            index: its number in the model.
            advance: replace the hidden states by those behind the block; False runs it for its hooks alone.
        """
        for number, hidden in enumerate(self._hidden):
            arguments = self._arguments[len(hidden)][index]
            output = self._model.forward_block(block, hidden.to(self._model.device), arguments)
            if advance:
                self._hidden[number] = output.cpu()

    def gathered(self) -> Tensor:
        """Return the hidden states of all sequences, `[num_sequences, seq_len, hidden]`."""
        return torch.cat([self._empty, *self._hidden])


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
