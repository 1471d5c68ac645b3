"""Build a whole model from a dense checkpoint and compressed linears, without ever holding the dense linears."""

from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.compressed_head import tie, tied_embedding, untie
from nowag_pl.models.experts import take_apart
from nowag_pl.models.format.descriptions import empty_linears
from nowag_pl.models.state import held_state
from nowag_pl.modules import CompressedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def assemble(checkpoint: Checkpoint, linears: Mapping[str, CompressedLinear]) -> "PreTrainedModel":
    """Build the model of a checkpoint with some of its linears replaced.

    Args:
        checkpoint: dense model on disk; only what is not replaced is read.
        linears: compressed linears by their name in the model.

    Returns:
        A transformers model in evaluation mode.
    """
    model = checkpoint.build(empty=True)
    for name, linear in linears.items():
        model.set_submodule(name, linear)
    untie(model)
    replaced = tuple(f"{name}." for name in linears)
    wanted = {name for name, tensor in model.named_parameters() if tensor.is_meta}
    wanted |= {name for name in model.state_dict() if not name.startswith(replaced)}
    wanted.discard(tied_embedding(model) or "")
    if model.config.tie_word_embeddings:
        wanted &= set(checkpoint.weight_map)
    fill(model, held_state(model, checkpoint.read(sorted(wanted)), checkpoint.dtype), checkpoint.dtype)
    return model.eval()


def fill(
    model: "PreTrainedModel", tensors: Mapping[str, Tensor], dtype: torch.dtype, required: tuple[str, ...] = ()
) -> None:
    """Give a model on the meta device its tensors.

    Args:
        model: model whose parameters are on the meta device, but for compressed linears.
        tensors: name to tensor. A tied weight may be there under one of its names only.
        dtype: type of embeddings that a compressed head gives.
        required: beginnings of names that must be there although their place is not on the meta device.

    Raises:
        ValueError: a tensor is missing, unknown, or of another shape.
    """
    try:
        absent, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:  # shapes
        raise ValueError(f"Expected weights that fit {type(model).__name__}, but got: {error}") from error
    tie(model, dtype)
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    missing += [name for name in absent if name.startswith(required)]
    if missing or unexpected:
        raise ValueError(
            f"Expected exactly the weights of {type(model).__name__}, but {[*missing, *unexpected][0]!r} is "
            f"{'missing' if missing else 'unknown'}."
        )


def empty_like_described(model: "PreTrainedModel", descriptions: Mapping[str, Mapping[str, object]]) -> None:
    """Replace linears of `model` by compressed ones of the given descriptions, on the meta device.

    Compressed models hold a linear for each expert and projection, be they compressed or not.

    Args:
        model: a whole model, one without its head, or one with another head.
        descriptions: by their name in the model with its head.

    Raises:
        ValueError: a description is damaged, or there is no such linear of the same sizes.
    """
    if descriptions:
        take_apart(model)
    for name, linear in empty_linears(descriptions).items():
        place = _place(model, name)
        dense = model.get_submodule(place)
        if not isinstance(dense, nn.Linear) or dense.weight.shape != (linear.out_features, linear.in_features):
            raise ValueError(
                f"Expected {name} to take the place of a linear of {linear.in_features} inputs and "
                f"{linear.out_features} outputs, but {type(model).__name__} has {dense}. The compressed linears do not "
                "belong to this config.json."
            )
        model.set_submodule(place, linear)
    untie(model)


def _place(model: "PreTrainedModel", name: str) -> str:
    """Return the name of a linear in a model, with or without the prefix of the model below the head.

    Raises:
        ValueError: there is none.
    """
    prefix = f"{model.base_model_prefix}."
    for place in (name, name.removeprefix(prefix), prefix + name):
        with suppress(AttributeError):
            model.get_submodule(place)
            return place
    raise ValueError(
        f"Expected {type(model).__name__} to have {name!r}, but it is not there. The compressed linears do not belong "
        "to this config.json."
    )
