"""Guidance: the weight of each calibration token for each linear, by the gradient of the final loss.

One forward and one backward pass; the result is one number for each token and linear, by which every kind of second
moments is weighted: those of the dense model, and those after compressed blocks and linears.
"""

import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nowag_pl.functional.guidance import tempered, token_weights
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.modules.moments import GradientMoment
from nowag_pl.run.layout import GUIDANCE, OUTPUT_MOMENTS
from nowag_pl.run.progress import block_progress
from nowag_pl.run.store import ArtefactStore
from nowag_pl.stages.backward import Backward, LinearGradient
from nowag_pl.stages.moments import TokenWeights
from nowag_pl.stages.plan import CalibrationSettings, GuidanceSettings


def write_guidance(
    model: StreamedModel, store: ArtefactStore, windows: Tensor, settings: CalibrationSettings, coupled: bool = False
) -> None:
    """Write the squared gradient at every token of every selected linear, for every block that lacks it.

    Args:
        model: dense model.
        store: run directory.
        windows: calibration sequences `[num_sequences, seq_len]`, the same on every rank; each takes its share.
        settings: the labels, and the number of sequences that pass through a block together.
        coupled: whether to write the second moments of gradients at the outputs of every selected linear, too.

    Raises:
        ValueError: a gradient is NaN or infinite; the message names block and linear.
    """
    stages = [GUIDANCE, OUTPUT_MOMENTS] if coupled else [GUIDANCE]
    missing = {index for stage in stages for index in store.missing(stage, len(model))}
    if settings.guidance is None or not missing:
        return
    ranks, first = store.ranks, min(missing)
    backward = Backward(model, windows, ranks, settings.batch_size, first, settings.guidance.labels)
    with block_progress("Guidance", len(model) - first, ranks.is_zero, model.device) as report:
        for index in reversed(range(first, len(model))):
            started = time.perf_counter()
            linears = model.linears(index) if index in missing else {}
            seen = _Seen(linears, (len(ranks.share(windows)), windows.shape[1]), coupled, model.device)
            backward.through(index, list(linears), seen.look)
            if index in missing:
                together = _of_all_ranks(ranks.gather(seen.weights), windows)
                _check(together, model.block_name(index))
                seconds = {"seconds": time.perf_counter() - started}
                if coupled:
                    store.write(OUTPUT_MOMENTS, index, seen.output_moments(), {"seconds": 0.0})
                store.write(GUIDANCE, index, together, seconds)
            report("")


class _Seen:
    """What is kept of the gradients of a block's linears.

    Args:
        linears: the linears by name.
        shape: number of this rank's sequences, and tokens in each.
        coupled: whether second moments at the outputs are gathered.
        device: where they are gathered.
    """

    def __init__(
        self, linears: Mapping[str, nn.Linear], shape: tuple[int, int], coupled: bool, device: torch.device
    ) -> None:
        self.weights = {name: torch.zeros(shape) for name in linears}
        sizes = {name: linear.out_features for name, linear in linears.items()} if coupled else {}
        self._moments = {name: GradientMoment(size).to(device) for name, size in sizes.items()}

    def look(self, seen: LinearGradient) -> None:
        """Add a batch."""
        rows = slice(seen.start, seen.start + len(seen.gradient))
        self.weights[seen.name][rows] = token_weights(seen.gradient).cpu()
        if seen.name in self._moments:
            self._moments[seen.name].update(seen.inputs, seen.gradient)

    def output_moments(self) -> dict[str, Tensor]:
        """Return the second moments of gradients over all ranks, in host memory; all ranks must call."""
        for moment in self._moments.values():
            moment.all_reduce()
        return {name: moment.compute().cpu() for name, moment in self._moments.items()}


def _of_all_ranks(shares: list[dict[str, Tensor]], windows: Tensor) -> dict[str, Tensor]:
    """Return the weights of all sequences, `[num_sequences, seq_len]`, of which every rank has every n-th one."""
    together = {name: torch.zeros(windows.shape) for name in shares[0]}
    for rank, share in enumerate(shares):
        for name, weights in share.items():
            together[name][rank :: len(shares)] = weights
    return together


def _check(weights: dict[str, Tensor], block: str) -> None:
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{block}.{name}: Expected finite gradients of the end loss, but got NaN or infinity.")


def read_guidance(store: ArtefactStore, settings: GuidanceSettings | None) -> TokenWeights | None:
    """Return a function for the weights of this rank's tokens, of mean 1 over all ranks; None without guidance."""
    if settings is None:
        return None

    def weights(index: int, name: str) -> Tensor:
        everything = store.read(GUIDANCE, index)[0][name]
        return store.ranks.share(tempered(everything, settings.power))

    return weights
