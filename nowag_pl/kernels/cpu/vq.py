"""The inner loops of products with a vector-quantized weight on a CPU, compiled by Numba when they are first used.

Numba is optional and needs no compiler. The loops are bound by how fast packed codes can be cut, so that they are
compiled for each width of a code. They run without the interpreter's lock, on as many threads as PyTorch uses.

Values are little-endian bits (:mod:`nowag_pl.functional.storage.packing`): 64 bits from the first bit of a value
on, its window, hold `64 // bits` values.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple, no_type_check

import numba
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from nowag_pl.kernels.bits import INTEGERS, code_bits
from nowag_pl.kernels.cpu.threads import in_threads

# Products at a time, so that they stay in the cache of a core.
_BLOCK_BYTES = 2**20
_MAX_BLOCK_GROUPS = 128
# Codewords that stay in the first cache while they meet a block of groups.
_CHUNK = 512
_LANES = 16
# Rows whose windows are cut together.
_TILE_ROWS = 64
compiled = numba.njit(nogil=True, fastmath=True, error_model="numpy")


class _Part(NamedTuple):
    """Some values of a packed string."""

    words: np.ndarray  # uint64 [n]; one follows each word in which a value of this part starts
    first_bit: int  # where the words start in the string
    start: int
    stop: int


def sum_lookups(
    codes: UInt8[Tensor, " bytes"], codebook: Float[Tensor, "k d"], groups: Float[Tensor, "groups d"], num_rows: int
) -> Float[Tensor, " out"]:
    """Return the sums `y_i = sum_g c[code_ig] . x_g`.

    Each thread takes some of the groups: the products of a block of them with all codewords, then these of all rows.

    Args:
        codes: packed codes of all rows.
        codebook: codewords c, float32.
        groups: activations x, float32.
        num_rows: rows of the weight.
    """
    bits, num_groups = code_bits(len(codebook)), len(groups)
    per_window = 64 // bits
    parts = list(_parts(codes.numpy(), bits, 0, num_rows, num_groups))
    block_size = max_block_groups(len(codebook)) // per_window * per_window or per_window
    columns = codeword_chunks(codebook).numpy()
    values = groups.detach().numpy()
    multiply, add_lookups = product_kernel(codebook.shape[1]), _lookup_kernel(bits)

    def share(first: int, last: int) -> np.ndarray:
        sums = np.zeros(num_rows, np.float32)
        products = np.empty((block_size, len(codebook)), np.float32)
        for block in range(first, last, block_size):
            size = min(block_size, last - block)
            multiply(values, columns, block, block + size, products)
            windows = np.empty((_TILE_ROWS, -(-size // per_window)), np.uint64)
            # The last window reaches into the next groups.
            products[size : windows.shape[1] * per_window] = 0
            for part in parts:
                add_lookups(*part, num_groups, block, products, windows, sums)
        return sums

    return torch.from_numpy(np.sum(in_threads(share, 0, num_groups), axis=0, dtype=np.float32))


def max_block_groups(num_codewords: int) -> int:
    """Return the number of groups whose products with all codewords are held at a time."""
    return min(max(_BLOCK_BYTES // (4 * num_codewords), 8), _MAX_BLOCK_GROUPS)


def codeword_chunks(codebook: Float[Tensor, "k d"]) -> Float[Tensor, "chunks d n"]:
    """Return some hundred codewords at a time, by columns, filled up with zeros."""
    size = min(_CHUNK, -(-len(codebook) // _LANES) * _LANES)
    padded = F.pad(codebook.detach(), (0, 0, 0, -len(codebook) % size))
    return padded.view(-1, size, codebook.shape[1]).transpose(1, 2).contiguous()


def decode(
    codes: UInt8[Tensor, " bytes"], codebook: Float[Tensor, "k d"], start: int, out: Float[Tensor, "n d"]
) -> None:
    """Write the codewords of `n` codes from `start` on.

    Args:
        codes: packed codes.
        codebook: codewords of any type of at least 16 bits, contiguous.
        start: number of the first code.
        out: where they go; contiguous, of the type of the codebook.
    """
    bits, (codewords, copies) = code_bits(len(codebook)), as_integers(codebook, out)
    copy = _copy_kernel(bits, codewords.shape[1])

    def share(first: int, last: int) -> None:
        for part in _parts(codes.numpy(), bits, first, last):
            copy(*part, codewords, copies[part.start - start :])

    in_threads(share, start, start + len(out))


def as_integers(codebook: Float[Tensor, "k d"], out: Float[Tensor, "rows width"]) -> tuple[np.ndarray, np.ndarray]:
    """Return views of codewords and of where they go in the widest integers that fill a codeword."""
    integer = INTEGERS[max(size for size in INTEGERS if codebook[0].nbytes % size == 0)]
    return codebook.detach().view(integer).numpy(), out.view(integer).numpy()


def _parts(codes: np.ndarray, bits: int, start: int, stop: int, length: int = 1) -> Iterator[_Part]:
    """Yield rows of `length` values in at most two parts: the last words end beyond the string, and are copied."""
    num_words = len(codes) // 8
    safe = min(max((num_words - 1) * 64 // (bits * length), start), stop)
    if start < safe:
        yield _Part(codes[: num_words * 8].view(np.uint64), 0, start, safe)
    if safe < stop:
        first = safe * length * bits // 64
        rest = codes[first * 8 :]
        words = np.zeros(len(rest) // 8 + 2, np.uint64)
        words.view(np.uint8)[: len(rest)] = rest
        yield _Part(words, first * 64, safe, stop)


@compiled
@no_type_check  # Numba compiles plain functions
def _window(words: np.ndarray, bit: int) -> np.uint64:
    """Return 64 bits that start at any bit."""
    word, shift = np.uint64(bit) >> np.uint64(6), np.uint64(bit) & np.uint64(63)
    # In two steps, since a shift by 64 is undefined.
    above = (words[word + np.uint64(1)] << np.uint64(1)) << (np.uint64(63) - shift)
    return (words[word] >> shift) | above


@lru_cache
@no_type_check
def product_kernel(dim: int) -> Callable[..., None]:
    """Return a loop that multiplies groups of `dim` inputs by all codewords."""

    @compiled
    def multiply(values: np.ndarray, columns: np.ndarray, first: int, last: int, products: np.ndarray) -> None:
        """Write the products of some groups `[groups, d]` with all codewords, given by columns `[chunks, d, n]`."""
        size = columns.shape[2]
        for chunk in range(len(columns)):
            part = columns[chunk]
            for group in range(first, last):
                row, inputs = products[group - first][chunk * size : (chunk + 1) * size], values[group]
                for codeword in range(len(row)):
                    total = np.float32(0)
                    for column in range(dim):
                        total += inputs[column] * part[column, codeword]
                    row[codeword] = total

    return multiply


@lru_cache
@no_type_check
def _lookup_kernel(bits: int) -> Callable[..., None]:
    per_window, mask = 64 // bits, np.uint64(2**bits - 1)

    @compiled
    def add_lookups(
        words: np.ndarray,
        first_bit: int,
        start: int,
        stop: int,
        num_groups: int,
        first: int,
        products: np.ndarray,
        windows: np.ndarray,
        sums: np.ndarray,
    ) -> None:
        """Add to the sums of some rows the products of the groups from first on.

        The windows `[rows, n]` of some rows are cut before any is used: rows are far apart in memory, and so the
        processor waits for many of them at once.
        """
        num_tile_rows, num_windows = windows.shape
        for tile in range(start, stop, num_tile_rows):
            rows = min(num_tile_rows, stop - tile)
            for row in range(rows):
                bit = ((tile + row) * num_groups + first) * bits - first_bit
                for number in range(num_windows):
                    windows[row, number] = _window(words, bit + number * per_window * bits)
            for row in range(rows):
                total = np.float32(0)
                for number in range(num_windows):
                    window, group = windows[row, number], number * per_window
                    # Two sums do not wait for each other.
                    even, odd = np.float32(0), np.float32(0)
                    for slot in range(0, per_window - 1, 2):
                        even += products[group + slot, (window >> np.uint64(slot * bits)) & mask]
                        odd += products[group + slot + 1, (window >> np.uint64((slot + 1) * bits)) & mask]
                    if per_window % 2:
                        slot = per_window - 1
                        even += products[group + slot, (window >> np.uint64(slot * bits)) & mask]
                    total += even + odd
                sums[tile + row] += total

    return add_lookups


@lru_cache
@no_type_check
def _copy_kernel(bits: int, width: int) -> Callable[..., None]:
    per_window, mask = 64 // bits, np.uint64(2**bits - 1)

    @compiled
    def copy(
        words: np.ndarray, first_bit: int, start: int, stop: int, codewords: np.ndarray, copies: np.ndarray
    ) -> None:
        """Copy the codewords, of `width` integers each, of some codes."""
        count = stop - start
        whole = count // per_window * per_window
        for index in range(0, whole, per_window):
            window = _window(words, (start + index) * bits - first_bit)
            for slot in range(per_window):
                code = (window >> np.uint64(slot * bits)) & mask
                for column in range(width):
                    copies[index + slot, column] = codewords[code, column]
        for index in range(whole, count):
            code = _window(words, (start + index) * bits - first_bit) & mask
            for column in range(width):
                copies[index, column] = codewords[code, column]

    return copy
