"""Calibration: second moments of every linear's input, block by block."""

import logging

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
    source = DenseMoments(model, states, store.ranks, full=False, weights=read_guidance(store, settings.guidance))

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
    return kind(model, states, store.ranks, full, weights)


def write_moments(model: StreamedModel, store: ArtefactStore, index: int, gathered: Gathered | None) -> None:
    """Write the mean squares of a block, where any were gathered, and warn of inputs that are always zero."""
    if gathered is None:
        return
    squares, num_tokens, seconds = gathered
    dead = {name: int((square == 0).sum()) for name, square in squares.items() if (square == 0).any()}
    if dead:
        _log.warning("%s: input channels that are always zero: %s", model.block_name(index), dead)
    store.write(MOMENTS, index, squares, {"seconds": seconds, "num_tokens": num_tokens, "dead_channels": dead})
