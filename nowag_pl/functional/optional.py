"""Packages that make some computations faster and may be missing."""

import logging
from functools import lru_cache
from importlib.util import find_spec

_log = logging.getLogger(__name__)


@lru_cache
def has_module(name: str) -> bool:
    """Tell whether a package that makes this faster is installed; if not, say once how to get it.

    Args:
        name: "numba" or "triton".
    """
    found = find_spec(name) is not None
    if not found:
        extra = "pip install triton" if name == "triton" else "pip install 'nowag_pl[cpu]'"
        _log.warning("%s is not installed: compression and vector-quantized linears run more slowly (%s)", name, extra)
    return found
