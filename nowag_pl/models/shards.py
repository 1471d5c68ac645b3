"""A model of which every process holds a shard: it is made without weights, and each process reads its own rows only.

Parameters are FSDP2's: row ranges of equal length over a one-dimensional mesh of ranks, the last ones shorter or empty.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from nowag_pl.models.assembly import empty_like_described
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.streaming import find_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RowSource(Protocol):
    """Stored tensors of which rows can be read alone."""

    def __contains__(self, name: str) -> bool:
        """Tell whether there is a tensor of a name."""

    def read_rows(self, rows: Mapping[str, slice]) -> dict[str, Tensor]:
        """Read some rows of tensors, by their names in the model, in the type in which they are stored."""


def shell(checkpoint: Checkpoint, descriptions: Mapping[str, Mapping[str, object]]) -> "PreTrainedModel":
    """Return a model whose parameters, and the codes and masks of its compressed linears, take no memory.

    Args:
        checkpoint: its configuration.
        descriptions: of compressed linears by their name in the model.
    """
    model = checkpoint.build(empty=True)
    empty_like_described(model, descriptions)
    model.tie_weights()
    return model.eval()


def fill_shards(model: "PreTrainedModel", source: RowSource, device: torch.device) -> None:
    """Read this process's shards of a sharded model on the meta device, those of a block at a time.

    Args:
        model: its parameters are sharded, in the types in which they are to be held.
        source: where the rows come from.
        device: where the shards go.

    Raises:
        ValueError: the source lacks a tensor.
    """
    for names in _units(model):
        found = {name: next((each for each in equal if each in source), None) for name, equal in names.items()}
        if missing := [name for name, stored in found.items() if stored is None]:
            raise ValueError(f"Expected the stored model to hold {missing[0]!r}, but it is not there.")
        stored = {name: each for name, each in found.items() if each is not None}
        sharded = {name: cast(DTensor, model.get_parameter(name)) for name in names}
        tensors = source.read_rows({stored[name]: rows_of(each) for name, each in sharded.items()})
        for name, equal in names.items():
            filled = _filled(sharded[name], tensors.pop(stored[name]), device)
            # Tied weights stay one.
            for each in equal:
                module, _, key = each.rpartition(".")
                setattr(model.get_submodule(module), key, filled)


def _units(model: "PreTrainedModel") -> Iterator[dict[str, list[str]]]:
    """Yield the parameters of each block, then all others: all names of each by its first one."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    prefix = find_blocks(model)
    blocks: dict[str, dict[str, list[str]]] = {}
    for equal in names.values():
        inner = equal[0].removeprefix(f"{prefix}.")
        blocks.setdefault(inner.partition(".")[0] if inner != equal[0] else "", {})[equal[0]] = equal
    others = blocks.pop("", {})
    yield from blocks.values()
    yield others


def rows_of(tensor: DTensor) -> slice:
    """Return the rows of a sharded tensor that this process holds."""
    mesh = tensor.device_mesh
    each = -(-tensor.shape[0] // mesh.size())
    start = min(mesh.get_local_rank() * each, tensor.shape[0])
    return slice(start, min(start + each, tensor.shape[0]))


def _filled(sharded: DTensor, rows: Tensor, device: torch.device) -> nn.Parameter:
    """Return a parameter like a sharded one with these rows, in a place of the length that FSDP2 would pad them to."""
    mesh, shape = sharded.device_mesh, sharded.shape
    expected = sharded.to_local().shape
    if rows.shape != expected:
        raise ValueError(f"Expected {tuple(expected)} rows of a stored tensor, but got {tuple(rows.shape)}.")
    padded = torch.zeros(-(-shape[0] // mesh.size()), *shape[1:], dtype=sharded.dtype, device=device)
    padded[: len(rows)] = rows
    made = DTensor.from_local(
        padded[: len(rows)], mesh, [Shard(0)], run_check=False, shape=shape, stride=sharded.stride()
    )
    return nn.Parameter(made, requires_grad=sharded.requires_grad)


def local_rows(whole: Tensor, like: Tensor) -> Tensor:
    """Return the rows of a whole tensor that this process holds of one like it, which may be sharded."""
    return whole[rows_of(like)] if isinstance(like, DTensor) else whole


def local_part(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor, which may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def whole_state(module: nn.Module, keep: bool, without: str = "\0") -> dict[str, Tensor]:
    """Gather the parameters of a sharded module one after the other; every process must call it.

    Args:
        module: a block, or other part of a model.
        keep: whether this process wants them, in host memory; others get nothing.
        without: name of a module in it that is left out.
    """
    state = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if name.startswith(f"{without}."):
            continue
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if keep:
            state[name] = whole.detach().cpu()
    return state
