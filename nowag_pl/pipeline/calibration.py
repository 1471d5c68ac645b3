"""Calibration: second moments of every linear's input, block by block."""

import logging
import time

from torch import Tensor, nn

from nowag_pl.models.streaming import StreamedModel, find_linears
from nowag_pl.pipeline.progress import block_progress
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
    with block_progress("Calibrating", max(missing) + 1, ranks.is_zero) as report:
        for index in range(max(missing) + 1):
            if index in missing:
                calibrate_block(model, stream, model.load_block(index), index, store, advance=True)
            else:
                stream.run(model.load_block(index), index)
            report("" if index in missing else "(already there)")


def calibrate_block(
    model: StreamedModel,
    stream: HiddenStream,
    block: nn.Module,
    index: int,
    store: ArtefactStore,
    advance: bool,
) -> dict[str, Tensor]:
    """Gather, reduce, check and write the second moments of one block.

    Args:
        model: dense model.
        stream: hidden states in front of the block.
        block: the dense block.
        index: its number.
        store: run directory.
        advance: whether the stream goes on behind the dense block.

    Returns:
        Second moment `[in]` of each linear by its name in the block, float32.
    """
    started = time.perf_counter()
    for name, linear in find_linears(block).items():
        if not linear.weight.isfinite().all():
            raise ValueError(f"{model.block_name(index)}.{name}: Expected finite weights, but got NaN or infinity.")
    with observed_inputs(block) as moments:
        stream.run(block, index, advance)
    means: dict[str, Tensor] = {}
    for name, moment in moments.items():
        moment.all_reduce()
        try:
            means[name] = moment.compute().cpu()
        except ValueError as error:
            raise ValueError(f"{model.block_name(index)}.{name}: {error}") from error
    dead = {name: int((mean == 0).sum()) for name, mean in means.items() if (mean == 0).any()}
    if dead:
        _log.warning("%s: input channels that are always zero: %s", model.block_name(index), dead)
    seconds = time.perf_counter() - started
    num_tokens = int(next(iter(moments.values())).num_tokens) if moments else 0
    store.write(STAGE, index, means, {"seconds": seconds, "num_tokens": num_tokens, "dead_channels": dead})
    return means
