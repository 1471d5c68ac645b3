import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_problems import problem, total

from nowag_pl.functional.feedback import column_blocks
from nowag_pl.functional.moments import damp, damped_inverse_factor, output_error, two_sided_error
from nowag_pl.functional.vq import refine as refining
from nowag_pl.functional.vq.codes import feedback_codes, sweep_codes, two_sided_codes
from nowag_pl.functional.vq.refine import Refinement, refine


def scalar_feedback(weight, quantized, matrix, dim):
    """Choose codes as GPTQ does, with explicit inverses of what is left of H instead of a factor, in float64."""
    target, matrix = weight.double().clone(), matrix.double()
    codebook = quantized.codebook.double()
    out_features, in_features = weight.shape
    codes = [[] for _ in range(out_features)]
    for start in range(0, in_features, dim):
        width = min(dim, in_features - start)
        inverse = torch.linalg.inv(matrix[start:, start:])
        metric = torch.linalg.inv(inverse[:width, :width])
        for i in range(out_features):
            costs = []
            for codeword in codebook:
                scales = quantized.in_scale[start : start + width].double() * float(quantized.out_scale[i])
                error = target[i, start : start + width] - codeword[:width] * scales
                costs.append((float(error @ metric @ error), error))
            best = min(range(len(costs)), key=lambda k: costs[k][0])
            codes[i].append(best)
            target[i, start:] -= costs[best][1] @ metric @ inverse[:width]
    return codes


@pytest.mark.parametrize(("in_features", "dim"), [(6, 1), (6, 2), (7, 3), (6, 4)])
def test_feedback_equals_scalar_loops(in_features, dim):
    weight, matrix, quantized = problem(4, in_features, dim)
    damped, factor = damped_inverse_factor(matrix, 0.01)
    codes = feedback_codes(weight, quantized, factor)
    assert codes.tolist() == scalar_feedback(weight, quantized, damped, dim)
    assert not torch.equal(codes, quantized.codes)


def test_without_correlation_feedback_is_the_nearest_codeword():
    weight, matrix, quantized = problem()
    matrix = torch.diag(matrix.diagonal())
    _, factor = damped_inverse_factor(matrix, 0.01)
    assert torch.equal(feedback_codes(weight, quantized, factor), sweep_codes(weight, quantized, damp(matrix, 0.01)))


@pytest.mark.parametrize(("in_features", "dim"), [(6, 2), (7, 3)])
def test_sweep_takes_the_best_code_of_each_column_given_the_others(in_features, dim):
    weight, matrix, quantized = problem(4, in_features, dim)
    codes = quantized.codes.clone()
    for group in range(len(column_blocks(in_features, dim))):
        for i in range(4):
            errors = []
            for k in range(len(quantized.codebook)):
                codes[i, group] = k
                errors.append(float(output_error(weight, quantized._replace(codes=codes).weight, matrix)[i]))
            codes[i, group] = errors.index(min(errors))
    assert torch.equal(sweep_codes(weight, quantized, matrix), codes)
    assert not torch.equal(quantized.codes, codes)


@settings(max_examples=20)
@given(seed=st.integers(0, 999), in_features=st.integers(4, 9), dim=st.integers(1, 3))
def test_sweeps_never_raise_the_error(seed, in_features, dim):
    weight, matrix, quantized = problem(5, in_features, dim, 4, seed)
    before = total(weight, quantized, matrix)
    for _ in range(3):
        quantized = quantized._replace(codes=sweep_codes(weight, quantized, matrix))
        after = total(weight, quantized, matrix)
        assert after <= before * (1 + 1e-5)
        before = after


