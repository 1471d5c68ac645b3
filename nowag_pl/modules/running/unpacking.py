"""Unpack the weights of a compressed model once, where memory allows."""

import logging
from collections import Counter
from collections.abc import Iterable

import torch
from torch import nn

from nowag_pl.modules.compressed.base import CompressedLinear
from nowag_pl.modules.running.base import RunningLinear

# The rest is for activations and for the cache of keys and values.
_SHARE_OF_FREE_MEMORY = 0.8

_log = logging.getLogger(__name__)


def unpack_linears(model: nn.Module, dtype: torch.dtype) -> bool:
    """Keep the reconstructed weights of all compressed linears in memory, so that they run as dense ones do.

    Args:
        model: any module with compressed linears inside, on its device.
        dtype: type of the activations.

    Returns:
        Whether there is memory for it. If not, the log says so, and the linears stay as they are.
    """
    linears = [each for each in model.modules() if isinstance(each, CompressedLinear)]
    shortage = shortage_of_memory(linears, dtype)
    if shortage:
        _log.warning("linears stay packed, and run more slowly than dense ones: %s", shortage)
        return False
    for linear in _packed(linears):
        linear.unpack(dtype)
    return True


def shortage_of_memory(linears: Iterable[CompressedLinear], dtype: torch.dtype) -> str | None:
    """Return why linears cannot be unpacked, or None if they can.

    Args:
        linears: those of a model; some may be unpacked, in their running form or on disk.
        dtype: type of the unpacked weights.
    """
    needed: Counter[torch.device] = Counter()
    for linear in _packed(linears):
        needed[_device(linear)] += linear.in_features * linear.out_features * dtype.itemsize
    for device, num_bytes in needed.items():
        free = _SHARE_OF_FREE_MEMORY * _free_bytes(device)
        if num_bytes > free:
            gib = [round(each / 2**30, 1) for each in (num_bytes, free)]
            return f"dense weights take {gib[0]} GiB on {device}, and {gib[1]} GiB may be used"
    return None


def _packed(linears: Iterable[CompressedLinear]) -> list[CompressedLinear]:
    """Return the linears that can be unpacked: neither in a running form, nor unpacked already, nor on disk."""
    return [
        linear
        for linear in linears
        if not (isinstance(linear, RunningLinear) or linear.is_unpacked or _device(linear).type == "meta")
    ]


def _device(linear: CompressedLinear) -> torch.device:
    return next(iter(linear.state_dict().values())).device


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    # Imported here, as reading a model's configuration needs it as little as the rest of this package.
    import psutil

    return psutil.virtual_memory().available
