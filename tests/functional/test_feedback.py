"""Error feedback with any quantizer: here a grid of whole numbers, and one that looks at whole blocks."""

import pytest
import torch

from nowag_pl.functional.feedback import Side, quantize_two_sided, quantize_with_feedback
from nowag_pl.functional.moments import damped_inverse_factor, output_error, two_sided_error


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


def coupled_problem(rows=12, columns=20, seed=0):
    """Second moments of both sides, with the factors of their inverses."""
    weight, damped, factor = problem(rows, columns, seed)
    _, out_damped, out_factor = problem(1, rows, seed + 1)
    return weight, (out_damped, out_factor), (damped, factor)


def round_tiles(row, column, targets):
    return targets.round()


def scalar_two_sided(weight, out_matrix, matrix):
    """Round one weight after the other, each for the loss of all errors before it, with later ones at their best.

    The best that later weights can do is found anew each time: the minimum of the quadratic form over all of them.
    """
    rows, columns = weight.shape
    form = torch.kron(out_matrix.double(), matrix.double())  # of row-major errors
    error = torch.zeros(rows * columns, dtype=torch.float64)
    done = torch.zeros(rows * columns, dtype=torch.bool)
    result = torch.zeros(rows, columns)
    for number in range(rows * columns):
        # What the weight would be if it and all later ones were free.
        free = ~done
        best = -torch.linalg.solve(form[free][:, free], form[free][:, done] @ error[done])
        place = int(free[:number].sum())
        wanted = weight.flatten()[number].double() - best[place]
        result.view(-1)[number] = wanted.round()
        error[number], done[number] = weight.flatten()[number].double() - wanted.round(), True
    return result


def test_two_sided_single_weights_equal_scalar_loops():
    weight, (out_damped, out_factor), (damped, factor) = coupled_problem(5, 6)
    actual = quantize_two_sided(weight, Side.of(out_factor, 1), Side.of(factor, 1), round_tiles)
    assert torch.equal(actual, scalar_two_sided(weight, out_damped, damped))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (4, 5), (12, 20), (3, 10)])
def test_outputs_that_are_not_coupled_need_one_side_only(height, width):
    weight, _, (_, factor) = coupled_problem()
    one = quantize_with_feedback(weight, factor, width, rounded)
    two = quantize_two_sided(weight, Side.of(torch.eye(12), height), Side.of(factor, width), round_tiles)
    assert torch.equal(one, two)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (4, 5), (3, 20)])
def test_two_sides_lower_the_coupled_error_and_metrics_price_it(height, width):
    weight, (out_damped, out_factor), (damped, factor) = coupled_problem()
    rows, columns = Side.of(out_factor, height), Side.of(factor, width)
    seen, cost = [], []

    def quantize(row, column, targets):
        error = targets - targets.round()
        seen.extend(zip(row.tolist(), column.tolist(), strict=True))
        cost.append(((rows.metrics[row] @ error @ columns.metrics[column]) * error).sum())
        return targets.round()

    before = weight.clone()
    two = quantize_two_sided(weight, rows, columns, quantize)
    one = quantize_with_feedback(weight, factor, width, rounded)
    assert torch.equal(weight, before)
    assert sorted(seen) == [(r, c) for r in range(12 // height) for c in range(20 // width)]
    errors = [two_sided_error(weight, each, damped, out_damped) for each in (two, one, weight.round())]
    torch.testing.assert_close(torch.stack(cost).sum().double(), errors[0], rtol=2e-3, atol=0)
    assert errors[0] < 0.8 * errors[1]
    assert errors[1] <= errors[2]


def test_sides_have_blocks_of_equal_width():
    with pytest.raises(ValueError, match="width that divides 12, but got 5"):
        Side.of(torch.eye(12), 5)
