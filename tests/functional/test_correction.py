import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nowag_pl.functional.correction import corrected_weight


def tokens(num_features, seed=0):
    """Return inputs of the dense model and of the compressed one, `[tokens, features]`."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(80, num_features, generator=generator, dtype=torch.float64)
    dense = dense @ torch.randn(num_features, num_features, generator=generator, dtype=torch.float64)
    return dense, dense + 0.3 * torch.randn(80, num_features, generator=generator, dtype=torch.float64) + 0.1


def moments(target, weight, inputs):
    """Return D and H, token by token."""
    drift = torch.zeros_like(weight)
    second = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)
    for y, x in zip(target, inputs, strict=True):
        drift += torch.outer(y - weight @ x, x) / len(inputs)
        second += torch.outer(x, x) / len(inputs)
    return drift.float(), second.float()


def test_without_a_ridge_it_is_the_least_squares_of_the_target():
    dense, inputs = tokens(5)
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    target = dense @ weight.T + torch.randn(80, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    drift, second = moments(target, weight, inputs)
    expected = torch.linalg.lstsq(inputs, target).solution.T
    actual = corrected_weight(weight.float(), drift, second, ridge=1e-7)
    torch.testing.assert_close(actual, expected.float(), rtol=1e-3, atol=1e-3)


def test_ridge_is_a_penalty_on_the_distance_to_the_dense_weight():
    dense, inputs = tokens(4)
    weight = torch.randn(2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drift, second = moments(dense @ weight.T, weight, inputs)
    amount = 0.5 * float(second.diagonal().mean()) * len(inputs)
    rows = torch.cat([inputs, amount**0.5 * torch.eye(4, dtype=torch.float64)])
    targets = torch.cat([dense @ weight.T, amount**0.5 * weight.T])
    expected = torch.linalg.lstsq(rows, targets).solution.T
    torch.testing.assert_close(
        corrected_weight(weight.float(), drift, second, ridge=0.5), expected.float(), rtol=1e-4, atol=1e-4
    )


@settings(max_examples=20)
@given(seed=st.integers(0, 999), ridge=st.sampled_from([0.001, 0.03, 1.0, 30.0]))
def test_error_falls_and_a_large_ridge_changes_little(seed, ridge):
    dense, inputs = tokens(6, seed)
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    target = dense @ weight.T
    drift, second = moments(target, weight, inputs)
    corrected = corrected_weight(weight.float(), drift, second, ridge).double()
    assert (target - inputs @ corrected.T).square().sum() < (target - inputs @ weight.T).square().sum()
    further = corrected_weight(weight.float(), drift, second, 2 * ridge).double()
    assert (further - weight).norm() < (corrected - weight).norm()


def test_without_drift_and_for_dead_inputs_the_weight_stays():
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    second = torch.diag(torch.tensor([1.0, 0.0, 2.0, 3.0]))
    assert torch.equal(corrected_weight(weight, torch.zeros(3, 4), second), weight)
    drift = torch.ones(3, 4)
    drift[:, 1] = 0
    assert torch.equal(corrected_weight(weight, drift, second)[:, 1], weight[:, 1])
    assert torch.equal(corrected_weight(weight, torch.zeros(3, 4), torch.zeros(4, 4)), weight)


def test_half_weights_are_corrected_in_single_precision_and_not_changed():
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = weight.clone()
    corrected = corrected_weight(weight, torch.full((3, 4), 1e-4), torch.eye(4))
    assert corrected.dtype == torch.float32
    torch.testing.assert_close(corrected - before.float(), torch.full((3, 4), 1e-4 / 1.03), rtol=1e-2, atol=0)
    assert torch.equal(weight, before)


def test_second_moments_that_cannot_be_inverted_are_refused():
    with pytest.raises(ValueError, match="not positive definite"):
        corrected_weight(torch.ones(1, 2), torch.ones(1, 2), torch.tensor([[1.0, 500.0], [500.0, 1.0]]))
