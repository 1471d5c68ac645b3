from functools import partial
from itertools import combinations, product

import pytest
import torch
from quantized_problems import problem, total

from nowag_pl.functional.alternating import Alternation, alternate, alternating_keep
from nowag_pl.functional.least_squares import refit_kept
from nowag_pl.functional.moments import damp, output_error
from nowag_pl.functional.pruning import keep_largest, keep_n_of_m
from nowag_pl.functional.vq.codes import alternating_codes


def half(scores):
    return keep_largest(scores.reshape(1, -1), 0.5).view(scores.shape)


def error_of(weight, matrix, keep):
    return float(output_error(weight, refit_kept(weight, keep, matrix, 20), matrix))


def diagonal_error(weight, matrix, choose):
    keep = choose(weight.square() * matrix.diagonal())
    return output_error(weight, refit_kept(weight, keep, matrix, 40), matrix).sum()


def test_masks_are_near_the_best_of_all_on_average():
    found = best = typical = 0.0
    for seed in range(6):
        weight, matrix, _ = problem(1, 8, seed=seed)
        matrix = damp(matrix, 0.01)
        masks = [torch.tensor([[j in kept for j in range(8)]]) for kept in combinations(range(8), 4)]
        errors = sorted(error_of(weight, matrix, keep) for keep in masks)
        found += error_of(weight, matrix, alternating_keep(weight, matrix, half))
        best, typical = best + errors[0], typical + errors[len(errors) // 2]
    assert found <= best + 0.1 * (typical - best)


@pytest.mark.parametrize("pattern", [None, (1, 4), (2, 4), (3, 4)])
def test_mask_follows_the_pattern_and_beats_the_diagonal(pattern):
    weight, matrix, _ = problem(32, 24, num_tokens=400)
    matrix, choose = damp(matrix, 0.01), half if pattern is None else partial(keep_n_of_m, pattern=pattern)
    keep = alternating_keep(weight, matrix, choose)
    if pattern is None:
        assert int(keep.sum()) == keep.numel() // 2
    else:
        assert (keep.view(-1, pattern[1]).sum(dim=1) == pattern[0]).all()
    error = output_error(weight, refit_kept(weight, keep, matrix, 40), matrix).sum()
    assert error < 0.9 * diagonal_error(weight, matrix, choose)


def test_without_correlation_the_mask_is_that_of_the_scores():
    weight, matrix, _ = problem(8, 12)
    matrix = torch.diag(matrix.diagonal())
    assert torch.equal(alternating_keep(weight, matrix, half), half(weight.square() * matrix.diagonal()))


def test_codes_are_nearly_the_best_of_all():
    weight, matrix, quantized = problem(1, 6, 2, 3, seed=3)
    matrix = damp(matrix, 0.01)
    found = alternating_codes(weight, quantized, matrix)
    errors = [
        total(weight, found._replace(codes=torch.tensor([codes])), matrix) for codes in product(range(3), repeat=3)
    ]
    assert total(weight, found, matrix) <= sorted(errors)[2] * (1 + 1e-5)


@pytest.mark.parametrize(("in_features", "dim"), [(18, 3), (19, 3)])
def test_codes_have_less_error_and_scales_stay(in_features, dim):
    weight, matrix, quantized = problem(24, in_features, dim, 8)
    matrix = damp(matrix, 0.01)
    found = alternating_codes(weight, quantized, matrix)
    assert total(weight, found, matrix) < 0.5 * total(weight, quantized, matrix)
    assert torch.equal(found.in_scale, quantized.in_scale)
    assert torch.equal(found.out_scale, quantized.out_scale)
    assert found.codes.shape == quantized.codes.shape


@pytest.mark.parametrize("growth", [1.0, 1.1, 1.5])
def test_alternation_is_that_of_the_method_of_multipliers(growth):
    """ADMM with a multiplier V, which needs no rescaling when the penalty grows (arXiv:2406.07831)."""
    weight, matrix, _ = problem(4, 6)
    matrix = damp(matrix, 0.01)
    scale = matrix.diagonal().sqrt()
    unit, dense, penalty = (matrix / scale / scale[:, None]).double(), (weight * scale).double(), 0.1
    near = dense.clone()
    kept, multiplier = torch.where(half(near.square()), near, 0), torch.zeros_like(near)
    for _ in range(7):
        inverse = torch.linalg.inv(unit + penalty * torch.eye(6))
        near = (dense @ unit + penalty * kept - multiplier) @ inverse
        projected = near + multiplier / penalty
        kept = torch.where(half(projected.square()), projected, 0)
        multiplier = multiplier + penalty * (near - kept)
        penalty *= growth
    actual = alternate(
        weight, matrix, lambda target: torch.where(half((target * scale).square()), target, 0), Alternation(7, growth)
    )
    torch.testing.assert_close(actual, (projected / scale).float(), rtol=1e-3, atol=1e-4)
