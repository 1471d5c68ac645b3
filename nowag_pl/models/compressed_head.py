"""A compressed head, and the embeddings that are tied to it: one matrix, stored once, packed.

Where a family ties its embeddings to the head, the packed head is all that is stored of both. The embeddings are its
reconstructed weight, in memory, as rows of it have to be looked up.
"""

from typing import Any

import torch
from torch import nn

from nowag_pl.modules import CompressedLinear


def head_name(model: nn.Module) -> str | None:
    """Return the name of the linear that gives the logits, or None if a module has none.

    Args:
        model: a model of transformers, or any other module.
    """
    head = _head(model)
    return None if head is None else _name(model, head)


def compressed_head(model: nn.Module) -> CompressedLinear | None:
    """Return the head of a model if it is compressed, else None."""
    head = _head(model)
    return head if isinstance(head, CompressedLinear) else None


def tied_embedding(model: nn.Module) -> str | None:
    """Return the name of the embeddings' weight if a compressed head gives it, else None."""
    transformer: Any = model
    if compressed_head(model) is None or not transformer.config.tie_word_embeddings:
        return None
    return f"{_name(model, transformer.get_input_embeddings())}.weight"


def untie(model: nn.Module) -> None:
    """Keep transformers from tying embeddings to a compressed head, which has no such parameter: :func:`tie` does it.

    Args:
        model: a model of transformers, its head in place.
    """
    transformer: Any = model
    if compressed_head(model) is not None:
        transformer._tied_weights_keys, transformer.all_tied_weights_keys = {}, {}


@torch.no_grad()
def tie(model: nn.Module, dtype: torch.dtype) -> None:
    """Tie the embeddings of a model to its head, which may be compressed.

    Args:
        model: a model of transformers.
        dtype: type of the embeddings if the head is compressed.
    """
    transformer: Any = model
    head = compressed_head(model)
    if head is None:
        transformer.tie_weights()
    elif tied_embedding(model) is not None and not any(each.is_meta for each in head.state_dict().values()):
        # An unpacked head and the embeddings share their memory.
        transformer.get_input_embeddings().weight = nn.Parameter(head.dense_weight(dtype), requires_grad=False)


def _head(model: nn.Module) -> nn.Module | None:
    from transformers import PreTrainedModel

    found = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return found if isinstance(found, nn.Linear | CompressedLinear) else None


def _name(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, each in model.named_modules() if each is module)
