from math import sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nowag_pl.functional.normalization import denormalize, normalize


def scalar_normalize(weight):
    rows, columns = len(weight), len(weight[0])
    in_scale = [sqrt(sum(weight[i][j] ** 2 for i in range(rows))) or 1.0 for j in range(columns)]
    scaled = [[weight[i][j] / in_scale[j] for j in range(columns)] for i in range(rows)]
    out_scale = [sqrt(sum(value**2 for value in row)) or 1.0 for row in scaled]
    return [[value / out_scale[i] for value in row] for i, row in enumerate(scaled)], in_scale, out_scale


@pytest.mark.parametrize("shape", [(4, 6), (5, 7), (1, 3), (3, 1)])
def test_equals_scalar_loops(shape, generator):
    weight = torch.randn(shape, generator=generator)
    for actual, expected in zip(normalize(weight), scalar_normalize(weight.tolist()), strict=True):
        torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-6, atol=1e-7)


def test_columns_come_before_rows():
    normalized = normalize(torch.tensor([[3.0, 0.0], [4.0, 2.0]]))
    torch.testing.assert_close(normalized.in_scale, torch.tensor([5.0, 2.0]))
    torch.testing.assert_close(normalized.out_scale, torch.tensor([0.6, sqrt(0.8**2 + 1)]))


def test_zero_columns_and_rows_get_scale_one():
    normalized = normalize(torch.tensor([[0.0, 3.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 0.0]]))
    assert normalized.in_scale.tolist() == [1.0, 5.0, 1.0]
    assert normalized.out_scale[2] == 1.0
    assert normalized.weight[2].tolist() == [0.0, 0.0, 0.0]
    assert normalized.weight[:, 0].tolist() == [0.0, 0.0, 0.0]


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    seed=st.integers(0, 99),
    num_zero_columns=st.integers(0, 2),
    num_zero_rows=st.integers(0, 2),
)
def test_denormalize_restores_and_input_stays(rows, columns, seed, num_zero_columns, num_zero_rows):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight[:, :num_zero_columns] = 0
    weight[:num_zero_rows] = 0
    before = weight.clone()
    normalized = normalize(weight)
    torch.testing.assert_close(denormalize(*normalized), weight, rtol=1e-5, atol=1e-6)
    expected_norms = (weight != 0).any(dim=1).float()
    torch.testing.assert_close(normalized.weight.norm(dim=1), expected_norms)
    assert torch.equal(weight, before)


def test_denormalize_equals_scalar_loops(generator):
    weight, in_scale, out_scale = (torch.randn(size, generator=generator) for size in [(4, 6), (6,), (4,)])
    actual = denormalize(weight, in_scale, out_scale)
    for i in range(4):
        for j in range(6):
            assert actual[i, j].item() == pytest.approx(
                float(out_scale[i]) * float(weight[i, j]) * float(in_scale[j]), rel=1e-6
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_results_are_float32(dtype):
    assert {tensor.dtype for tensor in normalize(torch.ones(2, 3, dtype=dtype))} == {torch.float32}


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_squares_neither_overflow_nor_vanish(size):
    normalized = normalize(torch.full((4, 4), size))
    torch.testing.assert_close(normalized.in_scale, torch.full((4,), 2 * size))
    torch.testing.assert_close(normalized.weight, torch.full((4, 4), 0.5))
