"""Finetuned blocks as artefacts: what is stored of them, and how they are put together again."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from nowag_pl.models.streaming import StreamedModel
from nowag_pl.modules import CompressedLinear
from nowag_pl.pipeline import compression
from nowag_pl.pipeline.store import ArtefactStore

STAGE = "finetuned"


def block_storage(block: nn.Module) -> dict[str, Tensor]:
    """Return the state of a block with compressed linears, in the types in which it is stored."""
    state = dict(block.state_dict())
    for name, module in block.named_modules():
        if isinstance(module, CompressedLinear):
            state |= {f"{name}.{key}": tensor for key, tensor in module.storage().items()}
    return state


def write_block(store: ArtefactStore, index: int, block: nn.Module, metadata: Mapping[str, Any]) -> None:
    """Write a finetuned block, on rank zero, and wait for it on the others."""
    store.write(STAGE, index, block_storage(block), metadata)


def load_compressed_block(model: StreamedModel, store: ArtefactStore, index: int) -> nn.Module:
    """Return a block as one-shot compression left it."""
    return model.load_block(index, compression.read_block(store, index))


def load_finetuned_block(model: StreamedModel, store: ArtefactStore, index: int) -> nn.Module:
    """Return a block as finetuning left it."""
    block = load_compressed_block(model, store, index)
    block.load_state_dict(store.read(STAGE, index)[0])
    return block


def check_fixed(model: nn.Module, block_names: list[str], store: ArtefactStore) -> None:
    """Check that training left masks and codes as compression made them, and removed weights at zero.

    Args:
        model: whole model, perhaps with sharded parameters.
        block_names: names of its blocks, in their order.
        store: run directory.

    Raises:
        RuntimeError: a mask or code has changed.
    """
    for index, block_name in enumerate(block_names):
        for name, original in compression.read_block(store, index).items():
            linear = model.get_submodule(f"{block_name}.{name}")
            if not isinstance(linear, type(original)) or linear.settings() != original.settings():
                raise RuntimeError(f"Expected {block_name}.{name} to stay {original}, but training made it {linear}.")
            fixed = linear.fixed()
            for key, tensor in original.fixed().items():
                if not tensor.equal(fixed[key].cpu()):
                    raise RuntimeError(f"Expected {key} of {block_name}.{name} to stay fixed, but training changed it.")
