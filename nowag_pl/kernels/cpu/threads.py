"""Loops that Numba or NumPy compiled, on as many threads as PyTorch uses: they run without the interpreter's lock."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import TypeVar

import torch

Result = TypeVar("Result")

# Codes that are looked up by one thread in the time that another one takes to wake up.
MIN_CODES = 2**16


def in_threads(work: Callable[[int, int], Result], start: int, stop: int) -> list[Result]:
    """Cut a range into as many pieces as there are threads, and return the result of the work on each.

    Args:
        work: is given where its piece starts and stops.
        start: start of the range.
        stop: its end, greater than start.
    """
    num_threads = min(torch.get_num_threads(), stop - start)
    if num_threads == 1:
        return [work(start, stop)]
    bounds = [start + (stop - start) * number // num_threads for number in range(num_threads + 1)]
    first, *others = pairwise(bounds)
    submitted = [_pool(num_threads - 1, os.getpid()).submit(work, *each) for each in others]
    # The calling thread works too: it need not be woken.
    return [work(*first), *(each.result() for each in submitted)]


@lru_cache(maxsize=1)
def _pool(num_threads: int, process: int) -> ThreadPoolExecutor:
    """Return threads, which a forked process does not inherit."""
    return ThreadPoolExecutor(num_threads, thread_name_prefix=f"nowag_pl-{process}")
