"""How much each linear's compression with each setting moves the model's predictions.

Gradients go back through the dense model a block at a time, from the hidden states in front of each block, which a
first pass keeps in host memory. So all settings of all linears take one pass forwards and one back (and, in each
linear, a product for each setting), instead of a pass for each of them.
"""

import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nowag_pl.functional.predictions.sensitivity import drawn_labels, label_gradient, predicted_divergence
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.modules import CompressedLinear
from nowag_pl.run.layout import SENSITIVITIES
from nowag_pl.run.progress import block_progress
from nowag_pl.run.ranks import Ranks
from nowag_pl.run.store import ArtefactStore
from nowag_pl.stages.budget.candidates import read_candidates
from nowag_pl.stages.correction import Point, captured
from nowag_pl.stages.hidden import HiddenStates

HEAD_TOKENS = 2048  # whose logits are in memory together
Candidates = Mapping[str, Mapping[int, CompressedLinear]]


class Sweep(NamedTuple):
    """A block that gradients pass, and the candidates of its linears.

    Attributes:
        model: dense model.
        block: the dense block.
        number: of the block.
        candidates: by linear and number of the setting.
        sums: of their predicted divergences, added up over the batches.
    """

    model: StreamedModel
    block: nn.Module
    number: int
    candidates: Candidates
    sums: dict[str, dict[int, float]]


def write_sensitivities(model: StreamedModel, windows: Tensor, store: ArtefactStore, batch_size: int) -> None:
    """Write, for every block that lacks it, the predicted divergence of each candidate of each linear alone.

    Args:
        model: dense model.
        windows: sequences `[num_sequences, seq_len]`, the same on every rank; each takes its share.
        store: run directory with the candidates of those blocks.
        batch_size: sequences that pass a block together.
    """
    missing = store.missing(SENSITIVITIES, len(model))
    if not missing:
        return
    ranks, first = store.ranks, min(missing)
    num_predictions = len(windows) * (windows.shape[1] - 1)
    hidden = _hidden_states(model, windows, ranks, batch_size, first)
    gradients = [
        head_gradient(model, batch, uniform)
        for batch, uniform in zip(hidden.pop(), _uniforms(windows, ranks, batch_size), strict=True)
    ]
    with block_progress("Sensitivities", len(model) - first, ranks.is_zero, model.device) as report:
        for index in reversed(range(first, len(model))):
            started = time.perf_counter()
            candidates = _on_device(model, store, index) if index in missing else {}
            sums = {name: dict.fromkeys(by_number, 0.0) for name, by_number in candidates.items()}
            sweep = Sweep(model, model.load_block(index), index, candidates, sums)
            for number, entering in enumerate(hidden.pop()):
                gradients[number] = _backward(sweep, entering, gradients[number])
            if index in missing:
                everywhere = ranks.gather(sums)
                losses = {
                    name: {number: sum(each[name][number] for each in everywhere) / num_predictions for number in own}
                    for name, own in sums.items()
                }
                store.write(SENSITIVITIES, index, {}, {"losses": losses, "seconds": time.perf_counter() - started})
            report("")


def read_sensitivities(store: ArtefactStore, index: int) -> dict[str, dict[int, float]]:
    """Return the divergence in nats per token by linear and number of the setting."""
    losses = store.read_metadata(SENSITIVITIES, index)["losses"]
    return {name: {int(number): loss for number, loss in row.items()} for name, row in losses.items()}


def head_gradient(model: StreamedModel, hidden: Tensor, uniform: Tensor) -> Tensor:
    """Return the gradient of the negative log likelihood of labels that the model draws, some positions at a time.

    Args:
        model: dense model.
        hidden: hidden states behind the last block `[batch, seq_len, hidden]`.
        uniform: random numbers `[batch, seq_len - 1]` that choose the labels; the last position has none.

    Returns:
        `[batch, seq_len, hidden]` in host memory, of the sum over all positions.
    """
    gradient = torch.zeros_like(hidden)
    for positions in head_positions(len(hidden), uniform.shape[1]):
        with torch.enable_grad():
            part = hidden[:, positions].to(model.device).requires_grad_()
            logits = model.head(part, differentiable=True)
        flat = logits.detach().flatten(0, 1)
        labels = drawn_labels(flat, uniform[:, positions].flatten())
        (of_part,) = torch.autograd.grad(logits, part, label_gradient(flat, labels).view_as(logits))
        gradient[:, positions] = of_part.cpu()
    return gradient


def head_positions(num_sequences: int, num_positions: int) -> Iterator[slice]:
    """Yield positions whose logits are in memory together.

    Args:
        num_sequences: sequences in a batch.
        num_positions: positions of each.
    """
    size = max(HEAD_TOKENS // num_sequences, 1)
    for start in range(0, num_positions, size):
        yield slice(start, min(start + size, num_positions))


def _hidden_states(
    model: StreamedModel, windows: Tensor, ranks: Ranks, batch_size: int, first: int
) -> list[list[Tensor]]:
    """Return this rank's batches in front of each block from the first one needed, and behind the last."""
    states = HiddenStates(model, ranks.share(windows), batch_size)
    kept = []
    with block_progress("Hidden states", len(model), ranks.is_zero, model.device) as report:
        for index in range(len(model)):
            if index >= first:
                kept.append(list(states.batches()))
            states.run(model.load_block(index), index)
            report("")
    return [*kept, list(states.batches())]


def _uniforms(windows: Tensor, ranks: Ranks, batch_size: int) -> list[Tensor]:
    """Return random numbers for this rank's batches, which depend on a sequence's place alone."""
    uniform = torch.rand(len(windows), windows.shape[1] - 1, generator=torch.Generator().manual_seed(0))
    mine = ranks.share(uniform)
    return list(mine.split(batch_size)) if len(mine) else []


def _on_device(model: StreamedModel, store: ArtefactStore, index: int) -> Candidates:
    return {
        name: {number: linear.to(model.device) for number, linear in by_number.items()}
        for name, by_number in read_candidates(store, index).items()
    }


def _backward(sweep: Sweep, entering: Tensor, gradient: Tensor) -> Tensor:
    """Take gradients of a batch from the end of a block to its beginning, and add up what the candidates' errors do."""
    model, block, index, candidates, sums = sweep
    linears = model.linears(index, block)
    points = [point for name in candidates for point in (Point(name, "input"), Point(name, "output"))]
    with torch.enable_grad(), captured(block, points) as seen:
        entering = entering.to(model.device).requires_grad_()
        output = model.forward_block(block, entering, model.arguments(index, *entering.shape[:2]))
    names = [name for name in candidates if Point(name, "output") in seen]
    outputs = [seen[Point(name, "output")] for name in names]
    before, *of_outputs = torch.autograd.grad(output, [entering, *outputs], gradient.to(model.device))
    with torch.no_grad():
        for name, of_output in zip(names, of_outputs, strict=True):
            weight, inputs = linears[name].weight, seen[Point(name, "input")]
            for number, linear in candidates[name].items():
                change = F.linear(inputs, (linear.weight.float() - weight.float()).to(inputs.dtype))
                sums[name][number] += float(predicted_divergence(change, of_output))
    return before.cpu()
