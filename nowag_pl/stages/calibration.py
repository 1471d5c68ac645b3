"""Calibration: second moments of every linear's input, block by block."""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

from torch import Tensor, nn

from nowag_pl.functional.moments import mean_squares
from nowag_pl.models.streaming import StreamedModel, find_linears
from nowag_pl.modules import SecondMoment
from nowag_pl.run.progress import block_progress
from nowag_pl.run.ranks import Ranks
from nowag_pl.run.store import ArtefactStore
from nowag_pl.stages.hidden import HiddenStream, observed_inputs
from nowag_pl.stages.moments import full_second_moments

STAGE = "moments"
CalibrationMode = Literal["dense", "propagated", "corrected"]
_log = logging.getLogger("nowag_pl")


def calibrate(model: StreamedModel, windows: Tensor, store: ArtefactStore, batch_size: int) -> None:
    """Write the second moments of the dense model for every block that lacks them.

    Args:
        model: dense model.
        windows: calibration sequences `[num_sequences, seq_len]`, the same on every rank; each takes its share.
        store: run directory.
        batch_size: sequences that pass a block together.

    Raises:
        ValueError: an activation is NaN or infinite; the message names block and linear.
    """
    missing = set(store.missing(STAGE, len(model)))
    if not missing:
        return
    ranks = store.ranks
    stream = HiddenStream(model, ranks.share(windows), batch_size)
    with block_progress("Calibrating", max(missing) + 1, ranks.is_zero, model.device) as report:
        for index in range(max(missing) + 1):
            if index in missing:
                calibrate_block(model, stream, model.load_block(index), index, store, advance=True)
            else:
                stream.run(model.load_block(index), index)
            report("" if index in missing else "already there")


def calibration_stream(
    model: StreamedModel,
    windows: Tensor,
    store: ArtefactStore,
    stage: str,
    batch_size: int,
    mode: CalibrationMode,
    full: bool,
) -> HiddenStream | None:
    """Return this rank's sequences in front of block 0 for a stage that gathers second moments by itself.

    Args:
        model: dense model.
        windows: calibration sequences `[num_sequences, seq_len]`, the same on every rank.
        store: run directory.
        stage: the stage.
        batch_size: sequences that pass a block together.
        mode: which second moments.
        full: whether the matrices of x x^T are needed.

    Returns:
        None where no block lacks the stage, or the mean squares in the store are enough.
    """
    if (mode == "dense" and not full) or not store.missing(stage, len(model)):
        return None
    return HiddenStream(model, store.ranks.share(windows), batch_size)


def calibrate_block(
    model: StreamedModel,
    stream: HiddenStream,
    block: nn.Module,
    index: int,
    store: ArtefactStore,
    advance: bool,
    full: bool = False,
) -> dict[str, Tensor]:
    """Gather, reduce, check and write the second moments of one block. Only mean squares are written.

    Args:
        model: dense model.
        stream: hidden states in front of the block.
        block: the dense block.
        index: its number.
        store: run directory.
        advance: whether the stream goes on behind the dense block.
        full: as for :func:`gather`.

    Returns:
        As :func:`gather`.
    """
    started = time.perf_counter()
    means, num_tokens = gather(model, stream, block, index, store.ranks, advance, full)
    write_moments(model, index, store, means, num_tokens, time.perf_counter() - started)
    return means


def write_moments(
    model: StreamedModel, index: int, store: ArtefactStore, means: Mapping[str, Tensor], num_tokens: int, seconds: float
) -> None:
    """Write the mean squares of one block, and warn of inputs that are always zero.

    Args:
        model: dense model.
        index: number of the block.
        store: run directory.
        means: second moment of each linear, `[in]` or `[in, in]`.
        num_tokens: over how many tokens.
        seconds: how long they took.
    """
    squares = {name: mean_squares(mean).contiguous() for name, mean in means.items()}
    dead = {name: int((square == 0).sum()) for name, square in squares.items() if (square == 0).any()}
    if dead:
        _log.warning("%s: input channels that are always zero: %s", model.block_name(index), dead)
    store.write(STAGE, index, squares, {"seconds": seconds, "num_tokens": num_tokens, "dead_channels": dead})


def gather(
    model: StreamedModel,
    stream: HiddenStream,
    block: nn.Module,
    index: int,
    ranks: Ranks,
    advance: bool,
    full: bool,
) -> tuple[dict[str, Tensor], int]:
    """Gather, reduce and check the second moments of one block.

    Args:
        model: dense model.
        stream: hidden states in front of the block.
        block: the dense block.
        index: its number.
        ranks: the processes of the run.
        advance: whether the stream goes on behind the block.
        full: whether to gather the matrices of x x^T.

    Returns:
        Second moment of each linear by its name in the block, `[in]`, or `[in, in]` if `full`, float32 in host memory;
        and the number of tokens.
    """
    check_finite_weights(model, block, index)
    if full:
        moments = full_second_moments(block, lambda: stream.run(block, index, advance), ranks)
    else:
        with observed_inputs(block) as moments:
            stream.run(block, index, advance)
    computed: dict[SecondMoment, Tensor] = {}  # linears may share one
    for name, moment in moments.items():
        if moment in computed:
            continue
        moment.all_reduce()
        with naming(f"{model.block_name(index)}.{name}"):
            computed[moment] = moment.compute().cpu()
    num_tokens = int(next(iter(moments.values())).num_tokens) if moments else 0
    return {name: computed[moment] for name, moment in moments.items()}, num_tokens


def check_finite_weights(model: StreamedModel, block: nn.Module, index: int) -> None:
    """Raise ValueError that names the first linear of a block with a weight that is NaN or infinite."""
    for name, linear in find_linears(block).items():
        if not linear.weight.isfinite().all():
            raise ValueError(f"{model.block_name(index)}.{name}: Expected finite weights, but got NaN or infinity.")


@contextmanager
def naming(linear: str) -> Iterator[None]:
    """Put the name of a linear before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{linear}: {error}") from error
