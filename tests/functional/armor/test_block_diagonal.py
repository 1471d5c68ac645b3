import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nowag_pl.functional.armor.block_diagonal import apply_factors, largest_block, multiply_left, multiply_right


@given(num_features=st.integers(1, 400), at_most=st.integers(1, 64), multiple_of=st.integers(1, 8))
def test_largest_block_is_the_largest(num_features, at_most, multiple_of):
    fitting = [n for n in range(1, at_most + 1) if num_features % n == 0 and n % multiple_of == 0]
    if fitting:
        assert largest_block(num_features, at_most, multiple_of) == max(fitting)
    else:
        with pytest.raises(ValueError, match=f"at least {multiple_of} .* block size of {at_most} for {num_features}"):
            largest_block(num_features, at_most, multiple_of)


@given(num_left=st.integers(1, 3), left=st.integers(1, 4), num_right=st.integers(1, 3), right=st.integers(1, 4))
def test_products_are_those_of_dense_matrices(num_left, left, num_right, right):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(num_left * left, num_right * right, generator=generator)
    left_blocks = torch.randn(num_left, left, left, generator=generator)
    right_blocks = torch.randn(num_right, right, right, generator=generator)
    torch.testing.assert_close(multiply_left(left_blocks, matrix), torch.block_diag(*left_blocks) @ matrix)
    torch.testing.assert_close(multiply_right(matrix, right_blocks), matrix @ torch.block_diag(*right_blocks))


@pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
def test_right_product_takes_any_leading_dimensions(leading, generator):
    matrix, blocks = torch.randn(*leading, 6, generator=generator), torch.randn(3, 2, 2, generator=generator)
    torch.testing.assert_close(multiply_right(matrix, blocks), matrix @ torch.block_diag(*blocks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
def test_factors_are_applied_one_after_the_other(leading, dtype, generator):
    activations, core = torch.randn(*leading, 6, generator=generator), torch.randn(8, 6, generator=generator)
    left, right = torch.randn(2, 4, 4, generator=generator), torch.randn(3, 2, 2, generator=generator)
    output = apply_factors(activations.to(dtype), left, core.to(dtype), right)
    expected = activations @ (torch.block_diag(*left) @ core @ torch.block_diag(*right)).T
    assert output.dtype == dtype
    assert (output.float() - expected).norm() <= (1e-5 if dtype == torch.float32 else 2e-2) * expected.norm()
