"""The one loop over blocks: a stage is done for every block that lacks it, one block in memory at a time."""

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from nowag_pl.models.streaming import StreamedModel
from nowag_pl.modules import CompressedLinear
from nowag_pl.run.progress import Report, block_progress
from nowag_pl.run.store import ArtefactStore
from nowag_pl.stages.moments import MomentSource

Work = Callable[[int, nn.Module, Report], str]  # number of a block, the block, progress; gives a note


class BlockStage(NamedTuple):
    """The work on every block.

    Attributes:
        name: folder of its artefacts.
        title: for the progress bar.
        work: does it for one block, and writes the artefact.
        made: replacements of linears for the blocks that follow, by name; none if the dense ones stay.
    """

    name: str
    title: str
    work: Work
    made: Callable[[int], dict[str, CompressedLinear]] = lambda _: {}


def over_blocks(model: StreamedModel, store: ArtefactStore, source: MomentSource, stage: BlockStage) -> None:
    """Do a stage for every block that lacks it, first block first.

    Hidden states pass the blocks that are there already, too, where the source of second moments has any.

    Args:
        model: dense model.
        store: run directory.
        source: source of second moments.
        stage: the work to do.
    """
    missing = set(store.missing(stage.name, len(model)))
    last = max(missing, default=-1)
    if not missing:
        return
    with block_progress(stage.title, last + 1, store.ranks.is_zero, model.device) as report:
        for index in range(last + 1):
            note = "already there"
            if index in missing or source.has_states:
                block = model.load_block(index)
                if index in missing:
                    note = stage.work(index, block, report)
                if source.has_states:
                    source.advance(block, index, stage.made)
                del block
            report(note)
