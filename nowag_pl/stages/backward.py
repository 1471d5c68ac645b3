"""Gradients of a loss of the predictions, computed backwards through the dense model one block at a time.

A first pass keeps the hidden states before each block. Gradients then go from the head down: each block is run once
more from these, so that only one block and its gradients are on the device at a time. The inputs of linears and the
gradients at their outputs can be observed on the way.
"""

from collections.abc import Callable, Collection
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from nowag_pl.functional.chunks import position_chunks
from nowag_pl.functional.predictions.sensitivity import drawn_labels, label_gradient
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.run.progress import block_progress
from nowag_pl.run.ranks import Ranks
from nowag_pl.stages.correction import Point, captured
from nowag_pl.stages.hidden import HiddenStates

Labels = Literal["model", "text"]


class LinearGradient(NamedTuple):
    """A batch of a linear's inputs, and gradients at its outputs.

    Attributes:
        name: of the linear, in its block.
        weight: of the dense linear, `[out, in]`.
        inputs: `[batch, seq_len, in]`.
        gradient: of the loss, summed over all predicted tokens, `[batch, seq_len, out]`.
        start: number of the batch's first sequence among those of this rank.
    """

    name: str
    weight: Tensor
    inputs: Tensor
    gradient: Tensor
    start: int


class Backward:
    """Gradients of the negative log likelihood of labels, at the end of the last block to begin with.

    Args:
        model: dense model.
        windows: token ids `[num_sequences, seq_len]`, the same on every rank; each takes its share.
        ranks: the processes of the run.
        batch_size: sequences that pass through a block together.
        first: the lowest block for which gradients are needed.
        labels: "model" for labels drawn from the model itself, whose gradients give the Fisher information; "text"
            for the tokens that follow.
    """

    def __init__(
        self, model: StreamedModel, windows: Tensor, ranks: Ranks, batch_size: int, first: int, labels: Labels
    ) -> None:
        self._model = model
        self._hidden = _hidden_states(model, windows, ranks, batch_size, first)
        chosen = list(_labels(windows, ranks, batch_size, labels))
        with block_progress("Gradients of the head", 1, ranks.is_zero, model.device) as report:
            ends = self._hidden.pop()
            self._gradients = [head_gradient(model, batch, label) for batch, label in zip(ends, chosen, strict=True)]
            report("")

    def through(self, index: int, names: Collection[str], look: Callable[[LinearGradient], None]) -> None:
        """Take the gradients from the end of a block to its beginning. Blocks are passed from the last to the first.

        Args:
            index: number of the block.
            names: linears to look at.
            look: is given each of them, batch by batch, without gradients being recorded.
        """
        model, block, start = self._model, self._model.load_block(index), 0
        points = [Point(name, side) for name in names for side in ("input", "output")]
        for number, hidden in enumerate(self._hidden.pop()):
            with torch.enable_grad(), captured(block, points) as seen:
                entering = hidden.to(model.device).requires_grad_()
                output = model.forward_block(block, entering, model.arguments(index, *entering.shape[:2]))
            called = [name for name in names if Point(name, "output") in seen]
            outputs = [seen[Point(name, "output")] for name in called]
            after = self._gradients[number].to(model.device)
            before, *of_outputs = torch.autograd.grad(output, [entering, *outputs], after)
            self._gradients[number] = before.cpu()
            with torch.no_grad():
                for name, gradient in zip(called, of_outputs, strict=True):
                    weight, inputs = block.get_parameter(f"{name}.weight"), seen[Point(name, "input")].detach()
                    look(LinearGradient(name, weight, inputs, gradient, start))
            start += len(entering)


def head_gradient(model: StreamedModel, hidden: Tensor, labels: Tensor) -> Tensor:
    """Return the gradient of the negative log likelihood of labels, some positions at a time.

    Args:
        model: dense model.
        hidden: hidden states after the last block `[batch, seq_len, hidden]`.
        labels: of all positions but the last `[batch, seq_len - 1]`: token ids, or random numbers in [0, 1) by which
            the model draws them.

    Returns:
        `[batch, seq_len, hidden]` in host memory, of the sum over all positions.
    """
    gradient = torch.zeros_like(hidden)
    for positions in position_chunks(len(labels), labels.shape[1], model.checkpoint.vocab_size):
        with torch.enable_grad():
            part = hidden[:, positions].to(model.device).requires_grad_()
            logits = model.head(part, differentiable=True)
        flat, chosen = logits.detach().flatten(0, 1), labels[:, positions].flatten().to(logits.device)
        tokens = drawn_labels(flat, chosen) if chosen.is_floating_point() else chosen.long()
        (of_part,) = torch.autograd.grad(logits, part, label_gradient(flat, tokens).view_as(logits))
        gradient[:, positions] = of_part.cpu()
    return gradient


def _hidden_states(
    model: StreamedModel, windows: Tensor, ranks: Ranks, batch_size: int, first: int
) -> list[list[Tensor]]:
    """Return this rank's batches before each block from the first one needed, and after the last."""
    states = HiddenStates(model, ranks.share(windows), batch_size)
    kept = []
    with block_progress("Hidden states", len(model), ranks.is_zero, model.device) as report:
        for index in range(len(model)):
            if index >= first:
                kept.append(list(states.batches()))
            states.run(model.load_block(index), index)
            report("")
    return [*kept, list(states.batches())]


def _labels(windows: Tensor, ranks: Ranks, batch_size: int, labels: Labels) -> list[Tensor]:
    """Return a function that chooses the labels of this rank's batches by a sequence's place and tokens alone."""
    everything = windows[:, 1:]
    if labels == "model":
        everything = torch.rand(everything.shape, generator=torch.Generator().manual_seed(0))
    mine = ranks.share(everything)
    return list(mine.split(batch_size)) if len(mine) else []
