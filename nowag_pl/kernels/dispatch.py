"""Which computations run in compiled kernels: one rule of device, size and installed package."""

import logging
from functools import lru_cache
from importlib.util import find_spec
from typing import Literal

import torch

Work = Literal["elements", "distances", "codes"]

# Amounts of work from which compiling pays off: elements of a matrix, distances of one search, codes to look up.
PAYS_FROM: dict[Work, int] = {"elements": 2**20, "distances": 2**22, "codes": 1}

_log = logging.getLogger(__name__)


def is_for_numba(device: torch.device, amount: int, work: Work = "elements") -> bool:
    """Return whether a computation runs in loops compiled by Numba: on a CPU, if it is large and Numba is installed.

    Args:
        device: device of the tensors.
        amount: amount of work.
        work: unit of the amount.
    """
    return device.type == "cpu" and amount >= PAYS_FROM[work] and has_module("numba")


def is_for_triton(device: torch.device) -> bool:
    """Return whether a computation runs in Triton kernels: on CUDA, if Triton is installed.

    Args:
        device: device of the tensors.
    """
    return device.type == "cuda" and has_module("triton")


@lru_cache
def has_module(name: Literal["numba", "triton"]) -> bool:
    """Return whether a package of kernels is installed; if not, log once how to install it.

    Args:
        name: the package.
    """
    found = find_spec(name) is not None
    if not found:
        _log.warning(
            "%s is not installed: compression and vector-quantized linears run more slowly (pip install %s)", name, name
        )
    return found
