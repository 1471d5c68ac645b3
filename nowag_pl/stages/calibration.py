"""Calibration: second moments of every linear's input, block by block."""

import logging
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from nowag_pl.models.streaming import StreamedModel
from nowag_pl.run.layout import MOMENTS
from nowag_pl.run.progress import Report
from nowag_pl.run.store import ArtefactStore
from nowag_pl.stages.correction import CorrectedMoments
from nowag_pl.stages.guidance import read_guidance
from nowag_pl.stages.hidden import HiddenStates
from nowag_pl.stages.loop import BlockStage, over_blocks
from nowag_pl.stages.moments import DenseMoments, Gathered, MomentSource, PropagatedMoments, StoredMoments
from nowag_pl.stages.plan import CalibrationSettings

_log = logging.getLogger("nowag_pl")


def calibrate(model: StreamedModel, store: ArtefactStore, windows: Tensor, settings: CalibrationSettings) -> None:
    """Write the mean squares of the dense model for every block that lacks them.

    Args:
        model: dense model.
        store: run directory.
        windows: calibration sequences `[num_sequences, seq_len]`, the same on every rank; each takes its share.
        settings: batch size and guidance.

    Raises:
        ValueError: an activation is NaN or infinite; the message names block and linear.
    """
    if not store.missing(MOMENTS, len(model)):
        return
    states = HiddenStates(model, store.ranks.share(windows), settings.batch_size)
    weights = read_guidance(store, settings.guidance)
    source = DenseMoments(model, states, store.ranks, False, weights, settings.expert_shrinkage)

    def work(index: int, block: nn.Module, report: Report) -> str:
        for _ in source.groups(block, index):
            write_moments(model, store, index, source.gathered())
        return ""

    over_blocks(model, store, source, BlockStage(MOMENTS, "Calibrating", work))


def moment_source(
    model: StreamedModel, store: ArtefactStore, stage: str, windows: Tensor, settings: CalibrationSettings, full: bool
) -> MomentSource:
    """Return the source of a stage's second moments.

    Args:
        model: dense model.
        store: run directory.
        stage: the stage; one that is done for every block needs no hidden states.
        windows: calibration sequences `[num_sequences, seq_len]`, the same on every rank.
        settings: mode, batch size and guidance.
        full: whether the matrices of x x^T are needed.
    """
    is_stored = settings.mode == "dense" and not full
    if is_stored or not store.missing(stage, len(model)):
        return StoredMoments(model, store)
    states = HiddenStates(model, store.ranks.share(windows), settings.batch_size)
    weights = read_guidance(store, settings.guidance)
    if settings.mode == "corrected":
        return CorrectedMoments(model, states, store.ranks, full, weights)
    kind = DenseMoments if settings.mode == "dense" else PropagatedMoments
    return kind(model, states, store.ranks, full, weights, settings.expert_shrinkage)


def write_moments(model: StreamedModel, store: ArtefactStore, index: int, gathered: Gathered | None) -> None:
    """Write the mean squares of a block, where any were gathered, and warn of inputs that are always zero."""
    if gathered is None:
        return
    squares, num_tokens, seconds, tokens = gathered
    dead = {name: int((square == 0).sum()) for name, square in squares.items() if (square == 0).any()}
    if dead:
        _log.warning("%s: input channels that are always zero: %s", model.block_name(index), dead)
    metadata = {"seconds": seconds, "num_tokens": num_tokens, "dead_channels": dead}
    if tokens:
        metadata["tokens_per_expert"] = tokens
        _warn_of_unseen(model.block_name(index), tokens)
    store.write(MOMENTS, index, squares, metadata)


def unseen_experts(tokens: Mapping[str, Sequence[int]]) -> list[str]:
    """Return the names in their block of experts that no calibration token was routed to.

    Args:
        tokens: tokens of each expert, by the name of the experts in the block.
    """
    return [f"{name}.{number}" for name, counts in tokens.items() for number, count in enumerate(counts) if not count]


def _warn_of_unseen(block: str, tokens: Mapping[str, Sequence[int]]) -> None:
    if unseen := unseen_experts(tokens):
        _log.warning(
            "%s: no calibration token was routed to %s, compressed by the moments of all tokens of the block",
            block,
            ", ".join(unseen),
        )
