"""Tensors of a model with compressed linears, as they are stored."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from nowag_pl.modules import CompressedLinear


def compressed_linears(module: nn.Module) -> dict[str, CompressedLinear]:
    """Return the compressed linears of a module by name."""
    return {name: linear for name, linear in module.named_modules() if isinstance(linear, CompressedLinear)}


def stored_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the state of a module, that of compressed linears in the types in which it is stored."""
    state = dict(module.state_dict())
    for name, linear in compressed_linears(module).items():
        state |= {f"{name}.{key}": tensor for key, tensor in linear.storage().items()}
    return state


def packed_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield what :func:`stored_state` returns, a tensor at a time, and tied ones once."""
    yield from plain_tensors(module)
    for name, linear in compressed_linears(module).items():
        yield from ((f"{name}.{key}", tensor) for key, tensor in linear.storage().items())


@torch.no_grad()
def dense_tensors(module: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield the state of a module as if its compressed linears were ordinary ones, reconstructed one at a time.

    Args:
        module: a block or a model.
        dtype: type of the reconstructed weights.
    """
    yield from plain_tensors(module)
    for name, linear in compressed_linears(module).items():
        yield f"{name}.weight", linear.weight.to(dtype)
        if linear.bias is not None:
            yield f"{name}.bias", linear.bias.to(dtype)


def plain_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the state outside of compressed linears; of tensors that share their memory only the first."""
    inside = tuple(f"{name}." for name in compressed_linears(module))
    seen = set()
    for name, tensor in module.state_dict().items():
        place = (tensor.data_ptr() or id(tensor), tensor.shape)
        if not name.startswith(inside) and place not in seen:
            seen.add(place)
            yield name, tensor
