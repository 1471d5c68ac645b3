"""Finetuned blocks as artefacts: the tensors that are stored, and how blocks are built from them."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from nowag_pl.models.shards import local_part, local_rows
from nowag_pl.models.state import stored_state
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.run.layout import FINETUNED
from nowag_pl.run.store import ArtefactStore
from nowag_pl.stages import compression


def write_block(store: ArtefactStore, index: int, block: nn.Module, metadata: Mapping[str, Any]) -> None:
    """Write a finetuned block, on rank zero, and wait for it on the others."""
    store.write(FINETUNED, index, stored_state(block), metadata)


def load_compressed_block(model: StreamedModel, store: ArtefactStore, index: int) -> nn.Module:
    """Return a block as one-shot compression left it."""
    return model.load_block(index, compression.read_block(store, index))


def load_finetuned_block(model: StreamedModel, store: ArtefactStore, index: int) -> nn.Module:
    """Return a block as finetuning left it."""
    block = load_compressed_block(model, store, index)
    block.load_state_dict(store.read(FINETUNED, index)[0])
    return block


def check_fixed(block: nn.Module, store: ArtefactStore, index: int) -> None:
    """Check that training changed neither masks and codes of a block nor the zeros of removed weights.

    Args:
        block: trained block, perhaps with sharded parameters.
        store: run directory.
        index: number of the block.

    Raises:
        RuntimeError: a mask or code has changed.
    """
    for name, original in compression.read_block(store, index).items():
        linear, title = block.get_submodule(name), f"{name} of block {index}"
        if not isinstance(linear, type(original)) or linear.settings() != original.settings():
            raise RuntimeError(f"Expected {title} to stay {original}, but training made it {linear}.")
        fixed = linear.fixed()
        for key, tensor in original.fixed().items():
            # Of a sharded model, each process has some rows.
            if not local_rows(tensor, fixed[key]).equal(local_part(fixed[key]).cpu()):
                raise RuntimeError(f"Expected {key} of {title} to stay fixed, but training changed it.")
