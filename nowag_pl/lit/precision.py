"""The types in which a model's values are stored and trained, and the rounding between the two."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from nowag_pl.modules import CompressedLinear


class Types(NamedTuple):
    """Types of one parameter.

    Attributes:
        stored: type in files.
        held: type in a model that is not trained.
    """

    stored: torch.dtype
    held: torch.dtype


def check_precision(precision: str) -> None:
    """Refuse a precision of the Trainer that would change the type of the weights.

    Raises:
        ValueError: it would.
    """
    if (precision.endswith("-true") and precision != "32-true") or precision == "transformer-engine":
        raise ValueError(
            f"Expected trainer.precision of 32-true, bf16-mixed or 16-mixed, but got {precision}: the weights have "
            "the type of model.dtype."
        )


def widen(model: nn.Module, everything: bool) -> dict[str, Types]:
    """Hold trained parameters in float32; embeddings and head of a compressed model are not trained.

    Args:
        model: dense or compressed; it is changed.
        everything: hold the other parameters in float32 too, so that all of the model computes in one type.

    Returns:
        The types of all parameters, for :func:`narrow`.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, CompressedLinear)}
    stored = {f"{name}.{key}": dtype for name, linear in linears.items() for key, dtype in linear.stored_dtypes.items()}
    types = {}
    for name, parameter in model.named_parameters():
        types[name] = Types(stored.get(name, parameter.dtype), parameter.dtype)
        parameter.requires_grad_(not linears or name in stored or parameter.ndim < 2)
        if parameter.requires_grad or everything:
            parameter.data = parameter.data.float()
    return types


def narrow(model: nn.Module, types: Mapping[str, Types], sharded: bool) -> None:
    """Round trained parameters to the types in which they are stored, so that the saved model is the measured one.

    Args:
        model: the model; it is changed.
        types: result of :func:`widen`.
        sharded: keep the type of every parameter, as FSDP2 needs it, and round only the values.
    """
    for name, parameter in model.named_parameters():
        if name not in types:
            # Masks and codes of a sharded model.
            continue
        rounded = parameter.data.to(types[name].stored)
        if sharded:
            parameter.data.copy_(rounded)
        else:
            parameter.data = rounded.to(types[name].held)
