from itertools import combinations
from math import ceil, comb, log2

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nowag_pl.functional.storage.packing import (
    MAX_BITS,
    check_keep,
    check_packed,
    code_bits,
    pack,
    pack_keep,
    pattern_bits,
    unpack,
    unpack_keep,
)

PATTERNS = [(1, 4), (3, 4), (2, 4), (4, 8), (1, 1), (4, 4), (3, 5), (8, 16), (5, 20)]


def bit_string_bytes(values, bits):
    """Write the values one after another into one long integer, and that into bytes."""
    number = 0
    for i, value in enumerate(values):
        number |= value << (i * bits)
    return list(number.to_bytes(ceil(len(values) * bits / 8), "little"))


def random_keep(rows, num_groups, pattern, seed):
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.rand(rows, num_groups, pattern[1], generator=generator).argsort(dim=2)
    return (ranks < pattern[0]).view(rows, -1)


@given(data=st.data(), bits=st.integers(0, MAX_BITS), count=st.integers(0, 40))
def test_layout_and_round_trip(data, bits, count):
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count))
    tensor = torch.tensor(values, dtype=torch.int64)
    packed = pack(tensor, bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == bit_string_bytes(values, bits)
    assert unpack(packed, bits, count).tolist() == values
    assert tensor.tolist() == values


def test_largest_value_of_every_width():
    for bits in range(MAX_BITS + 1):
        values = [2**bits - 1, 0] * 5 + [2**bits - 1]
        packed = pack(torch.tensor(values), bits)
        assert packed.tolist() == bit_string_bytes(values, bits)
        assert unpack(packed, bits, len(values)).tolist() == values


def test_bits_are_the_rounded_up_logarithm_of_codes_and_of_combinations():
    for num_codes in (1, 2, 3, 6, 255, 256, 257, 4096, 4097):
        assert code_bits(num_codes) == ceil(log2(num_codes))
    for num_kept, size in PATTERNS:
        assert pattern_bits((num_kept, size)) == (size if size > 16 else ceil(log2(comb(size, num_kept))))


@given(rows=st.integers(1, 6), columns=st.integers(1, 11), seed=st.integers(0, 99))
def test_plain_mask_is_one_bit_per_weight(rows, columns, seed):
    keep = random_keep(rows, 1, (columns // 2, columns), seed)
    before = keep.clone()
    packed = pack_keep(keep)
    assert packed.tolist() == bit_string_bytes(keep.flatten().int().tolist(), 1)
    assert torch.equal(unpack_keep(packed, (rows, columns)), keep)
    assert torch.equal(keep, before)


@pytest.mark.parametrize("pattern", PATTERNS)
@given(rows=st.integers(1, 5), num_groups=st.integers(1, 5), seed=st.integers(0, 99))
def test_pattern_mask_is_the_number_of_its_combination(pattern, rows, num_groups, seed):
    num_kept, size = pattern
    keep = random_keep(rows, num_groups, pattern, seed)
    packed = pack_keep(keep, pattern)
    if size > 16:
        expected = bit_string_bytes(keep.flatten().int().tolist(), 1)
    else:
        numbers = {kept: number for number, kept in enumerate(combinations(range(size), num_kept))}
        groups = keep.view(-1, size).tolist()
        values = [numbers[tuple(j for j in range(size) if group[j])] for group in groups]
        expected = bit_string_bytes(values, ceil(log2(len(numbers))))
    assert packed.tolist() == expected
    assert torch.equal(unpack_keep(packed, (rows, num_groups * size), pattern), keep)


@pytest.mark.parametrize("bits", [-1, 25])
def test_bits_out_of_range_are_refused(bits):
    match = rf"Expected bits in \[0, 24\], but got {bits}"
    with pytest.raises(ValueError, match=match):
        pack(torch.tensor([0]), bits)
    with pytest.raises(ValueError, match=match):
        unpack(torch.zeros(1, dtype=torch.uint8), bits, 1)


@pytest.mark.parametrize(("value", "bits"), [(16, 4), (1, 0), (-1, 4), (2**40, 24)])
def test_value_that_does_not_fit_is_refused_and_named(value, bits):
    with pytest.raises(ValueError, match=rf"Expected values in \[0, 2\^{bits}\), but got.* {value}\b"):
        pack(torch.tensor([0, value]), bits)


@pytest.mark.parametrize(("num_bytes", "count"), [(2, 4), (4, 4), (0, 1)])
def test_wrong_number_of_bytes_is_refused(num_bytes, count):
    expected = ceil(count * 6 / 8)
    match = f"Expected {expected} bytes for {count} values of 6 bits, but got {num_bytes}"
    with pytest.raises(ValueError, match=match):
        unpack(torch.zeros(num_bytes, dtype=torch.uint8), 6, count)


@pytest.mark.parametrize("pattern", [None, (2, 4), (5, 20)])
def test_mask_of_another_shape_is_refused(pattern):
    packed = pack_keep(torch.tensor([[True, False] * 20]))
    with pytest.raises(ValueError, match=r"Expected .* bytes for .* values"):
        unpack_keep(packed, (2, 40), pattern)


@pytest.mark.parametrize("pattern", [(2, 4), (10, 20)])
@pytest.mark.parametrize("value", [True, False])
def test_mask_that_breaks_the_pattern_is_refused(pattern, value):
    keep = random_keep(2, 2, pattern, seed=0)
    keep[0] = value
    with pytest.raises(ValueError, match=f"{pattern[0]} kept of every {pattern[1]} weights"):
        pack_keep(keep, pattern)


def test_right_count_in_the_wrong_groups_is_refused():
    keep = torch.tensor([[True, True, True, False, True, False, False, False]])
    with pytest.raises(ValueError, match="2 kept of every 4 weights"):
        pack_keep(keep, (2, 4))


def test_mask_that_the_pattern_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"of every 4 weights|divisible by 4"):
        pack_keep(torch.ones(3, 6, dtype=torch.bool), (2, 4))


@given(num_codes=st.integers(1, 40), count=st.integers(0, 30), data=st.data())
def test_codes_pass_up_to_the_last_one(num_codes, count, data):
    bits = code_bits(num_codes)
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count))
    packed = pack(torch.tensor(values, dtype=torch.int64), bits)
    if max(values, default=0) < num_codes:
        check_packed(packed, num_codes, count)
    else:
        with pytest.raises(ValueError, match=rf"codes in \[0, {num_codes}\), but got {max(values)}"):
            check_packed(packed, num_codes, count)


@pytest.mark.parametrize("pattern", [None, *PATTERNS])
def test_masks_pass_that_keep_what_they_say(pattern):
    keep = random_keep(6, 3, pattern or (5, 20), seed=0)
    packed, shape = pack_keep(keep, pattern), tuple(keep.shape)
    check_keep(packed, shape, int(keep.sum()), pattern)
    if len(packed) and (pattern is None or comb(pattern[1], pattern[0]) not in (1, 4)):
        with pytest.raises(ValueError, match="Expected"):
            check_keep(torch.full_like(packed, 255), shape, int(keep.sum()), pattern)
        with pytest.raises(ValueError, match="bytes"):
            check_keep(packed[:-1], shape, int(keep.sum()), pattern)


def test_mask_of_wide_groups_is_counted_in_each():
    keep = torch.zeros(1, 40, dtype=torch.bool)
    keep[0, :10] = True
    with pytest.raises(ValueError, match="5 kept of every 20"):
        check_keep(pack_keep(keep), (1, 40), 10, (5, 20))
