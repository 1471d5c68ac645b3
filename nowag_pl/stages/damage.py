"""Where a compressed model loses: errors of the blocks' outputs, and the divergence of what they would predict."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nowag_pl.functional.predictions.divergence import kl_divergence
from nowag_pl.functional.thumbnails import even_indices
from nowag_pl.models.streaming import StreamedModel

# Positions of a window at which predictions are compared: with 262 k words they take 128 MiB in float32.
_MAX_POSITIONS = 128


@dataclass(frozen=True)
class Damage:
    """What is lost up to each block, one value for each.

    An error is that of a block's output, relative to the change that the dense block makes to its input; 1 is as good
    as no block.

    Attributes:
        alone: error of the compressed block on the inputs of the dense one.
        accumulated: error of the compressed block on the outputs of the compressed blocks before it.
        divergence: mean Kullback-Leibler divergence in nats of the predictions that final norm and head make of the
            outputs of the compressed blocks, from those that they make of the dense blocks' outputs.
    """

    alone: list[float] = field(default_factory=list)
    accumulated: list[float] = field(default_factory=list)
    divergence: list[float] = field(default_factory=list)


@torch.no_grad()
def measure_damage(model: StreamedModel, load_compressed: Callable[[int], nn.Module], windows: Tensor) -> Damage:
    """Run a few windows, one at a time, through the dense and the compressed blocks.

    Args:
        model: dense model.
        load_compressed: gives a compressed block.
        windows: token ids `[num_windows, seq_len]`.
    """
    dense = [model.embed(window).hidden.cpu() for window in windows.split(1)]
    accumulated = list(dense)
    damage = Damage()
    for index in range(len(model)):
        arguments = model.arguments(index, 1, windows.shape[1])
        block, compressed = model.load_block(index), load_compressed(index).to(model.device)
        added = alone = together = divergence = 0.0
        for number, hidden in enumerate(dense):
            inputs = hidden.to(model.device)
            target = model.forward_block(block, inputs, arguments)
            added += _sum_of_squares(target - inputs)
            alone += _sum_of_squares(model.forward_block(compressed, inputs, arguments) - target)
            output = model.forward_block(compressed, accumulated[number].to(model.device), arguments)
            together += _sum_of_squares(output - target)
            divergence += _divergence(model, target, output)
            dense[number], accumulated[number] = target.cpu(), output.cpu()
        damage.alone.append(alone / (added or 1.0))
        damage.accumulated.append(together / (added or 1.0))
        damage.divergence.append(divergence / len(windows))
    return damage


def _divergence(model: StreamedModel, dense: Tensor, compressed: Tensor) -> float:
    """Return the mean divergence of the predictions from two sets of hidden states `[1, seq_len, hidden]`."""
    positions = even_indices(dense.shape[1], _MAX_POSITIONS).to(dense.device)
    of_dense, of_compressed = (model.head(hidden[:, positions])[0] for hidden in (dense, compressed))
    return float(kl_divergence(of_dense, of_compressed)[0]) / len(positions)


def _sum_of_squares(hidden: Tensor) -> float:
    return float(hidden.float().square().sum(dtype=torch.float64))
