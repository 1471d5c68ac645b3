"""The state of models with compressed linears: what is stored of them, and in which types it is held."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from nowag_pl.models.compressed_head import head_name, tied_embedding
from nowag_pl.modules import CompressedLinear


def compressed_linears(module: nn.Module) -> dict[str, CompressedLinear]:
    """Return the compressed linears of a module by name; a compressed linear has itself, by the name ""."""
    return {name: linear for name, linear in module.named_modules() if isinstance(linear, CompressedLinear)}


def stored_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the state of a module, that of compressed linears in the types in which it is stored."""
    state = dict(module.state_dict())
    for name, linear in compressed_linears(module).items():
        state |= {f"{name}.{key}": tensor for key, tensor in linear.storage().items()}
    return state


def held_state(module: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return stored tensors in the types in which a module holds them.

    Args:
        module: the module, perhaps on the meta device, its compressed linears in place.
        tensors: some of its state, by name.
        dtype: floating type of all that is neither compressed nor a buffer; None: as stored.
    """
    inside = tuple(f"{name}." if name else "" for name in compressed_linears(module))
    buffers = {name for name, _ in module.named_buffers()}
    own, held = module.state_dict(), {}
    for name, tensor in tensors.items():
        keeps = name in buffers or (name.startswith(inside) and name in own)
        wanted = own[name].dtype if keeps else dtype
        held[name] = tensor.to(wanted or tensor.dtype) if tensor.is_floating_point() else tensor
    return held


def check_linears(module: nn.Module, prefix: str = "") -> None:
    """Check the values of compressed linears that were loaded, but for those that are not in memory.

    Args:
        module: a block or a model.
        prefix: what stands before the names of its linears in messages.

    Raises:
        ValueError: a value is damaged; the linear is named.
    """
    for name, linear in compressed_linears(module).items():
        if any(tensor.is_meta for tensor in linear.state_dict().values()):
            continue
        try:
            linear.check()
        except ValueError as error:
            raise ValueError(f"{prefix}{name} is damaged: {error}") from error


def plain_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the state outside of compressed linears; of tensors that share their memory only the first.

    Embeddings that a compressed head gives are left out.
    """
    inside = tuple(f"{name}." for name in compressed_linears(module))
    seen, given = set(), tied_embedding(module)
    for name, tensor in module.state_dict().items():
        place = (tensor.data_ptr() or id(tensor), tensor.shape)
        if not name.startswith(inside) and place not in seen and name != given:
            seen.add(place)
            yield name, tensor


def packed_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield what :func:`stored_state` returns, a tensor at a time, and tied ones once; and guards.

    A guard is an empty weight of a compressed linear. A program that does not know the format, and would start with
    random weights, refuses to load a weight of this shape.
    """
    yield from plain_tensors(module)
    for name, linear in compressed_linears(module).items():
        yield from ((f"{name}.{key}", tensor) for key, tensor in linear.storage().items())
        yield guard_of(name), torch.empty(0, dtype=torch.uint8)


def guard_of(name: str) -> str:
    """Return the name of the guard that the compressed linear of a name may have in a file."""
    return f"{name}.weight"


@torch.no_grad()
def dense_tensors(module: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield the state of a module as if its compressed linears were ordinary ones, reconstructed one at a time.

    Args:
        module: a block or a model.
        dtype: type of the reconstructed weights.
    """
    yield from plain_tensors(module)
    given, head = tied_embedding(module), head_name(module)
    for name, linear in compressed_linears(module).items():
        # Programs look for a matrix that is both among the embeddings.
        yield given if given and name == head else f"{name}.weight", linear.weight.to(dtype)
        if linear.bias is not None:
            yield f"{name}.bias", linear.bias.to(dtype)
