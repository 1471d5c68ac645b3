"""Products with a vector-quantized weight on a CPU from whole codes, column by column, compiled by Numba.

A column holds the codes of all rows for one group of inputs in one or two bytes each, and so a little more memory than
packed codes. It pays for one token and a few: a group's table of products stays in the first cache while all rows look
into it, and no bits are cut.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import no_type_check

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from nowag_pl.kernels.cpu.threads import MIN_CODES, in_threads
from nowag_pl.kernels.cpu.vq import (
    as_integers,
    compiled,
    max_block_groups,
    product_kernel,
)

# Columns read at a time, and no more: values that are a row apart displace each other from the cache.
_COPIED_GROUPS = 16


def multiply_columns(
    tokens: Float[Tensor, "tokens in"],
    columns: Integer[Tensor, "groups out"],
    chunks: Float[Tensor, "chunks d n"],
    in_scale: Float[Tensor, " in"],
    out_scale: Float[Tensor, " out"],
) -> Float[Tensor, "tokens out"]:
    """Return the products `y_ti = r2_i sum_g c[code_gi] . (r1 x_t)_g`.

    Each thread takes some of the groups.

    Args:
        tokens: activations x, float32.
        columns: codes, of any unsigned type.
        chunks: codewords c, result of :func:`~nowag_pl.kernels.cpu.vq.codeword_chunks`.
        in_scale: r1, float32.
        out_scale: r2, float32.
    """
    codes, codewords, dim = columns.numpy(), chunks.numpy(), chunks.shape[1]
    values = scaled_groups(tokens.numpy(), in_scale.numpy(), len(codes), dim, dim)
    num_codewords = codewords.shape[0] * codewords.shape[2]
    block_size = max_block_groups(num_codewords)
    multiply = product_kernel(codewords.shape[1])

    def share(first: int, last: int) -> np.ndarray:
        sums = np.zeros((len(values), codes.shape[1]), np.float32)
        products = np.empty((block_size + 1, num_codewords), np.float32)
        for block in range(first, last, block_size):
            stop = min(block + block_size, last)
            for token in range(len(values)):
                multiply(values[token], codewords, block, stop, products)
                # The pair of the last group, if it has no other.
                products[stop - block] = 0
                _add_lookups(codes, block, stop, products, sums[token])
        return sums

    if codes.size < 2 * MIN_CODES:
        return torch.from_numpy(share(0, len(codes))).mul_(out_scale)
    return torch.from_numpy(np.sum(in_threads(share, 0, len(codes)), axis=0, dtype=np.float32)).mul_(out_scale)


def decode_columns(
    columns: Integer[Tensor, "groups out"],
    codebook: Float[Tensor, "k d"],
    start: int,
    out: Float[Tensor, "rows groups*d"],
) -> None:
    """Write the codewords of some rows from `start` on.

    Args:
        columns: codes, of any unsigned type.
        codebook: codewords of any type of at least 16 bits, contiguous.
        start: number of the first row.
        out: where they go, `groups * d` wide; contiguous, of the type of the codebook.
    """
    codewords, copies = as_integers(codebook, out)
    codes, copy = columns.numpy(), _copy_kernel(codewords.shape[1])
    in_threads(lambda first, last: copy(codes, start, first, last, codewords, copies, _COPIED_GROUPS), 0, len(out))


@compiled
@no_type_check  # Numba compiles plain functions
def scaled_groups(tokens: np.ndarray, in_scale: np.ndarray, num_groups: int, dim: int, width: int) -> np.ndarray:
    """Return the scaled inputs of tokens in groups of `dim`, `[tokens, groups, width]`, filled up with zeros."""
    groups = np.zeros((len(tokens), num_groups, width), np.float32)
    for token in range(len(tokens)):
        for group in range(num_groups):
            start = group * dim
            for place in range(min(dim, len(in_scale) - start)):
                groups[token, group, place] = tokens[token, start + place] * in_scale[start + place]
    return groups


@compiled
@no_type_check  # Numba compiles plain functions
def _add_lookups(codes: np.ndarray, first: int, last: int, products: np.ndarray, sums: np.ndarray) -> None:
    """Add to the sums of all rows the products of two groups at a time."""
    for group in range(first, last, 2):
        even, odd = products[group - first], products[group - first + 1]
        even_codes, odd_codes = codes[group], codes[min(group + 1, last - 1)]
        for row in range(len(sums)):
            sums[row] += even[even_codes[row]] + odd[odd_codes[row]]


@lru_cache
@no_type_check
def _copy_kernel(width: int) -> Callable[..., None]:
    @compiled
    def copy(
        codes: np.ndarray,
        start: int,
        first: int,
        last: int,
        codewords: np.ndarray,
        copies: np.ndarray,
        block_size: int,
    ) -> None:
        """Copy the codewords, of `width` integers each, of some rows."""
        for block in range(0, len(codes), block_size):
            stop = min(block + block_size, len(codes))
            for row in range(first, last):
                for group in range(block, stop):
                    code = codes[group, start + row]
                    for place in range(width):
                        copies[row, group * width + place] = codewords[code, place]

    return copy
