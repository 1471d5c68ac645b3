"""A compressed head: one linear after the blocks, put on a trellis by its weights alone.

At 5 bits and more, the loss there is far below that in the blocks. Second moments of the last hidden states are not
gathered: the text would have to pass through the whole model for them.
"""

import dataclasses
import time
from typing import Any, cast

import torch
from torch import Tensor, nn

from nowag_pl.compressors import Compressor, NoWagTrellis
from nowag_pl.functional.objective import reconstruction_loss
from nowag_pl.models.compressed_head import head_name
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.modules import CompressedLinear
from nowag_pl.run.layout import HEAD
from nowag_pl.run.store import ArtefactStore
from nowag_pl.stages.compression import restored


def head_method(bits: int, compressor: Compressor) -> NoWagTrellis:
    """Return the method of the head: that of the blocks, if it is a trellis, without feedback.

    Args:
        bits: bits of a weight.
        compressor: the method of the blocks.
    """
    method = compressor if isinstance(compressor, NoWagTrellis) else NoWagTrellis()
    # Its rows are the vocabulary, too many to be mixed by one matrix.
    return dataclasses.replace(method, bits=bits, rotation="both", feedback=False, update=None)


def head_of(model: StreamedModel) -> tuple[str, nn.Linear]:
    """Return the name of the dense head, and the head.

    Raises:
        ValueError: there is none.
    """
    name = head_name(model.skeleton)
    if name is None:
        raise ValueError(
            f"Expected, with compression.head, a model whose logits come from a linear, but "
            f"{type(model.skeleton).__name__} has none."
        )
    return name, cast(nn.Linear, model.skeleton.get_submodule(name))


def compress_head(model: StreamedModel, store: ArtefactStore, method: NoWagTrellis) -> CompressedLinear:
    """Write the compressed head, unless it is there, and return it.

    Args:
        model: dense model.
        store: run directory.
        method: the method.

    Raises:
        ValueError: the model has no such head, or the method does not fit it.
    """
    name, head = head_of(model)
    if store.missing(HEAD, 1):
        store.write(HEAD, 0, *_compressed(name, head, method, store.ranks.is_zero))
    return read_head(store)


def read_head(store: ArtefactStore) -> CompressedLinear:
    """Return the compressed head that is there."""
    tensors, metadata = store.read(HEAD, 0)
    return restored(metadata["description"], tensors)


def _compressed(
    name: str, head: nn.Linear, method: NoWagTrellis, is_zero: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what is stored of the head, on rank zero; nothing on the others."""
    if not is_zero:
        return {}, {}
    started, ones = time.perf_counter(), torch.ones(head.in_features, device=head.weight.device)
    try:
        compressed = method.compress(head, ones)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    statistics = {
        "name": name,
        "shape": list(head.weight.shape),
        "loss": reconstruction_loss(head.weight.float(), compressed.weight.float(), ones),
        "bits_per_weight": compressed.bits_per_weight,
        "bytes": compressed.storage_bytes,
    }
    seconds = time.perf_counter() - started
    metadata = {"description": compressed.description(), "statistics": statistics, "seconds": seconds}
    return compressed.storage(), metadata
