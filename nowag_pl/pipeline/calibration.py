"""Calibration: second moments of every linear's input, block by block."""

import logging
import time

from torch import Tensor, nn

from nowag_pl.functional.output_error import mean_squares
from nowag_pl.models.streaming import StreamedModel, find_linears
from nowag_pl.modules import SecondMoment
from nowag_pl.pipeline.progress import block_progress
from nowag_pl.pipeline.ranks import Ranks
from nowag_pl.pipeline.shared_inputs import full_second_moments
from nowag_pl.pipeline.store import ArtefactStore
from nowag_pl.pipeline.stream import HiddenStream, observed_inputs

STAGE = "moments"
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
    squares = {name: mean_squares(mean).contiguous() for name, mean in means.items()}
    dead = {name: int((square == 0).sum()) for name, square in squares.items() if (square == 0).any()}
    if dead:
        _log.warning("%s: input channels that are always zero: %s", model.block_name(index), dead)
    seconds = time.perf_counter() - started
    store.write(STAGE, index, squares, {"seconds": seconds, "num_tokens": num_tokens, "dead_channels": dead})
    return means


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
    for name, linear in find_linears(block).items():
        if not linear.weight.isfinite().all():
            raise ValueError(f"{model.block_name(index)}.{name}: Expected finite weights, but got NaN or infinity.")
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
        try:
            computed[moment] = moment.compute().cpu()
        except ValueError as error:
            raise ValueError(f"{model.block_name(index)}.{name}: {error}") from error
    num_tokens = int(next(iter(moments.values())).num_tokens) if moments else 0
    return {name: computed[moment] for name, moment in moments.items()}, num_tokens
