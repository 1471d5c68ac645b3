"""Packages that make some computations faster and may be missing."""

import logging
from functools import lru_cache
from importlib.util import find_spec

from torch import Tensor

NUMBA_MIN_ELEMENTS = 2**20  # of a matrix, above which compiling pays off

_log = logging.getLogger(__name__)


@lru_cache
def has_module(name: str) -> bool:
    """Tell whether a package that makes this faster is installed; if not, say once how to get it.

    Args:
        name: "numba" or "triton".
    """
    found = find_spec(name) is not None
    if not found:
        extra = "pip install triton" if name == "triton" else "pip install numba"
        _log.warning("%s is not installed: compression and vector-quantized linears run more slowly (%s)", name, extra)
    return found


def is_for_numba(matrix: Tensor) -> bool:
    """Tell whether a matrix is to be worked on by compiled loops: it is on a CPU, large, and Numba is there.

    Args:
        matrix: of any type.
    """
    return matrix.device.type == "cpu" and matrix.numel() >= NUMBA_MIN_ELEMENTS and has_module("numba")
