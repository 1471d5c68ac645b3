import pytest
import torch

from nowag_pl.functional.moments import damp, damped_inverse_factor, mean_squares, output_error


def moments(num_features, num_tokens=50, seed=0):
    tokens = torch.randn(num_tokens, num_features, generator=torch.Generator().manual_seed(seed))
    return tokens.T @ tokens / num_tokens, tokens


def test_output_error_is_the_mean_square_over_tokens():
    matrix, tokens = moments(6)
    weight, other = torch.randn(4, 6), torch.randn(4, 6)
    expected = ((tokens @ (weight - other).T).square()).mean(dim=0)
    torch.testing.assert_close(output_error(weight, other, matrix), expected, rtol=1e-4, atol=1e-5)


def test_mean_squares_are_the_diagonal():
    matrix, _ = moments(5)
    assert torch.equal(mean_squares(matrix), matrix.diagonal())
    assert torch.equal(mean_squares(matrix[0]), matrix[0])


def test_damping_is_relative_to_the_mean_of_the_diagonal():
    matrix = torch.diag(torch.tensor([1.0, 3.0]))
    assert damp(matrix, 0.5).tolist() == [[2.0, 0.0], [0.0, 4.0]]
    assert damp(torch.zeros(2, 2), 0.5).tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_factor_is_that_of_the_inverse_and_upper_triangular():
    matrix, _ = moments(7)
    damped, factor = damped_inverse_factor(matrix, 0.01)
    torch.testing.assert_close(damped, damp(matrix, 0.01))
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(7), rtol=1e-3, atol=1e-4)
    assert torch.equal(factor, factor.triu())


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_fewer_tokens_than_features_and_dead_channels_can_be_inverted(scale):
    matrix, _ = moments(20, num_tokens=3)
    matrix[4] = matrix[:, 4] = 0
    _, factor = damped_inverse_factor(matrix * scale, 0.01)
    assert factor.isfinite().all()


def test_more_damping_is_tried_and_only_as_much_as_needed():
    matrix = torch.eye(3) - 0.05 * torch.diag(torch.tensor([0.0, 0.0, 21.0]))  # one eigenvalue of -0.05
    damped, _ = damped_inverse_factor(matrix, 0.01)
    torch.testing.assert_close(damped, damp(matrix, 0.1))


def test_what_cannot_be_inverted_is_refused():
    with pytest.raises(ValueError, match=r"positive definite with 10 of their mean .* more calibration tokens"):
        damped_inverse_factor(torch.diag(torch.tensor([1.0, 1.0, -1.9])), 0.01)
