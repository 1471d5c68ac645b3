"""Error feedback with any quantizer: here a grid of whole numbers, and one that looks at whole blocks."""

import pytest
import torch

from nowag_pl.functional.feedback import quantize_with_feedback
from nowag_pl.functional.moments import damped_inverse_factor, output_error


def problem(rows=5, columns=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(60, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    weight = 2 * torch.randn(rows, columns, generator=generator)
    damped, factor = damped_inverse_factor(tokens.T @ tokens / 60, 0.01)
    return weight, damped, factor


def rounded(columns, target, metric):
    return target.round()


def scalar_gptq(weight, matrix):
    """Round one weight after the other, and solve anew for all that are left after each, in float64."""
    result = torch.zeros_like(weight)
    for i, row in enumerate(weight.double()):
        target, matrix = row.clone(), matrix.double()
        for j in range(len(row)):
            result[i, j] = target[j].round()
            error, rest = target[j] - target[j].round(), slice(j + 1, None)
            target[rest] += torch.linalg.solve(matrix[rest, rest], matrix[rest, j]) * error
    return result


def test_single_columns_equal_scalar_loops():
    weight, matrix, factor = problem()
    assert torch.equal(quantize_with_feedback(weight, factor, 1, rounded), scalar_gptq(weight, matrix))


@pytest.mark.parametrize("width", [1, 5, 16])
def test_blocks_cover_the_row_and_their_metric_prices_what_is_left_after_feedback(width):
    weight, matrix, factor = problem()
    seen, cost = [], torch.zeros(5)

    def quantize(columns, target, metric):
        error = target - target.round()
        seen.extend(range(12)[columns])
        assert metric.shape == (target.shape[1], target.shape[1])
        cost.add_(((error @ metric) * error).sum(dim=1))
        return target.round()

    before = weight.clone()
    result = quantize_with_feedback(weight, factor, width, quantize)
    assert seen == list(range(12))
    assert torch.equal(weight, before)
    assert torch.equal(result, result.round())
    torch.testing.assert_close(cost, output_error(weight, result, matrix), rtol=1e-3, atol=1e-3)


def test_feedback_helps():
    weight, matrix, factor = problem(40, 24)
    plain, fed = weight.round(), quantize_with_feedback(weight, factor, 1, rounded)
    assert output_error(weight, fed, matrix).sum() < 0.7 * output_error(weight, plain, matrix).sum()
