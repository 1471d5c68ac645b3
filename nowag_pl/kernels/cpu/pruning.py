"""Masks of large matrices on a CPU, compiled by Numba when they are first used; each loop reads its input once."""

from collections.abc import Callable
from functools import lru_cache
from typing import no_type_check

import numba
import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from torch import Tensor

from nowag_pl.kernels.bits import INTEGERS
from nowag_pl.kernels.cpu.threads import in_threads

# Weights that stay in the caches of a core.
_BLOCK = 2**14
# Integers that hold the mask of a group, a byte for each weight.
_WORDS = {4: np.uint32, 8: np.uint64}
GROUP_SIZES = tuple(_WORDS)
_compiled = numba.njit(nogil=True)


def mark_groups(scores: Float[Tensor, "out in"], num_kept: int, size: int) -> Bool[Tensor, "out in"]:
    """Return which are the N largest of every M scores of a row; of equal ones, the first.

    Args:
        scores: float32.
        num_kept: N.
        size: M, 4 or 8.
    """
    keep = torch.empty(scores.shape, dtype=torch.bool)
    values, words = scores.flatten().numpy(), keep.view(-1).numpy().view(_WORDS[size])
    mark = _group_kernel(num_kept, size)
    in_threads(lambda first, last: mark(values[first * size : last * size], words[first:last]), 0, len(words))
    return keep


def pick(values: Shaped[Tensor, " n"], keep: Bool[Tensor, " n"]) -> Shaped[Tensor, " num_kept"]:
    """Return the values that a mask keeps.

    Args:
        values: of any type of 2, 4 or 8 bytes.
        keep: mask, True where a value is kept.
    """
    mask, num_blocks = keep.numpy(), -(-len(keep) // _BLOCK)
    counts = [int(np.count_nonzero(mask[start : start + _BLOCK])) for start in range(0, len(mask), _BLOCK)]
    ends = np.cumsum([0, *counts], dtype=np.uint64)
    picked = values.new_empty(int(ends[-1]))
    arrays = [tensor.view(INTEGERS[values.itemsize]).numpy() for tensor in (values, picked)]
    in_threads(lambda first, last: _pick(first, last, *arrays, mask, ends), 0, num_blocks)
    return picked


def pack_numbers(
    keep: Bool[Tensor, "groups m"], number_of: Int[Tensor, " masks"], bits: int
) -> UInt8[Tensor, " bytes"] | None:
    """Return the numbers of all groups' masks, each with as many bits; None if one has no number.

    Args:
        keep: mask in groups of at most 16 weights.
        number_of: number of each mask by its bits, -1 where it has none.
        bits: width of a number, 1 to 16.
    """
    packed = torch.empty(-(-len(keep) * bits // 8), dtype=torch.uint8)
    pack, arrays = _pack_kernel(keep.shape[1], bits), (keep.numpy(), number_of.numpy(), packed.numpy())
    # Eight numbers fill whole bytes.
    num_octets = -(-len(keep) // 8)
    complete = in_threads(lambda first, last: pack(first, last, *arrays), 0, num_octets)
    return packed if all(complete) else None


@_compiled
@no_type_check  # Numba compiles plain functions
def _pick(first: int, last: int, values: np.ndarray, picked: np.ndarray, keep: np.ndarray, ends: np.ndarray) -> None:
    """Write the kept values of some blocks."""
    place, written, stop = np.uint64(first * _BLOCK), ends[first], ends[last]
    while written < stop:
        # Without a branch: the next value takes the place of one that is not kept.
        picked[written] = values[place]
        written += np.uint64(keep[place])
        place += np.uint64(1)


@lru_cache
@no_type_check
def _group_kernel(num_kept: int, size: int) -> Callable[..., None]:
    integer = _WORDS[size]

    @_compiled
    def mark(scores: np.ndarray, words: np.ndarray) -> None:
        """Count for each score of a group those that go before it, and itself."""
        for group in range(len(words)):
            word = integer(0)
            for j in range(size):
                rank = integer(0)
                for i in range(size):
                    score, other = scores[group * size + j], scores[group * size + i]
                    rank += integer(other > score) if i > j else integer(other >= score)
                word |= integer(rank <= integer(num_kept)) << integer(8 * j)
            words[group] = word

    return mark


@lru_cache
@no_type_check
def _pack_kernel(size: int, bits: int) -> Callable[..., bool]:
    @_compiled
    def pack(first: int, last: int, keep: np.ndarray, number_of: np.ndarray, packed: np.ndarray) -> bool:
        """Write the bytes of some octets of groups; return whether all have a number."""
        least = 0
        for octet in range(first, last):
            byte, word, filled = octet * bits, 0, 0
            for group in range(octet * 8, min(octet * 8 + 8, len(keep))):
                mask = 0
                for j in range(size):
                    mask |= keep[group, j] << j
                number = number_of[mask]
                least = min(least, number)
                word |= number << filled
                filled += bits
                while filled >= 8:
                    packed[byte] = word & 255
                    word >>= 8
                    filled -= 8
                    byte += 1
            if filled:
                packed[byte] = word & 255
        return least == 0

    return pack
