"""The change of the model's predictions by compressing each linear with each setting.

All settings of all linears take one forward and one backward pass (and, in each linear, a product for each setting),
instead of a pass for each of them.
"""

import time
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from nowag_pl.functional.predictions.sensitivity import predicted_divergence
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.modules import CompressedLinear
from nowag_pl.run.layout import SENSITIVITIES
from nowag_pl.run.progress import block_progress
from nowag_pl.run.store import ArtefactStore
from nowag_pl.stages.backward import Backward, LinearGradient
from nowag_pl.stages.budget.candidates import read_candidates

Candidates = Mapping[str, Mapping[int, CompressedLinear]]


def write_sensitivities(model: StreamedModel, windows: Tensor, store: ArtefactStore, batch_size: int) -> None:
    """Write, for every block that lacks it, the predicted divergence of each candidate of each linear alone.

    Args:
        model: dense model.
        windows: sequences `[num_sequences, seq_len]`, the same on every rank; each takes its share.
        store: run directory with the candidates of those blocks.
        batch_size: sequences that pass through a block together.
    """
    missing = store.missing(SENSITIVITIES, len(model))
    if not missing:
        return
    ranks, first = store.ranks, min(missing)
    num_predictions = len(windows) * (windows.shape[1] - 1)
    backward = Backward(model, windows, ranks, batch_size, first, "model")
    with block_progress("Sensitivities", len(model) - first, ranks.is_zero, model.device) as report:
        for index in reversed(range(first, len(model))):
            started = time.perf_counter()
            moved = _Moved(_on_device(model, store, index) if index in missing else {})
            backward.through(index, moved.sums, moved.look)
            if index in missing:
                everywhere = ranks.gather(moved.sums)
                losses = {
                    name: {number: sum(each[name][number] for each in everywhere) / num_predictions for number in own}
                    for name, own in moved.sums.items()
                }
                store.write(SENSITIVITIES, index, {}, {"losses": losses, "seconds": time.perf_counter() - started})
            report("")


def read_sensitivities(store: ArtefactStore, index: int) -> dict[str, dict[int, float]]:
    """Return the divergence in nats per token by linear and number of the setting."""
    losses = store.read_metadata(SENSITIVITIES, index)["losses"]
    return {name: {int(number): loss for number, loss in row.items()} for name, row in losses.items()}


class _Moved:
    """The change of the predictions by the candidates of a block's linears, added up over batches.

    Args:
        candidates: by linear and number of the setting.
    """

    def __init__(self, candidates: Candidates) -> None:
        self._candidates = candidates
        self.sums = {name: dict.fromkeys(by_number, 0.0) for name, by_number in candidates.items()}

    def look(self, seen: LinearGradient) -> None:
        """Add a batch."""
        weight = seen.weight.float()
        for number, linear in self._candidates[seen.name].items():
            change = F.linear(seen.inputs, (linear.weight.float() - weight).to(seen.inputs.dtype))
            self.sums[seen.name][number] += float(predicted_divergence(change, seen.gradient))


def _on_device(model: StreamedModel, store: ArtefactStore, index: int) -> Candidates:
    return {
        name: {number: linear.to(model.device) for number, linear in by_number.items()}
        for name, by_number in read_candidates(store, index).items()
    }