@settings(max_examples=15)
@given(
    seed=st.integers(0, 999),
    update=st.sampled_from(["feedback", "alternating", None]),
    rounds=st.integers(1, 3),
    scales=st.booleans(),
)
def test_refined_is_never_worse_and_costs_no_more_bits(seed, update, rounds, scales):
    weight, matrix, quantized = problem(6, 7, 3, 4, seed)
    damped = damp(matrix, 0.05)
    refined = refine(weight, quantized, matrix, Refinement(update, rounds, scales, 0.05))
    assert total(weight, refined, damped) <= total(weight, quantized, damped)
    assert [part.shape for part in refined] == [part.shape for part in quantized]
    if not scales:
        assert torch.equal(refined.in_scale, quantized.in_scale)
        assert torch.equal(refined.out_scale, quantized.out_scale)


def test_more_rounds_and_refitted_scales_help():
    weight, matrix, quantized = problem(24, 18, 3, 8)
    damped = damp(matrix, 0.01)
    errors = [
        total(weight, refine(weight, quantized, matrix, Refinement("feedback", rounds, scales, 0.01)), damped)
        for rounds, scales in [(1, False), (4, False), (4, True)]
    ]
    assert errors[0] < 0.7 * total(weight, quantized, damped)
    assert errors[2] < errors[1] < errors[0]


def test_arguments_stay():
    weight, matrix, quantized = problem()
    before = [tensor.clone() for tensor in (weight, matrix, *quantized)]
    refine(weight, quantized, matrix, Refinement("alternating", 2, True, 0.01))
    assert all(map(torch.equal, before, (weight, matrix, *quantized)))


def test_row_and_column_of_zeros_stay_finite():
    weight, matrix, quantized = problem(6, 6)
    weight[2] = 0
    matrix[3] = matrix[:, 3] = 0
    for update in ("feedback", "alternating"):
        refined = refine(weight, quantized, matrix, Refinement(update, 3, True, 0.01))
        assert all(part.isfinite().all() for part in refined)


def test_best_round_is_taken_and_not_the_last(monkeypatch):
    weight, matrix, start = problem(6, 6)
    # Rounds whose errors fall, and then rise again.
    rounds = [start._replace(out_scale=start.out_scale * factor) for factor in (3, 1.5, 1.05, 1.4, 2)]
    errors = [total(weight, each, damp(matrix, 0.01)) for each in rounds]
    assert errors.index(min(errors)) == 2
    coming = iter(rounds[1:])
    monkeypatch.setattr(refining, "_choose", lambda *_: next(coming))
    monkeypatch.setattr(refining, "refit_codebook", lambda weight, current, *_: current.codebook)
    best = refine(weight, rounds[0], matrix, Refinement("feedback", 4, False, 0.01))
    assert torch.equal(best.out_scale, rounds[2].out_scale)


def coupling(rows, seed=5):
    tokens = torch.randn(60, rows, generator=torch.Generator().manual_seed(seed)) @ torch.diag(
        torch.arange(1.0, rows + 1)
    )
    return (tokens + tokens.roll(1, 1)).T @ (tokens + tokens.roll(1, 1)) / 60


@pytest.mark.parametrize(("in_features", "dim"), [(6, 1), (7, 3), (6, 4)])
def test_both_sides_without_coupling_are_one_side(in_features, dim):
    weight, matrix, quantized = problem(5, in_features, dim)
    _, factor = damped_inverse_factor(matrix, 0.01)
    codes = two_sided_codes(weight, quantized, torch.eye(5), factor)
    assert torch.equal(codes, feedback_codes(weight, quantized, factor))


@pytest.mark.parametrize("refit_scales", [True, False])
def test_coupled_outputs_lose_less_with_feedback_along_both_sides(refit_scales):
    weight, matrix, start = problem(16, 24, 3, 6)
    out_matrix = coupling(16)
    one, two = (
        refine(weight, start, matrix, Refinement(update, 3, refit_scales, 0.01), output_moment)
        for update, output_moment in (("feedback", None), ("two_sided", out_matrix))
    )
    errors = [two_sided_error(weight, each.weight, matrix, out_matrix) for each in (start, one, two)]
    assert errors[2] < 0.9 * errors[1]
    assert errors[2] < errors[0]
