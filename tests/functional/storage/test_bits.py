from math import ceil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nowag_pl.functional.storage.bits import masked_bits_per_weight, vector_quantized_bits_per_weight
from nowag_pl.modules import MaskedLinear, VQLinear

DTYPES = {torch.float32: 32, torch.bfloat16: 16, torch.float16: 16}


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 20),
    num_kept=st.integers(0, 180),
    dtype=st.sampled_from(list(DTYPES)),
)
def test_unstructured_mask_formula_is_what_is_stored(rows, columns, num_kept, dtype):
    keep = (torch.arange(rows * columns) < num_kept).view(rows, columns)
    module = MaskedLinear(torch.zeros(rows, columns, dtype=dtype), keep, torch.zeros(rows))
    bits = masked_bits_per_weight((rows, columns), int(keep.sum()), DTYPES[dtype]) * rows * columns
    assert 0 <= module.storage_bytes * 8 - bits < 8
    assert module.bits_per_weight * rows * columns == pytest.approx(bits)


@pytest.mark.parametrize("pattern", [(1, 4), (3, 4), (2, 4), (4, 8), (4, 4), (5, 20)])
def test_pattern_formula_is_what_is_stored(pattern):
    num_kept, size = pattern
    rows, columns = 5, 3 * size
    keep = (torch.arange(columns) % size < num_kept).repeat(rows, 1)
    module = MaskedLinear(torch.zeros(rows, columns, dtype=torch.bfloat16), keep, pattern=pattern)
    bits = masked_bits_per_weight((rows, columns), int(keep.sum()), 16, pattern) * rows * columns
    assert 0 <= module.storage_bytes * 8 - bits < 8
    assert module.bits_per_weight * rows * columns == pytest.approx(bits)


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 20),
    dim=st.integers(1, 7),
    size=st.integers(1, 40),
)
def test_quantized_formula_is_what_is_stored(rows, columns, dim, size):
    codes = torch.zeros(rows, ceil(columns / dim), dtype=torch.int64)
    module = VQLinear(torch.zeros(size, dim), codes, torch.ones(columns), torch.ones(rows), torch.zeros(rows))
    bits = vector_quantized_bits_per_weight((rows, columns), dim, size) * rows * columns
    assert 0 <= module.storage_bytes * 8 - bits < 8 - 1e-6
    assert module.bits_per_weight * rows * columns == pytest.approx(bits)


def test_known_costs():
    assert masked_bits_per_weight((4, 8), 8, 16, (1, 4)) == 16 / 4 + 2 / 4
    assert masked_bits_per_weight((4, 8), 24, 16, (3, 4)) == 16 * 3 / 4 + 2 / 4
    assert masked_bits_per_weight((4, 10), 10, 32) == 32 / 4 + 1
    # 2 rows of 3 codes of 2 bits; 3 codewords of 4 values and 9 + 2 scales of 16 bits
    assert vector_quantized_bits_per_weight((2, 9), 4, 3) == (6 * 2 + (12 + 11) * 16) / 18
