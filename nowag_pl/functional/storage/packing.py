"""Integers of any width in bytes, and N:M masks as the number of their combination.

Bits are little-endian: value i fills bits `i * bits` to `(i + 1) * bits - 1` of the byte string, lowest bit first.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import combinations
from math import ceil, comb

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from nowag_pl.functional import chunks
from nowag_pl.functional.patterns import check_row
from nowag_pl.kernels.bits import code_bits
from nowag_pl.kernels.dispatch import is_for_numba

# Eight values of b bits fill b bytes.
_SLOTS = 8
MAX_BITS = 24
# Wider groups are stored as plain bits.
MAX_TABLE_GROUP = 16


def pack(values: Int[Tensor, " n"] | UInt8[Tensor, " n"], bits: int) -> UInt8[Tensor, " bytes"]:
    """Pack integers into bytes.

    Args:
        values: integers in [0, 2^bits).
        bits: width of a value, 0 to 24.

    Returns:
        `ceil(n * bits / 8)` bytes.

    Raises:
        ValueError: `bits` is out of range, or a value does not fit.

    Example:
        >>> import torch
        >>> pack(torch.tensor([1, 2, 3]), bits=4).tolist()
        [33, 3]
    """
    _check_bits(bits)
    if len(values) and not 0 <= int(values.min()) <= int(values.max()) < 2**bits:
        raise ValueError(f"Expected values in [0, 2^{bits}), but got {int(values.min())} to {int(values.max())}.")
    return torch.cat([_pack_part(part, bits) for part in values.split(_part_size())])


def _pack_part(values: Tensor, bits: int) -> Tensor:
    """Pack some values, of which eight each fill whole bytes."""
    slots = torch.nn.functional.pad(values.to(torch.int32), (0, -len(values) % _SLOTS)).view(-1, _SLOTS)
    packed = torch.zeros(len(slots), bits, dtype=torch.int32, device=values.device)  # [n / 8, bits]
    for slot in range(_SLOTS if bits else 0):
        byte, shift = divmod(slot * bits, 8)
        word = slots[:, slot] << shift
        for offset in range(ceil((shift + bits) / 8)):
            packed[:, byte + offset] |= (word >> (8 * offset)) & 0xFF
    return packed.to(torch.uint8).flatten()[: ceil(len(values) * bits / 8)]


def unpack(packed: UInt8[Tensor, " bytes"], bits: int, count: int) -> Int[Tensor, " n"]:
    """Undo :func:`pack`.

    Args:
        packed: bytes.
        bits: width of a value.
        count: number of values.

    Returns:
        Integers `[count]`, int32.

    Raises:
        ValueError: `bits` is out of range, or the number of bytes does not belong to `count` values.
    """
    values = torch.empty(count, dtype=torch.int32, device=packed.device)
    for places, part in _unpacked_parts(packed, bits, count):
        values[places] = part
    return values


def _unpacked_parts(
    packed: Tensor, bits: int, count: int, weights_per_value: int = 1
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the places and values of one part after the other."""
    _check_bits(bits)
    if len(packed) != ceil(count * bits / 8):
        raise ValueError(
            f"Expected {ceil(count * bits / 8)} bytes for {count} values of {bits} bits, but got {len(packed)}."
        )
    size = _part_size(weights_per_value)
    for start in range(0, count, size):
        part = packed[start * bits // 8 : (start + size) * bits // 8]
        yield slice(start, start + size), _unpack_part(part, bits, min(size, count - start))


def _unpack_part(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undo :func:`_pack_part`."""
    rows = ceil(count / _SLOTS)
    values = torch.zeros(rows, _SLOTS, dtype=torch.int32, device=packed.device)
    table = torch.nn.functional.pad(packed, (0, rows * bits - len(packed))).view(rows, bits)
    columns = table.to(torch.int32).unbind(dim=1)
    for slot in range(_SLOTS if bits else 0):
        byte, shift = divmod(slot * bits, 8)
        word = columns[byte]
        for offset in range(1, ceil((shift + bits) / 8)):
            word = word | (columns[byte + offset] << (8 * offset))
        values[:, slot] = (word >> shift) & (2**bits - 1)
    return values.flatten()[:count]


def pattern_bits(pattern: tuple[int, int]) -> int:
    """Return the bits for the mask of N kept of M weights: `ceil(log2(C(M, N)))`, or M for groups over 16.

    Example:
        >>> pattern_bits((2, 4)), pattern_bits((4, 8)), pattern_bits((1, 4))
        (3, 7, 2)
    """
    num_kept, group_size = pattern
    return group_size if group_size > MAX_TABLE_GROUP else code_bits(comb(group_size, num_kept))


def pack_keep(keep: Bool[Tensor, "out in"], pattern: tuple[int, int] | None = None) -> UInt8[Tensor, " bytes"]:
    """Pack a mask: one bit per weight, or :func:`pattern_bits` per group of an N:M pattern.

    Args:
        keep: mask, True where a weight is kept.
        pattern: (N, M) if the mask has exactly N kept in every M weights.

    Raises:
        ValueError: the mask does not follow the pattern, or M does not divide its rows.
    """
    if pattern is None:
        return _pack_flags(keep)
    check_row(keep.shape[1], pattern)
    packed = _pack_groups(keep.reshape(-1, pattern[1]), pattern)
    if packed is None:
        raise ValueError(f"Expected a mask with {pattern[0]} kept of every {pattern[1]} weights.")
    return packed


def _pack_flags(keep: Tensor) -> Tensor:
    """Pack a mask of any shape, one bit per weight."""
    if keep.device.type == "cpu":
        return torch.from_numpy(np.packbits(keep.flatten().numpy(), bitorder="little"))
    return pack(keep.flatten().view(torch.uint8), bits=1)


def _pack_groups(groups: Tensor, pattern: tuple[int, int]) -> Tensor | None:
    """Pack a mask `[groups, M]`; None if a group does not follow the pattern."""
    parts, bits = groups.split(_part_size(pattern[1])), pattern_bits(pattern)
    if pattern[1] > MAX_TABLE_GROUP:
        follows = all((part.sum(dim=1) == pattern[0]).all() for part in parts)
        return _pack_flags(groups) if follows else None
    number_of = _pattern_tables(pattern)[1].to(groups.device)
    if is_for_numba(groups.device, groups.numel()):
        from nowag_pl.kernels.cpu.pruning import pack_numbers

        return pack_numbers(groups, number_of, bits)
    powers = 2 ** torch.arange(pattern[1], device=groups.device)
    packed = []
    for part in parts:
        numbers = number_of[(part * powers).sum(dim=1)]
        if (numbers < 0).any():
            return None
        packed.append(_pack_part(numbers, bits))
    return torch.cat(packed)


def unpack_keep(
    packed: UInt8[Tensor, " bytes"], shape: tuple[int, int], pattern: tuple[int, int] | None = None
) -> Bool[Tensor, "out in"]:
    """Undo :func:`pack_keep`.

    Args:
        packed: bytes.
        shape: (out, in).
        pattern: as given to :func:`pack_keep`.

    Raises:
        ValueError: the number of bytes does not belong to the shape, or M does not divide the rows.
    """
    count = shape[0] * shape[1]
    if pattern is not None:
        check_row(shape[1], pattern)
    keep = torch.empty(shape, dtype=torch.bool, device=packed.device)
    if pattern is None or pattern[1] > MAX_TABLE_GROUP:
        weights = keep.view(-1)
        for places, bits in _unpacked_parts(packed, 1, count):
            weights[places] = bits.bool()
        return keep
    masks, groups = _pattern_tables(pattern)[0].to(packed.device), keep.view(-1, pattern[1])
    for places, numbers in _unpacked_parts(packed, pattern_bits(pattern), len(groups), pattern[1]):
        groups[places] = masks[numbers]
    return keep


def check_packed(packed: UInt8[Tensor, " bytes"], num_codes: int, count: int) -> None:
    """Check packed codes that were read from a file.

    Args:
        packed: bytes.
        num_codes: values are below it.
        count: number of values.

    Raises:
        ValueError: a value is too large, or the number of bytes is another.
    """
    bits = code_bits(num_codes)
    if len(packed) != ceil(count * bits / 8):
        raise ValueError(f"Expected {ceil(count * bits / 8)} bytes of codes, but got {len(packed)}.")
    # Where all values of so many bits are codes, there is nothing to read.
    if num_codes < 2**bits:
        largest = max((int(part.max()) for _, part in _unpacked_parts(packed, bits, count)), default=0)
        if largest >= num_codes:
            raise ValueError(f"Expected codes in [0, {num_codes}), but got {largest}.")


def check_keep(
    packed: UInt8[Tensor, " bytes"], shape: tuple[int, int], num_kept: int, pattern: tuple[int, int] | None = None
) -> None:
    """Check a packed mask that was read from a file.

    Args:
        packed: bytes.
        shape: (out, in).
        num_kept: weights that are kept.
        pattern: as given to :func:`pack_keep`.

    Raises:
        ValueError: the mask keeps another number of weights, or does not follow the pattern.
    """
    count = shape[0] * shape[1]
    if pattern is not None and pattern[1] <= MAX_TABLE_GROUP:
        return check_packed(packed, comb(pattern[1], pattern[0]), count // pattern[1])
    if len(packed) != ceil(count / 8):
        raise ValueError(f"Expected a mask of {ceil(count / 8)} bytes, but got {len(packed)}.")
    ones = torch.tensor([number.bit_count() for number in range(256)], device=packed.device)
    found = sum(int(ones[part.int()].sum()) for part in packed.split(_part_size()))
    if found != num_kept:
        raise ValueError(f"Expected a mask that keeps {num_kept} weights, but it keeps {found}.")
    if pattern is not None and not (unpack_keep(packed, shape).view(-1, pattern[1]).sum(dim=1) == pattern[0]).all():
        raise ValueError(f"Expected a mask with {pattern[0]} kept of every {pattern[1]} weights.")


@lru_cache
def _pattern_tables(pattern: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return masks `[C(M, N), M]` in lexicographic order, and by its bits `[2^M]` the number of a mask, or -1."""
    num_kept, group_size = pattern
    kept = torch.tensor(list(combinations(range(group_size), num_kept)))  # [C, N]
    masks = torch.zeros(len(kept), group_size, dtype=torch.bool).scatter_(1, kept, True)
    number_of = torch.full((2**group_size,), -1)
    number_of[(masks * 2 ** torch.arange(group_size)).sum(dim=1)] = torch.arange(len(masks))
    return masks, number_of


def _part_size(weights_per_value: int = 1) -> int:
    """Return the number of values to pack at a time; their bits fill whole bytes."""
    return max(chunks.CHUNK_ELEMENTS // weights_per_value // _SLOTS, 1) * _SLOTS


def _check_bits(bits: int) -> None:
    if not 0 <= bits <= MAX_BITS:
        raise ValueError(f"Expected bits in [0, {MAX_BITS}], but got {bits}.")
