"""Write a sharded model as a folder: a block after the other is gathered, written by rank zero, and forgotten."""

from pathlib import Path

from torch import nn

from nowag_pl.lit.sharding import reshard
from nowag_pl.models.format.exl3 import save_exl3, save_streamed_exl3
from nowag_pl.models.format.saving import save_compressed, save_dense, save_streamed
from nowag_pl.models.sharded_copy import ShardedCopy
from nowag_pl.run.ranks import Ranks
from nowag_pl.stages.plan import ExportFormat

SAVE = {"packed": save_compressed, "dense": save_dense, "exl3": save_exl3}  # of whole models


def save_sharded(model: nn.Module, whole: ShardedCopy, folder: Path, format: ExportFormat, ranks: Ranks) -> None:
    """Write a sharded model as a folder; every process must call it.

    Args:
        model: sharded.
        whole: its copy.
        folder: folder to create, or whose model is replaced.
        format: format of the weights.
        ranks: who holds it; rank zero writes.

    Raises:
        OSError: the folder cannot be written; on every rank.
    """
    reshard(model)
    whole.gather_skeleton(model, ranks.is_zero)
    if not ranks.is_zero:
        # One word before each block, and one at the end.
        for index in range(len(whole) + 1):
            if problem := ranks.broadcast(""):
                raise OSError(problem)
            if index < len(whole):
                whole.gather_block(model, index, keep=False)
        return

    def load_block(index: int) -> nn.Module:
        ranks.broadcast("")
        return whole.gather_block(model, index, keep=True)

    try:
        if format == "exl3":
            save_streamed_exl3(whole, load_block, folder)
        else:
            save_streamed(whole, load_block, folder, format == "dense")
    except (OSError, ValueError) as error:
        # It has to reach the others, which wait for the next word.
        ranks.broadcast(str(error) or type(error).__name__)
        raise
    ranks.broadcast("")
